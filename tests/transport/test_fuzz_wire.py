"""A short run of the wire's fuzzer, and proof that it would notice. The long one: `make fuzz-wire`."""

import random
import sys
from dataclasses import replace
from itertools import count, islice

import pytest

from sparsevila_cluster.core.errors import DataLoss
from sparsevila_cluster.transport.channel import Channel
from sparsevila_cluster.transport.incoming_transfer import IncomingTransfer
from sparsevila_cluster.transport.manifest import Manifest
from tests.transport import fuzz_wire
from tests.transport.wire_scripts import Step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def numbers_of(kind, seed, num):
    """The first cases of a kind."""
    return list(islice((n for n in count() if fuzz_wire.kind_of(random.Random(f"{seed}-{n}")) == kind), num))


def test_broken_transfers_are_typed_errors_or_what_was_sent():
    few = {number for kind in fuzz_wire.KINDS for number in numbers_of(kind, 20_26, 3)}
    tally, line = fuzz_wire.fuzz(sorted({*range(200), *few}), seed=20_26)
    assert not tally.violations, (line, tally.violations)
    assert set(tally.outcomes) == set(fuzz_wire.KINDS)
    assert tally.outcomes["manifest"]["DataLoss"] >= 50 and tally.outcomes["manifest"]["manifest"] >= 10


def run(numbers, kind):
    return fuzz_wire.fuzz(numbers, 0, kinds=(kind,))[0]


def test_an_error_without_a_type_is_a_violation(monkeypatch):
    def raises(packed):
        raise KeyError("spec")

    monkeypatch.setattr(Manifest, "unpack", staticmethod(raises))
    tally = run(range(5), "manifest")
    assert len(tally.violations) == sum(tally.outcomes["manifest"].values()) > 0
    assert "KeyError: 'spec'" in tally.violations[0] and "seed 0 number" in tally.violations[0]


def test_memory_for_what_never_came_is_a_violation(monkeypatch):
    def greedy(packed):
        bytearray(97 * 2**20)
        raise DataLoss("no manifest")

    monkeypatch.setattr(Manifest, "unpack", staticmethod(greedy))
    assert "are allowed" in run(range(2), "manifest").violations[0]


@pytest.fixture
def one_case(monkeypatch):
    """The violations of one transfer in process, whose script was changed like this."""

    def play(change, kind="inproc"):
        monkeypatch.setattr(fuzz_wire, "broken_script", lambda dice, steps, others, any_bulk=True: (change(steps), "changed", True))
        return run(numbers_of(kind, 0, 3), kind).violations

    return play


def damaged(steps):
    at = next(i for i, step in enumerate(steps) if step.name == "bulk")
    parts = [part.clone() for part in steps[at].parts]
    parts[0][0] ^= 1
    return [*steps[:at], replace(steps[at], parts=parts), *steps[at + 1 :]]


def test_a_sound_script_is_no_violation(one_case):
    assert not one_case(list)
    assert not one_case(damaged)


def test_published_damage_is_a_violation(one_case, monkeypatch):
    wait = IncomingTransfer.wait_for_chunk
    monkeypatch.setattr(IncomingTransfer, "wait_for_chunk", lambda *given: wait(*given) or True)
    assert any("published what was not sent" in one for one in one_case(damaged))


def test_a_thread_that_dies_is_a_violation(one_case, monkeypatch):
    receive = Channel.receive

    def receive_or_die(self, within_s):
        message = receive(self, within_s)
        if message.body.get("upto") == 77:
            raise ZeroDivisionError("a bug")
        return message

    monkeypatch.setattr(Channel, "receive", receive_or_die)

    def grant(steps):
        steps = list(steps)
        at = next(i for i, step in enumerate(steps) if step.name == "grant")
        steps.insert(at, Step("grant", {**steps[at].body, "upto": 77}))
        return steps

    assert any("ended by ZeroDivisionError" in one for one in one_case(grant, "replies"))


def test_the_command_names_what_it_found(monkeypatch, capsys):
    monkeypatch.setattr(Manifest, "unpack", staticmethod(lambda packed: 1 / 0))
    assert fuzz_wire.main(["--cases", "3", "--kind", "manifest"]) == 1
    out = capsys.readouterr().out
    assert "VIOLATION manifest, seed 0 number" in out and out.splitlines()[-1].startswith("fuzz-wire: ")
    monkeypatch.undo()
    assert fuzz_wire.main(["--only", "2", "--kind", "manifest"]) == 0
