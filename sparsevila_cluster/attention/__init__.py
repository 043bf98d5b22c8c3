"""What a text decoder calls once per layer: one interface, in plain torch and through Triton kernels."""
