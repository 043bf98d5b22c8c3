"""What crosses between processes: everything a protocol names comes back equal, and anything else is refused."""

import dataclasses
import random
import types
import typing
from collections.abc import AsyncGenerator, Callable, Sequence
from enum import Enum
from typing import Any, Literal, Protocol

import msgpack
import pytest
from pydantic import BaseModel

from sparsevila_cluster.cluster.rpc.wire_types import pack, reader, unpack, wire_methods
from sparsevila_cluster.cluster.worker_api import DecodeWorkerApi, DirectoryApi, PrefillWorkerApi, RouterApi, methods_of
from sparsevila_cluster.core.errors import Incompatible, Internal, SparseVilaError
from sparsevila_cluster.core.evidence import Evidence
from sparsevila_cluster.core.requests import FinishReason, MediaHandle, Replay, SamplingParams, Turn, TurnEvent, TurnRecord

APIS = (PrefillWorkerApi, DecodeWorkerApi, DirectoryApi, RouterApi)
# What the classes check themselves: a random value of the annotated type need not pass.
CHOSEN = {
    SamplingParams: lambda rng: SamplingParams(
        max_tokens=rng.randint(1, 99), seed=rng.choice((None, -(2**63), 2**63 - 1)), stop=("é",)
    ),
    Replay: lambda rng: Replay(tuple(range(rng.randint(0, 5))), rng.random()),
    Turn: lambda rng: Turn("t", "c", "m", "Why?", CHOSEN[SamplingParams](rng), rng.choice((None, 0.5)), replay=CHOSEN[Replay](rng)),
    Evidence: lambda rng: Evidence(drawn(rng, tuple[typing.get_args(typing.get_type_hints(Evidence)["frames"])[0], ...])),
}


