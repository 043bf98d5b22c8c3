"""The demo: a synthetic world, a checkpoint small enough to ship that answers questions about it, and its trainer."""
