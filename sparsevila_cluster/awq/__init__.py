"""Quantised weights as plain data and tensors: what a checkpoint says of them, and how they are found."""
