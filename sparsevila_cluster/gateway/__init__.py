"""What clients reach: one service over a `Pipeline`, and a translation of it for each protocol."""
