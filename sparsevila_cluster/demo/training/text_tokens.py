"""The tokenizer of a model of scenes: a word of a question is one token, so is a number, and so is a letter of a word on view."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from sparsevila_cluster.demo.checkpoint_builder import train_tokenizer
from sparsevila_cluster.demo.questions import KINDS, make_questions
from sparsevila_cluster.demo.scenes import make_scene
from sparsevila_cluster.demo.training.scene_videos import seed_of

NUM_SCENES = 400
LENGTHS = (8, 64)
# As Qwen2 splits, but for numbers, which stay whole: the steps of a scene are names, and nobody adds them.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_scene_tokenizer() -> PreTrainedTokenizerFast:
    """Trained on questions about scenes without words, so that a word is spelled, letter by letter."""
    rng = seed_of("training", 5)
    corpus = ["user\n", "assistant\n", "system\n", *map(str, range(100))] * NUM_SCENES
    corpus += ["Which word is written at step 1?", "When is the word", "the word", " word shown?"] * 9
    for _ in range(NUM_SCENES):
        for num_steps in LENGTHS:
            for question in make_questions(make_scene(rng, num_steps, ()), rng, len(KINDS)):
                corpus += [question.text, question.answer]
    return train_tokenizer(corpus, SPLIT)
