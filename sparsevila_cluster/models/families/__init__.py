"""Model families: from media to visual tokens and prompts. A family is one file and one row of `FAMILIES`."""

FAMILIES = {
    "internvl": "sparsevila_cluster.models.families.internvl:InternVL",
    "llava_next": "sparsevila_cluster.models.families.llava_next:LlavaNext",
    "llava_onevision": "sparsevila_cluster.models.families.llava_onevision:LlavaOnevision",
    "qwen2_5_vl": "sparsevila_cluster.models.families.qwen2_5_vl:Qwen25VL",
    "qwen3_vl": "sparsevila_cluster.models.families.qwen3_vl:Qwen3VL",
}
"""model_type of config.json -> "module:class" that implements `Family`, imported when a checkpoint needs it."""

CONVERTED = {
    "internvl_chat": "it runs by code of its own, which is never loaded; take the checkpoint that is published for transformers, "
    "with -hf at the end of its name: OpenGVLab/InternVL3-8B-hf for OpenGVLab/InternVL3-8B, OpenGVLab/InternVL3_5-8B-HF for "
    "InternVL3_5-8B",
}
"""model_type of checkpoints that are also published in a form that is supported -> where to find that."""
