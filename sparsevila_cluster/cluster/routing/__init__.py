"""The router: where preparations and turns go, and what becomes of them when a worker is lost."""
