"""Making quantized checkpoints: calibration, the work on each layer, writing, and comparing the result with its original."""
