"""The cluster: workers around the engines, the directory of who holds what, and the router in front of them."""
