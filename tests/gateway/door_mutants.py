"""Calls and HTTP/2 connections that are almost right, each made from a seed and a number alone."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from google.protobuf.descriptor import FieldDescriptor

from benchmarks.lib import http2_frames as h2
from sparsevila_cluster.pb import video_qa_pb2 as pb

METHODS = pb.DESCRIPTOR.services_by_name["VideoQA"].methods
KEYLESS = (
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
INTS = (0, 1, 2, 63, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
DOUBLES = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    b"",
    b"\xed\xa0\x80",
    b"\xff\xfe",
    b"\0",
    b"a\nb",
    b"../../etc/passwd",
    "e\u0301 \u202e \U0001f600".encode(),
    b"%s%n{}",
    b" ",
)
VARINT, I64, LEN, GROUP, END_GROUP, I32 = range(6)


@dataclass
class Known:
    """What valid calls may name."""

    media_id: str = "0" * 64
    clip: bytes = b""


@dataclass
class Field:
    """One field on the wire. A message within is a list of its fields, all else is the bytes behind the tag."""

    number: int
    wire: int
    value: list[Field] | bytes

    def __bytes__(self) -> bytes:
        tag = varint(self.number << 3 | self.wire)
        if isinstance(self.value, bytes):
            return tag + (varint(len(self.value)) + self.value if self.wire == LEN else self.value)
        data = b"".join(map(bytes, self.value))
        return tag + (varint(len(data)) + data if self.wire == LEN else data)


@dataclass
class Case:
    """One thing to send. frames: a connection by hand, `path` otherwise with its messages."""

    number: int
    what: str
    path: str = ""
    messages: tuple[bytes, ...] = ()
    frames: bytes = b""
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    mutations: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.what}: {', '.join(self.mutations) or 'as it is'}"


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def case_of(seed: int, number: int, known: Known) -> Case:
    """The case of this number: 5 of 6 are messages, the others frames."""
    rng = random.Random(f"{seed}-{number}")
    return _frames(rng, number, known) if number % 6 == 5 else _call(rng, number, known)


# ---- messages ------------------------------------------------------------------------------------------------------------


def valid(rng: random.Random, method: str, known: Known) -> list[bytes]:
    """Messages of a call that could succeed."""
    number = rng.randrange(8)
    if method == "UploadMedia":
        chunks = [pb.MediaChunk(data=rng.randbytes(rng.choice((1, 100, 5000))), kind=rng.choice(("", "auto", "image")))]
        chunks += [pb.MediaChunk(data=b"more", file_name="a.mp4") for _ in range(rng.randrange(3))]
        return [chunk.SerializeToString() for chunk in chunks]
    made: object
    if method == "PrepareMedia":
        url = rng.choice(("data:image/png;base64,AAAA", "https://127.0.0.1:1/x.mp4", "http://[::1]/x"))
        ways = (dict(inline=known.clip), dict(upload_id="0" * 32), dict(url=url), dict(file="clip.mp4"), dict(inline=b"no media"))
        num = rng.choice((1, 1, 1, 2))
        sources = [pb.MediaSource(**rng.choice(ways), kind=rng.choice(("", "auto", "video", "image"))) for _ in range(num)]
        made = pb.PrepareMediaRequest(sources=sources, fps=rng.choice((1.0, 2.0)), max_frames=rng.choice((1, 2)), prune_keep=0.5)
    elif method in ("Ask", "Answer"):
        made = pb.AskRequest(
            media_id=known.media_id, question=f"what is {number}?", want_evidence=bool(rng.randrange(2)),
            sampling=pb.Sampling(max_tokens=rng.randrange(1, 4), temperature=0.0, top_p=0.9, top_k=5, seed=number, stop=["x"]),
            retrieval=pb.Retrieval(keep=0.5, mass=0.9, refresh_every=1), turn_id="" if rng.randrange(3) else f"turn-{rng.random()}",
            said_token_ids=[5] if rng.randrange(4) == 0 else [], said_brownout=0.0,
        )  # fmt: skip
    elif method == "GetMedia":
        made = pb.GetMediaRequest(media_id=known.media_id)
    elif method == "DeleteMedia":
        made = pb.DeleteMediaRequest(media_id="1" * 64)
    elif method == "Abort":
        made = pb.AbortRequest(turn_id=f"turn-{number}")
    elif method == "CloseConversation":
        made = pb.CloseConversationRequest(conversation_id=f"c-{number}")
    else:
        made = pb.GetServerInfoRequest()
    return [made.SerializeToString()]  # type: ignore[attr-defined]


def tree(descriptor, data: bytes) -> list[Field]:
    """The fields of a valid message, in the order of the wire."""
    fields, at = [], 0
    by_number = {f.number: f for f in descriptor.fields}
    while at < len(data):
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            begun = at
            _, at = _read_varint(data, at)
            value: list[Field] | bytes = data[begun:at]
        elif wire == LEN:
            size, at = _read_varint(data, at)
            value, at = data[at : at + size], at + size
            known = by_number.get(number)
            if known is not None and known.type == FieldDescriptor.TYPE_MESSAGE:
                value = tree(known.message_type, value)
        else:
            size = 8 if wire == I64 else 4
            value, at = data[at : at + size], at + size
        fields.append(Field(number, wire, value))
    return fields


def mutate(rng: random.Random, descriptor, data: bytes, said: list[str]) -> bytes:
    """`data` with one to three things wrong."""
    fields = tree(descriptor, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, at = rng.choice([*_places(fields)]) if fields else (fields, -1)
        if at < 0 or rng.randrange(10) == 0:
            place.append(_unknown(rng))
            said.append("an unknown field")
        else:
            _mutate_field(rng, place, at, said)
    out = b"".join(map(bytes, fields))
    way = rng.randrange(20)
    if way == 0 and out:
        out = out[: rng.randrange(len(out))]
        said.append("truncated")
    elif way == 1 and out:
        at = rng.randrange(len(out))
        out = out[:at] + bytes([out[at] ^ 1 << rng.randrange(8)]) + out[at + 1 :]
        said.append("a flipped bit")
    elif way == 2:
        out += rng.randbytes(rng.randrange(1, 64))
        said.append("garbage behind")
    return out


def _mutate_field(rng: random.Random, place: list[Field], at: int, said: list[str]) -> None:
    one = place[at]
    name = f"field {one.number}"
    way = rng.randrange(8)
    if way == 0:
        del place[at]
        said.append(f"no {name}")
    elif way == 1:
        times = rng.choice((1, 1, 2, 20, 1000)) if len(bytes(one)) < 200 else 1
        place[at:at] = [one] * times
        said.append(f"{name} {times + 1} times")
    elif way == 2:
        wire = rng.choice((VARINT, I64, LEN, GROUP, END_GROUP, I32, 6, 7))
        place[at] = Field(one.number, wire, {I64: bytes(8), I32: bytes(4), VARINT: b"\x01"}.get(wire, bytes(one)))
        said.append(f"{name} of wire type {wire}")
    elif way == 3:
        place[at] = Field(one.number, LEN, rng.randbytes(rng.choice((0, 1, 10, 300))))
        said.append(f"{name} is garbage")
    elif isinstance(one.value, list):
        nested: list[Field] = []
        for _ in range(rng.choice((1, 50, 99, 101, 2000))):
            nested = [Field(one.number, LEN, b"".join(map(bytes, nested)))]
        place[at] = nested[0]
        said.append(f"{name} nested")
    elif one.wire == VARINT:
        value = rng.choice(INTS)
        place[at] = Field(one.number, VARINT, varint(value))
        said.append(f"{name} = {value}")
    elif one.wire == I64:
        number = rng.choice(DOUBLES)
        place[at] = Field(one.number, I64, struct.pack("<d", number))
        said.append(f"{name} = {number}")
    elif one.wire == LEN:
        assert isinstance(one.value, bytes)
        size = rng.choice((0, 0, 0, 0, 201, 513, 4097, 66_000)) if rng.randrange(200) else 1_100_000
        text = (rng.choice((b"x", b"word ", "é".encode())) * size)[:size] if size else rng.choice(TEXTS)
        place[at] = Field(one.number, LEN, text if rng.randrange(2) else one.value + text)
        said.append(f"{name} with {len(text)} bytes {text[:12]!r}")


def _unknown(rng: random.Random) -> Field:
    number, wire = rng.choice((0, 15, 16, 999, 2**29 - 1)), rng.choice((VARINT, I64, LEN, I32))
    value = {VARINT: varint(rng.choice(INTS)), I64: rng.randbytes(8), I32: rng.randbytes(4), LEN: rng.randbytes(rng.randrange(40))}
    return Field(number, wire, value[wire])


def _places(fields: list[Field]) -> Iterator[tuple[list[Field], int]]:
    for at, one in enumerate(fields):
        yield fields, at
        if isinstance(one.value, list):
            yield from _places(one.value)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def _call(rng: random.Random, number: int, known: Known) -> Case:
    if rng.randrange(40) == 0:
        path = rng.choice((*KEYLESS, h2.SERVICE + "NoSuchMethod", "/", "/no.Service/Method", "x"))
        return Case(number, path, path, tuple(rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(3))))
    method = rng.choice(METHODS)
    case = Case(number, method.name, h2.SERVICE + method.name)
    messages = valid(rng, method.name, known)
    at = rng.randrange(len(messages))
    if rng.randrange(20):
        messages[at] = mutate(rng, method.input_type, messages[at], case.mutations)
    if rng.randrange(50) == 0:
        messages = rng.choice(([], messages * 2))
        case.mutations.append(f"{len(messages)} messages")
    case.messages = tuple(messages)
    if rng.randrange(30) == 0:
        bad = (
            ("authorization", "Bearer nobody"),
            ("authorization", ""),
            ("authorization", "Bearer " + "x" * 3000),
            ("x-a-bin", b"\0\xff"),
        )
        case.metadata = (rng.choice(bad),)
        case.mutations.append(f"metadata {case.metadata[0][0]}")
    return case


# ---- frames --------------------------------------------------------------------------------------------------------------


def _frames(rng: random.Random, number: int, known: Known) -> Case:
    case = Case(number, "frames")
    method = rng.choice(METHODS)
    data = valid(rng, method.name, Known(clip=known.clip))[0]  # media that nobody has: what is answered here, nobody reads
    head = h2.fields(method.name, ("authorization", "Bearer fuzz"))
    for _ in range(rng.choice((0, 1, 1, 2))):
        _mutate_head(rng, head, case.mutations)
    block, body = h2.hpack(head), h2.message(data)
    if rng.randrange(4) == 0:
        at = rng.randrange(len(block))
        block = rng.choice(
            (block[:at], block[:at] + rng.randbytes(3) + block[at:], rng.randbytes(60), b"\x80" + block, b"\x3f\xff\xff\xff\x0f")
        )
        case.mutations.append("a broken header block")
    if rng.randrange(4) == 0:
        size = rng.choice((0, 1, len(data) + 1, 2**31, 2**32 - 1))
        body = rng.choice(
            (b"\1" + body[1:], b"\xff" + body[1:], b"\0" + struct.pack(">I", size) + data, body[:3], body + b"\0", body * 2, b"")
        )
        case.mutations.append("a broken message prefix")
    frames = [
        h2.Frame(h2.SETTINGS, 0, 0, b""),
        h2.Frame(h2.HEADERS, h2.END_HEADERS, 1, block),
        h2.Frame(h2.DATA, h2.END_STREAM, 1, body),
    ]
    for _ in range(rng.choice((1, 1, 2, 4))):
        frames = _mutate_frames(rng, frames, case.mutations)
    out = h2.PREFACE + b"".join(map(bytes, frames))
    way = rng.randrange(20)
    if way == 0:
        out = out[: rng.randrange(len(out))]
        case.mutations.append("truncated")
    elif way == 1:
        at = rng.randrange(len(out))
        out = out[:at] + rng.randbytes(2) + out[at + 2 :]
        case.mutations.append("two wrong bytes")
    elif way == 2:
        out = rng.choice(
            (rng.randbytes(500), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(200), h2.PREFACE * 3)
        )
        case.mutations.append("no HTTP/2")
    case.frames = out
    return case


def _mutate_head(rng: random.Random, head: list, said: list[str]) -> None:
    way = rng.randrange(6)
    at = rng.randrange(len(head)) if head else 0
    if way == 0 and head:
        said.append(f"no {head[at][0]}")
        del head[at]
    elif way == 1 and head:
        head.insert(at, head[at])
        said.append(f"{head[at][0]} twice")
    elif way == 2 and head:
        value = rng.choice((b"", b"\0", b"\xff" * 10, b"x" * 20_000, b"a\r\nb: c", b"POST", b"/"))
        head[at] = (head[at][0], value)
        said.append(f"{head[at][0]} = {value[:12]!r}")
    elif way == 3:
        value = rng.choice((b"", b"1", b"-1n", b"99999999S", b"1n", b"9" * 30 + b"S", b"1H"))
        head.append(("grpc-timeout", value))
        said.append(f"grpc-timeout {value!r}")
    elif way == 4:
        name = rng.choice(
            ("grpc-encoding", "content-encoding", "grpc-accept-encoding", "connection", "transfer-encoding", "content-length")
        )
        head.append((name, rng.choice((b"gzip", b"identity", b"none such", b"", b"-1"))))
        said.append(name)
    else:
        name = rng.choice((b"X-Upper", b"", b":unknown", b"a b", b"\xff", b"x-bin", b"sparsevila-failure-bin", b"grpc-status"))
        head.insert(rng.randrange(len(head) + 1), (name, rng.choice((b"!!", b"", b"AAA=", b"\0\1"))))
        said.append(f"header {name!r}")


def _mutate_frames(rng: random.Random, frames: list[h2.Frame], said: list[str]) -> list[h2.Frame]:
    way, at = rng.randrange(9), rng.randrange(len(frames))
    one = frames[at]
    if way == 0:
        said.append(f"no frame {at}")
        return frames[:at] + frames[at + 1 :] or frames
    if way == 1:
        times = rng.choice((1, 1, 20))
        said.append(f"frame {at} {times + 1} times")
        return frames[:at] + [one] * times + frames[at:]
    if way == 2:
        kind, flags = rng.randrange(12), rng.choice((0, 1, 4, 5, 8, 0x20, 0xFF))
        said.append(f"frame {at} of type {kind} with flags {flags}")
        return [*frames[:at], h2.Frame(kind, flags, one.stream, one.payload), *frames[at + 1 :]]
    if way == 3:
        stream = rng.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1))
        said.append(f"frame {at} on stream {stream}")
        return [*frames[:at], h2.Frame(one.kind, one.flags, stream, one.payload), *frames[at + 1 :]]
    if way == 4:
        said.append("reset")
        return [*frames, h2.Frame(h2.RST_STREAM, 0, one.stream, struct.pack(">I", rng.choice((0, 8, 2**32 - 1))))]
    if way == 5:
        size = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1))
        said.append(f"window update {size}")
        return [*frames[:at], h2.Frame(h2.WINDOW_UPDATE, 0, rng.choice((0, 1, 5)), struct.pack(">I", size)), *frames[at:]]
    if way == 6:
        pairs = b""
        for _ in range(rng.randrange(5)):
            name, value = rng.choice((0, 1, 2, 3, 4, 5, 6, 0xFE03)), rng.choice((0, 1, 2**14, 2**24, 2**31, 2**32 - 1))
            pairs += struct.pack(">HI", name, value)
        said.append("settings")
        return [*frames[:at], h2.Frame(h2.SETTINGS, rng.choice((0, 0, 1)), 0, pairs[: rng.choice((len(pairs), 5))]), *frames[at:]]
    if way == 7:
        kind = rng.choice((h2.PING, h2.GOAWAY, h2.PUSH_PROMISE, h2.PRIORITY, h2.CONTINUATION, 0x20))
        said.append(f"a frame of type {kind}")
        flags, stream, num_bytes = rng.choice((0, 1, 4)), rng.choice((0, 1)), rng.choice((0, 4, 5, 8, 16))
        return [*frames[:at], h2.Frame(kind, flags, stream, rng.randbytes(num_bytes)), *frames[at:]]
    said.append("split headers")
    cut = len(one.payload) // 2
    rest = h2.Frame(h2.CONTINUATION, h2.END_HEADERS, one.stream, one.payload[cut:])
    return [*frames[:at], h2.Frame(one.kind, one.flags & ~h2.END_HEADERS, one.stream, one.payload[:cut]), rest, *frames[at + 1 :]]
