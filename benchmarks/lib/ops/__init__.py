"""The operations of `sparsevila_kernels` as cases: shapes of Qwen2.5-VL-7B, who competes, and what each must do at least."""
