"""Sampling of tokens from logits, and the legal range of its parameters."""

import math

import pytest
import torch

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import SamplingParams
from sparsevila_cluster.engine.sampling import Sampler, sample


def test_greedy_and_degenerate_sampling():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.9]])
    assert sample(logits, [Sampler(SamplingParams()), Sampler(SamplingParams(temperature=1.0, top_k=1))]) == [1, 0]
    assert Sampler(SamplingParams(temperature=2.0, top_p=1e-6, seed=1)).draw(logits[1]) == 0


def test_a_seed_gives_the_same_stream_whatever_is_beside_it():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.0, seed=7)
    alone, batched, neighbour = Sampler(params), Sampler(params), Sampler(SamplingParams(temperature=1.3, seed=9))
    one = [alone.draw(row) for row in logits]
    two = [sample(torch.stack([row, row]), [neighbour, batched])[1] for row in logits]
    assert one == two and len(set(one)) > 3


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 4000

    def frequencies(**params):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=0, **params))
        counts = torch.bincount(torch.tensor([sampler.draw(probabilities.log()) for _ in range(draws)]), minlength=4)
        return counts / draws

    for params, want in (
        ({}, probabilities),
        ({"top_k": 2}, torch.tensor([0.625, 0.375, 0.0, 0.0])),
        ({"top_p": 0.6}, torch.tensor([0.625, 0.375, 0.0, 0.0])),
        ({"top_p": 0.81}, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95),
    ):
        spread = 4 * math.sqrt(0.25 / draws)
        torch.testing.assert_close(frequencies(**params), want, atol=spread, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.01},
        {"top_k": -1}, {"seed": 2**64}, {"stop": ("",)}, {"stop": ("x",) * 17}, {"stop": (3,)},
    ],
)  # fmt: skip
def test_illegal_parameters_are_named(bad):
    with pytest.raises(BadRequest, match=next(iter(bad)).replace("_", ".")):
        SamplingParams(**bad)