def drawn(rng, hint):
    """A random value of an annotated type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in CHOSEN:
        return CHOSEN[hint](rng)
    if origin in (typing.Union, types.UnionType):
        return drawn(rng, rng.choice(args))
    if origin is Literal:
        return rng.choice(args)
    if origin is tuple and args[-1] is not Ellipsis:
        return tuple(drawn(rng, arg) for arg in args)
    if origin in (tuple, Sequence):
        return tuple(drawn(rng, args[0]) for _ in range(rng.randint(0, 3)))
    if origin in (list, frozenset):
        return origin(drawn(rng, args[0]) for _ in range(rng.randint(0, 3)))
    if origin is dict:
        return {drawn(rng, args[0]): drawn(rng, args[1]) for _ in range(rng.randint(0, 3))}
    if hint in (type(None), Callable) or origin is Callable:
        return None
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{field.name: value_of(rng, hint, field.name, hints) for field in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, Enum):
        return rng.choice(list(hint))
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint()
    plain = {
        int: rng.randint(-5, 2**40),
        float: rng.random(),
        str: rng.choice(("", "é\U0001f600", "a b")),
        bytes: b"\0\xff",
        bool: True,
    }
    return {**plain, dict: {"a": [1, 2.5, None]}, Any: [1, "x", None, {"k": 2.5}]}[hint]


def value_of(rng, kind, name, hints):
    legal = {"fps": 2.0, "max_frames": 3, "prune_keep": 0.5, "deadline_s": 1.5}
    if name in legal:
        return legal[name]
    if name == "sources":
        return (drawn(rng, typing.get_args(hints[name])[0]),)
    return drawn(rng, hints[name])


@pytest.mark.parametrize("api", APIS)
def test_arguments_and_results_of_every_method_come_back_equal(api):
    rng = random.Random(0)
    for name in methods_of(api):
        method, hints = wire_methods(api)[name], typing.get_type_hints(getattr(api, name))
        result = hints.pop("return")
        if typing.get_origin(result) is not None and typing.get_origin(result).__name__ == "AsyncGenerator":
            result = typing.get_args(result)[0]
        for _ in range(50):
            given = tuple(drawn(rng, hint) for hint in hints.values())
            assert method.read_arguments(unpack(pack(given))) == given, name
            answer = drawn(rng, result)
            again = method.result(unpack(pack(answer)))
            assert again == answer and type(again) is type(answer), name


def test_a_turn_and_its_events_keep_their_types():
    ask = wire_methods(DecodeWorkerApi)["ask"]
    turn = Turn("t", "c", "m", "What?", SamplingParams(stop=("a", "b")), replay=Replay((1, 2), 0.5))
    record = TurnRecord(turn, (1, 2))
    assert ask.read_arguments(unpack(pack((turn, [record])))) == (turn, (record,))
    (event,) = ask.result(unpack(pack([TurnEvent("done", "t", finish_reason=FinishReason.LENGTH)])))
    assert event.finish_reason is FinishReason.LENGTH and event.token_ids == () and event.evidence == Evidence()
    assert type(ask.read_arguments(unpack(pack((dataclasses.replace(turn, deadline_s=1), None))))[0].deadline_s) is int


def test_what_differs_from_a_default_only_by_its_type_is_sent():
    @dataclasses.dataclass(frozen=True)
    class One:
        number: float | bool = 1.0

    assert [reader(One)(unpack(pack(One(value)))).number for value in (1.0, True, 2.0)] == [1.0, True, 2.0]
    assert reader(One)(unpack(pack(One(True)))).number is True


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (int, "1", "expected int, got str"),
        (int, True, "expected int, got bool"),
        (float, "1", "expected float, got str"),
        (str, b"x", "expected str, got bytes"),
        (str | None, 1, "expected str, got int"),
        (tuple[int, ...], {"a": 1}, "expected an array, got dict"),
        (tuple[int, str], [1], "expected 2 items, got 1"),
        (dict[str, int], [1], "expected a map, got list"),
        (Literal["a", "b"], "c", r"expected one of \['a', 'b'\], got 'c'"),
        (Literal["a", "b"], ["a"], "expected one of"),
        (FinishReason, "never", "never"),
        (Turn, [], "expected a Turn, got list"),
        (Turn, {"turn_id": "t"}, "no Turn: .*missing"),
        (Turn, {"__class__": "x"}, "a Turn has no '__class__'"),
        (Turn, {"question": 5}, "expected str, got int"),
        (Turn, {b"question": "x"}, "a Turn has no b'question'"),
    ],
)
def test_what_the_protocol_does_not_say_is_refused(hint, value, message):
    with pytest.raises(Incompatible, match=message):
        reader(hint)(unpack(pack(value)))


def test_arguments_are_counted():
    ask = wire_methods(DecodeWorkerApi)["ask"]
    for values in ([], [1, 2, 3], {}, None):
        with pytest.raises(Incompatible, match="ask takes 2 to 2 arguments"):
            ask.read_arguments(values)

    class WithDefault(Protocol):
        def count(self, num: int, pause_s: float = 0.0, /) -> AsyncGenerator[int, None]: ...

    count = wire_methods(WithDefault)["count"]
    assert count.read_arguments([3]) == (3,) and count.read_arguments([3, 0.5]) == (3, 0.5)


@pytest.mark.parametrize("value", [object(), Evidence(draw=lambda evidence: None), 2**70, {"a": {1j}}])
def test_what_no_protocol_could_name_is_not_sent(value):
    with pytest.raises(Internal, match="cannot be sent"):
        pack(value)


def test_a_protocol_that_cannot_be_carried_is_found_when_it_is_read():
    with pytest.raises(TypeError, match="cannot carry"):
        reader(complex)


def test_file_names_in_no_encoding_travel():
    assert unpack(pack("/clip\udcff.mp4")) == "/clip\udcff.mp4"


@pytest.mark.parametrize("seed", range(8))
def test_mutated_messages_are_read_or_refused(seed):
    """Nothing but what the annotations say comes out, and nothing but typed errors."""
    rng = random.Random(seed)
    methods = [(api, name) for api in APIS for name in methods_of(api)]
    num_read = 0
    for _ in range(1500):
        api, name = rng.choice(methods)
        hints = typing.get_type_hints(getattr(api, name))
        hints.pop("return")
        data = bytearray(pack(tuple(drawn(rng, hint) for hint in hints.values())))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            data[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        try:
            arguments = wire_methods(api)[name].read_arguments(unpack(bytes(data)))
        except SparseVilaError:
            continue
        num_read += 1
        for argument, hint in zip(arguments, hints.values(), strict=False):
            if hint in (str, int, bytes) or dataclasses.is_dataclass(hint):
                assert isinstance(argument, hint)
    assert num_read > 20


def test_nesting_has_a_bound():
    with pytest.raises(Incompatible):
        unpack(b"\x91" * 100_000 + b"\x00")


def test_handles_come_without_what_only_their_maker_has():
    handle = MediaHandle("m" * 64, "video", 2, 1.0, 4, 2, 5, 10, 20, ms={"decode": 1.5})
    packed = msgpack.unpackb(pack(handle))
    assert "origin" not in packed and "reused" not in packed and packed["ms"] == {"decode": 1.5}
