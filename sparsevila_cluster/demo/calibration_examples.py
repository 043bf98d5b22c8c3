"""Synthetic materials to calibrate on or compare with: dialogues about scenes of the demo world, and random tokens."""

from __future__ import annotations

import hashlib

import numpy as np

from sparsevila_cluster.demo.drawing import FPS
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.demo.scenes import STREAMS
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.loading.originals import Vocabulary
from sparsevila_cluster.quantization.calibration import Reading
from sparsevila_cluster.quantization.materials import Material

NUM_TURNS = 6
NUM_IDS, NUM_IDS_BESIDE_MEDIA = 256, 64  # random tokens in a row; few where there is something better
# The seeds that the demo model's own measurements do not use.
FIRST_SEED = 400_000


def make_examples(
    vocabulary: Vocabulary, reading: Reading, num: int, *, media: bool = True, seed: int = 0, held_out: bool = False
) -> list[Material]:
    """Without `media`, and for a language model, `num` times random tokens; else `num` videos and pictures in turn, as the model
    takes them, and an eighth as many (and shorter) random tokens. Held-out ones share nothing with the others of any seed.
    """
    rng = np.random.default_rng((STREAMS[_stream(held_out)], seed, 7))
    plain = np.array(vocabulary.plain_ids())
    kinds = vocabulary.kinds if media else ()
    num_texts, num_ids = (-(-num // 8), NUM_IDS_BESIDE_MEDIA) if kinds else (num, NUM_IDS)
    found = [
        Material(f"random tokens {i}", ids=tuple(int(one) for one in rng.choice(plain, min(num_ids, reading.text_tokens))))
        for i in range(num_texts)
    ]
    for i in range(num if kinds else 0):
        kind = kinds[i % len(kinds)]
        found.append(_scene(FIRST_SEED + 1000 * seed + i, kind, reading, held_out))
    return found


def _stream(held_out: bool) -> str:
    return "demo" if held_out else "training"


def _scene(seed: int, kind: str, reading: Reading, held_out: bool) -> Material:
    scene, frames = make_video(seed, stream=_stream(held_out))
    rng = np.random.default_rng((STREAMS[_stream(held_out)], seed, 8))
    turns = tuple((one.text, one.answer) for one in make_questions(scene, rng, NUM_TURNS))
    step = max(1, round(FPS / reading.fps)) if kind == "video" else len(frames)
    shown = frames[::step][: reading.max_frames]
    times_s = np.arange(len(frames))[::step][: reading.max_frames] / FPS
    duration_s = float(scene.num_steps) if kind == "video" else 0.0
    name = hashlib.blake2b(shown.tobytes(), digest_size=32).hexdigest()
    media = Media(shown, times_s, "video" if kind == "video" else "image", name, duration_s)
    return Material(f"{kind} of the demo world, seed {seed}", media=(media,), turns=turns)
