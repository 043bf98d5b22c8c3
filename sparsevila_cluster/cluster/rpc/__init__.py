"""Calls between the processes of a cluster, over connections of their own: messages, the server, the pool of workers."""
