"""Measurements. Each prints a card of the machine, tables, and one JSON document as its last line."""
