"""A short run of the fuzz command, and proof that it would notice. The long one: `make fuzz`."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest

from sparsevila_cluster.core.errors import Internal
from sparsevila_cluster.media import DecoderSandbox, Media
from tests.media import fuzz, mutants

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_mutants_give_media_or_a_typed_error(tmp_path):
    tally, line = fuzz.fuzz(range(200), seed=20_26, save=tmp_path)
    assert not tally.violations, line
    assert tally.outcomes["media"] >= 20 and tally.outcomes["BadMedia"] >= 50 and sum(tally.outcomes.values()) == 200
    assert len(tally.by_seed) == len(mutants.seeds()) and not list(tmp_path.iterdir())


def test_whole_seeds_are_media():
    limits = fuzz.MediaLimits()
    with DecoderSandbox() as sandbox:
        for name, data in mutants.seeds().items():
            assert fuzz.attempt(data, 1, limits, sandbox) == ("media", None), name


def test_a_mutant_is_its_numbers():
    assert mutants.mutant(3, 17) == mutants.mutant(3, 17) != mutants.mutant(4, 17)
    ways = {mutants.mutant(0, number)[1] for number in range(200)}
    assert {way.__name__.strip("_") for way in mutants.WAYS} <= ways
    for way in mutants.WAYS:
        for size in (0, 1, 2, 20, 500):
            data = bytearray(size)
            way(data, random.Random(size), b"other")


def test_violations_are_found(monkeypatch, tmp_path):
    def broken(source, **options):
        if len(source.data) % 2:
            raise Internal("a bug")
        return Media(np.zeros((1, 2, 2, 3), np.uint8), np.array([-1.0]), "image", "", 0.0)

    monkeypatch.setattr(fuzz, "open_media", broken)
    tally, line = fuzz.fuzz(range(8), seed=0, save=tmp_path)
    assert len(tally.violations) == 8 == len(list(tmp_path.iterdir())) and "8 violations" in line
    assert any("Internal: a bug" in text for text in tally.violations) and any("times [-1.]" in text for text in tally.violations)
    assert fuzz.main(["--mutants", "2", "--save", str(tmp_path)]) == 1
