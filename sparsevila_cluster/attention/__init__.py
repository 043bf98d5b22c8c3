"""What a text decoder calls once per layer: one batch interface, in plain torch and through Triton kernels."""
