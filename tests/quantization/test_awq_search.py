"""The searches of 4-bit rounding against loops over everything that they could have chosen."""

import itertools

import pytest
import torch

from sparsevila_cluster.quantization.awq_search import encode, rounded, scale_candidates, search_clip, search_scale


def plain_round(group, limit=None):
    """One group, number by number, in Python: f16 scale, range that holds 0."""
    values = [min(max(v, -limit), limit) if limit is not None else v for v in group.tolist()]
    span = max(*values, 0.0) - min(*values, 0.0)
    scale = float(torch.tensor(max(span / 15, 1e-5)).half())
    zero = min(max(-round(min(*values, 0.0) / scale), 0), 15)
    return [(min(max(round(v / scale) + zero, 0), 15) - zero) * scale for v in values]


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["normal", "positive", "negative", "zero", "outlier"])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_rounding_is_that_of_each_group_alone(kind, limit):
    w = weights(4, 16)
    w = {"normal": w, "positive": w.abs() + 0.5, "negative": -w.abs() - 0.5, "zero": w * 0, "outlier": w.clone()}[kind]
    if kind == "outlier":
        w[:, 3] = 40
    limits = None if limit is None else torch.full((4, 2), limit)
    expected = torch.tensor([[v for half in row.split(8) for v in plain_round(half, limit)] for row in w])
    torch.testing.assert_close(rounded(w, 8, limits), expected, atol=1e-5, rtol=1e-5)
    codes = encode(w, 8, limits)
    torch.testing.assert_close(codes.dequantize(), expected, atol=1e-5, rtol=1e-5)
    assert codes.scales.dtype == torch.float16 and int(codes.codes.max()) <= 15 and int(codes.zeros.max()) <= 15


def test_a_group_of_one_sign_keeps_its_values():
    w = weights(8, 32).abs() + 0.5
    assert (rounded(w, 32) - w).norm() < 0.06 * w.norm()
    torch.testing.assert_close(rounded(torch.full((8, 32), 0.25), 32), torch.full((8, 32), 0.25), atol=1e-3, rtol=0)


def test_rounding_errors_are_half_a_step_at_most():
    w = weights(16, 64, seed=3)
    codes = encode(w, 16)
    steps = codes.scales.float().repeat_interleave(16, 1)
    assert ((codes.dequantize() - w).abs() <= 0.5005 * steps + 1e-6).float().mean() > 0.95


@pytest.mark.parametrize("num_steps", [4, 10])
def test_the_best_scale_of_all_is_found(num_steps):
    w = [weights(8, 16, seed=i) for i in range(2)]
    x = weights(50, 16, seed=9) * torch.logspace(-1, 1, 16)
    activity = x.abs().mean(0)

    def error(replaced):
        return sum(float(((x @ (a - b).T) ** 2).sum()) for a, b in zip(replaced, w, strict=True))

    errors = {None: error([rounded(one, 8) for one in w])}
    for i, s in enumerate(scale_candidates(w, activity, 8, num_steps)):
        errors[i] = error([rounded(one * s, 8) / s for one in w])
    assert len(errors) == num_steps + 2
    best = min(errors, key=errors.get)
    found = search_scale(w, activity, 8, error, num_steps)
    assert best is not None, "the test wants outliers that a scale helps with"
    torch.testing.assert_close(found, list(scale_candidates(w, activity, 8, num_steps))[best])


def test_no_scale_where_none_helps():
    """A weight that 4 bits hold exactly."""
    codes = torch.randint(0, 16, (8, 16), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0], codes[:, 8], codes[:, 1], codes[:, 9] = 0, 0, 15, 15
    w = (codes - 8) * 0.125
    x = weights(40, 16, seed=2) * torch.linspace(0.5, 2, 16)
    error = lambda replaced: float(((x @ (replaced[0] - w).T) ** 2).sum())  # noqa: E731
    assert search_scale([w], x.abs().mean(0), 8, error) is None
    assert error([rounded(w, 8)]) < 1e-9


def test_a_scale_is_judged_as_it_will_be_stored():
    w, x = weights(8, 16), weights(50, 16, seed=4) * torch.logspace(-1, 1, 16)
    coarse = lambda s: 2.0 ** torch.round(torch.log2(s))  # noqa: E731
    error = lambda replaced: float(((x @ (replaced[0] - w).T) ** 2).sum())  # noqa: E731
    found = search_scale([w], x.abs().mean(0), 8, error, as_stored=coarse)
    assert torch.equal(found, coarse(found))


def test_silent_channels_and_dead_weights_scale_to_something_finite():
    w = weights(8, 16)
    w[:, 5] = 0
    activity = torch.ones(16)
    activity[3] = 0
    for scale in scale_candidates([w], activity, 8, 4):
        assert torch.isfinite(scale).all() and (scale > 0).all()


def test_the_best_limit_of_each_group_is_found():
    w, x = weights(3, 16, seed=5), weights(30, 16, seed=6)
    w[1, 2] = 9.0
    limits = search_clip(w, x, 8, num_steps=10)
    assert limits.shape == (3, 2)
    for n, g in itertools.product(range(3), range(2)):
        group, rows = w[n, 8 * g : 8 * g + 8], x[:, 8 * g : 8 * g + 8]
        top = float(group.abs().max())
        errors = {}
        for i in range(5):
            got = torch.tensor(plain_round(group, top * (1 - i / 10)))
            errors[top * (1 - i / 10)] = float(((rows @ (got - group)) ** 2).sum())
        assert errors[min(errors, key=lambda limit: abs(limit - float(limits[n, g])))] <= min(errors.values()) * 1.001


def test_more_rows_than_are_searched_at_once_are_searched_alike():
    w, x = weights(300, 16, seed=7), weights(20, 16, seed=8)
    torch.testing.assert_close(search_clip(w, x, 8)[280:], search_clip(w[280:], x, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e7])
def test_values_that_no_scale_holds_are_refused(bad):
    w = weights(8, 16)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="float16"):
        encode(w, 8)


def test_a_group_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group_size 12 does not divide 16"):
        encode(weights(8, 16), 12)
