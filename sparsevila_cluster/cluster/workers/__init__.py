"""Prefill and decode workers: engines, what they send and what they receive."""
