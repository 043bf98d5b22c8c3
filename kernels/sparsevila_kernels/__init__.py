"""GPU kernels in Triton, each beside a plain PyTorch reference with the same name and arguments.

Knows: tensors. Does not know: sparsevila_cluster, of which it imports nothing. It holds no kernel yet: the engine runs
on PyTorch operators.
"""
