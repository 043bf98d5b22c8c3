"""KV of kept tokens: arenas, media prefixes, and the stores of prefixes and conversations."""
