"""Ray around workers and the directory: replicas, and calls between them."""
