"""Prefill and decode engines, scheduling, sampling, and both engines as one local pipeline."""
