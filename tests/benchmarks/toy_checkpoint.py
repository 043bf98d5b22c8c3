"""The checkpoint of the benchmarks at a size that runs in seconds."""

from benchmarks.lib.midsize_checkpoint import Recipe

TOY = Recipe(
    hidden=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    intermediate=96,
    vocab=400,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=2,
    vision_intermediate=48,
    full_layers=(1,),
    patch_px=8,
    window_px=48,
    frame_px=80,
)
