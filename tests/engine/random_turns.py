"""What a storm asks: turns drawn at random, with every option that a turn may have."""

from __future__ import annotations

import random
from dataclasses import replace

from sparsevila_cluster.core.requests import Replay, SamplingParams, Turn, TurnRecord

WORDS = "what where when colour is the star circle left of and then? how many do you see in it now please".split()


def draw_turn(rng: random.Random, number: int, conversation_id: str, media_id: str, max_tokens: int | None, **options) -> Turn:
    if rng.random() < 0.3:
        options["retrieve_keep"] = rng.choice((0.1, 0.3, 0.8, 1.0))
    if rng.random() < 0.25:
        options["retrieve_mass"] = rng.choice((0.3, 0.6, 0.9))
    if rng.random() < 0.25:
        options["refresh_every"] = rng.choice((1, 2, 3, 7))
    question = " ".join(rng.choices(WORDS, k=rng.choice((1, 3, 3, 10, 25))))
    sampling = SamplingParams(
        max_tokens=max_tokens or rng.choice((1, 2, 5, 10, 20, 45, 70)),
        stop=("zz", "e") if rng.random() < 0.1 else (),
        temperature=0.8 if rng.random() < 0.1 else 0.0,
        seed=number,
    )
    return Turn(
        f"turn {number}", conversation_id, media_id, question, sampling, want_evidence=rng.random() < 0.3, deadline_s=1e6, **options
    )


def draw_replay(rng: random.Random, made: TurnRecord, number: int, conversation_id: str) -> Turn:
    """The same turn in another conversation, from any token on."""
    replay = Replay(made.token_ids[: rng.randint(0, len(made.token_ids))], made.brownout)
    return replace(made.turn, turn_id=f"turn {number}", conversation_id=conversation_id, replay=replay)
