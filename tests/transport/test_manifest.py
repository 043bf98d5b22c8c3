"""The manifest survives its bytes, refuses damaged ones, and chunks tile every prefix."""

import math
import random
import struct
from dataclasses import replace

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import DataLoss, Incompatible
from sparsevila_cluster.kvcache.arena import Arena, KVSpec
from sparsevila_cluster.transport.chunks import ChunkBuffers, checksum
from sparsevila_cluster.transport.manifest import GRAIN_BYTES, STRAIGHT_BYTES, Chunk, Manifest, cut, layer_row_bytes
from tests.transport.transport_fixtures import BOUNDS, SPEC, assert_same_metadata, make_prefix, rows_equal

CONFIG = TransportConfig()
CPU = torch.device("cpu")


def manifest(**changes):
    return replace(Manifest.of(make_prefix(), "transfer-1", BOUNDS, CONFIG), **changes)


def repacked(**fields):
    return msgpack.packb({**msgpack.unpackb(manifest().pack()), **fields})


def spec_fields(**changes):
    return {**msgpack.unpackb(manifest().pack())["spec"], **changes}


def test_a_manifest_survives_its_bytes():
    before = manifest(quantization="int8", checksum=False)
    after = Manifest.unpack(before.pack())
    assert_same_metadata(after.metadata, before.metadata)
    assert {**vars(after), "metadata": None} == {**vars(before), "metadata": None}
    after.check(SPEC)


def test_a_prefix_is_made_again_from_its_manifest():
    sent = make_prefix()
    extent = Arena(SPEC, 1500).alloc(1500)
    for layer in range(SPEC.num_layers):
        for source, target in zip(sent.extent.rows(layer), extent.rows(layer), strict=True):
            target.copy_(source)
    made = Manifest.unpack(Manifest.of(sent, "t", BOUNDS, CONFIG).pack()).prefix(extent)
    assert rows_equal(sent, made) and torch.equal(made.other_index, sent.other_index)
    assert made.metadata.tenant == "someone" and made.num_kept == sent.num_kept and made.dense_kv_bytes == sent.dense_kv_bytes


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, fingerprint="model-b"),
        replace(SPEC, num_layers=4),
        replace(SPEC, num_kv_heads=1),
        replace(SPEC, head_dim=8),
        replace(SPEC, dtype=torch.bfloat16),
        replace(SPEC, layout_version=2),
    ],
)
def test_another_model_or_layout_is_incompatible(spec):
    with pytest.raises(Incompatible, match="this worker has"):
        manifest().check(spec)


def test_another_version_is_incompatible_whatever_else_it_says():
    with pytest.raises(Incompatible, match="version 1; this worker speaks 2"):
        Manifest.unpack(msgpack.packb({"version": 1, "something": "else"}))


@pytest.mark.parametrize(
    "fields",
    [
        {"length": 1499},
        {"length": 0},
        {"length": -1},
        {"length": "1500"},
        {"is_visual": b"\2" * 1500},
        {"is_visual": b"\1" * 1499},
        {"is_visual": "text"},
        {"positions": b"\xff" * (3 * 8 * 1500)},
        {"positions": b""},
        {"token_map": b"\x05\0\0\0" * 4500},
        {"grids": [[4, 6]]},
        {"grids": [[4]]},
        {"kind": "sound"},
        {"quantization": "int4"},
        {"num_visual": 3},
        {"chunks": []},
        {"chunks": [[0, 3, 0, 1500], [0, 3, 0, 1500]]},
        {"chunks": [[0, 3, 0, 1499]]},
        {"chunks": [[0, 4, 0, 1500]]},
        {"chunks": [[-1, 3, 0, 1500]]},
        {"chunks": [[0, 3, 700, 1500], [0, 3, 0, 700]]},
        {"chunks": [[0, 3]]},
        {"straight_bytes": -1},
        {"key": ""},
        {"spec": {}},
        {"spec": None},
        {"times_s": ["soon", "later"]},
        {"times_s": ["1", "2"]},
        {"times_s": [0.0, math.nan]},
        {"times_s": [0.0, -1.0]},
        {"duration_s": math.inf},
        {"duration_s": True},
        {"grids": [[4, 6], [2**40, 3]]},
        {"grids": [[4, 6], [0, 3]]},
        {"grids": [[4, 1], [2, 3]]},  # visual tokens stand in its second column
        {"token_map": b"\xff" * (3 * 4 * 1500)},  # visual tokens without a place
        {"frames": [0, -9]},
        {"media": [0, 2**40]},
        {"num_frames": 2**40},
        {"next_pos": 2**31},
        {"positions": struct.pack("<q", 2**40) * 4500},
        {"positions": b"\0" * (8 * 5 * 1500)},
        {"generation_floor": 2**40},
        {"checksum": 1},
        {"transfer_id": "x" * 257},
        {"kind": "x" * 5000},
        {"spec": spec_fields(num_layers=2**40)},  # a list of as many items would be made for it
        {"spec": spec_fields(num_kv_heads=2**40)},
        {"spec": spec_fields(head_dim=0)},
        {"spec": spec_fields(dtype="x" * 100_000)},
        {"chunks": [[0, 2**40, 0, 1500]]},
    ],
)
def test_a_manifest_that_contradicts_itself_is_data_loss(fields):
    with pytest.raises(DataLoss, match="malformed manifest") as caught:
        Manifest.unpack(repacked(**fields))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("version", [[[]] * 1000, "2" * 5000, True, 1.0, None])
def test_a_version_that_is_no_number_is_data_loss(version):
    with pytest.raises(DataLoss, match="no manifest") as caught:
        Manifest.unpack(msgpack.packb({"version": version}))
    assert len(str(caught.value)) < 500


def test_damaged_bytes_are_typed_errors_or_harmless():
    packed = manifest().pack()
    dice = random.Random(0)
    for _ in range(400):
        broken = bytearray(packed)
        what = dice.choice(["flip", "cut", "insert"])
        at = dice.randrange(len(broken))
        if what == "flip":
            broken[at] ^= 1 << dice.randrange(8)
        elif what == "cut":
            del broken[at:]
        else:
            broken[at:at] = dice.randbytes(3)
        try:
            Manifest.unpack(bytes(broken))
        except (DataLoss, Incompatible):
            pass


@given(
    length=st.integers(1, 5000),
    cuts=st.sets(st.integers(1, 4999)),
    chunk_kib=st.integers(64, 4096),
    layers=st.integers(1, 9),
    heads=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_chunks_tile_every_prefix(length, cuts, chunk_kib, layers, heads):
    spec = KVSpec(layers, heads, 64, torch.float32, "f")
    bounds = [0, *sorted(c for c in cuts if c < length), length]
    chunks = cut(spec, bounds, chunk_kib * 1024)
    seen = set()
    for chunk in chunks:
        assert chunk.kv_bytes(spec) <= max(chunk_kib * 1024, layer_row_bytes(spec))
        # What becomes final together with its first row: chunks never straddle two pieces of the prefill.
        assert any(a <= chunk.start and chunk.stop <= b for a, b in zip(bounds, bounds[1:], strict=False))
        places = {(layer, chunk.start, chunk.stop) for layer in range(chunk.first_layer, chunk.stop_layer)}
        assert not places & seen
        seen |= places
    assert sum(c.num_layers * c.num_rows for c in chunks) == layers * length
    assert sum(c.kv_bytes(spec) for c in chunks) == length * spec.bytes_per_token


def test_large_parts_travel_from_the_arena_itself():
    prefix = make_prefix()
    buffers = ChunkBuffers(Manifest.of(prefix, "t", BOUNDS, CONFIG), prefix.extent, CPU)
    long, short = Chunk(0, 1, 0, 1100), Chunk(0, 1, 1100, 1500)
    assert long.kv_bytes(SPEC) // 2 >= STRAIGHT_BYTES > short.kv_bytes(SPEC) // 2
    first = prefix.extent.rows(0)[0]
    assert buffers.gather(long)[0].data_ptr() == first.data_ptr() and len(buffers.gather(long)) == 2
    assert buffers.targets(long)[1].data_ptr() == prefix.extent.rows(0)[1].data_ptr()
    assert len(buffers.gather(short)) == 1
    whole = ChunkBuffers(Manifest.of(prefix, "t", BOUNDS, CONFIG).packed_whole(), prefix.extent, CPU)
    assert len(whole.gather(long)) == 1
    assert all(chunk.kv_bytes(SPEC) <= GRAIN_BYTES for chunk in cut(SPEC, BOUNDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_error_is_at_most_half_a_step(dtype):
    spec = replace(SPEC, dtype=dtype)
    source, target = make_prefix(spec=spec), make_prefix(seed=1, spec=spec)
    source.extent.rows(0)[0][3] = 0.0
    source.extent.rows(0)[1][4] *= 1000.0
    told = replace(Manifest.of(source, "t", BOUNDS, CONFIG), quantization="int8")
    out, back = ChunkBuffers(told, source.extent, CPU), ChunkBuffers(told, target.extent, CPU)
    for chunk in told.chunks:
        sent = out.gather(chunk)
        assert [one.numel() for one in sent] == out.sizes(chunk) == [one.numel() for one in back.targets(chunk)]
        back.scatter(chunk, sent)
    for layer in range(spec.num_layers):
        for before, after in zip(source.extent.rows(layer), target.extent.rows(layer), strict=True):
            step = before.float().abs().amax(-1, keepdim=True) / 127
            rounding = before.float().abs() * torch.finfo(dtype).eps
            assert ((before.float() - after.float()).abs() <= step * 0.5001 + rounding).all()
    assert (target.extent.rows(0)[0][3] == 0).all()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_int8_with_scales_that_are_no_numbers_is_data_loss(scale):
    source, target = make_prefix(), make_prefix(seed=1)
    told = replace(Manifest.of(source, "t", BOUNDS, CONFIG), quantization="int8")
    (sent,) = ChunkBuffers(told, source.extent, CPU).gather(told.chunks[0])
    sent[:4].view(torch.float32).fill_(scale)
    with pytest.raises(DataLoss, match="scales outside of"):
        ChunkBuffers(told, target.extent, CPU).scatter(told.chunks[0], [sent])
    assert rows_equal(target, make_prefix(seed=1))


@pytest.mark.parametrize("size", [1, 7, 511, 512, 513, 4096, 70001])
def test_a_checksum_sees_one_flipped_bit_and_moved_bytes(size):
    dice = torch.Generator().manual_seed(0)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=dice)
    right = checksum([data])
    assert right == checksum([data.clone()]) and 0 <= right < 2**64
    for at in {0, size // 2, size - 1}:
        for bit in (0, 7):
            wrong = data.clone()
            wrong[at] ^= 1 << bit
            assert checksum([wrong]) != right
    if size > 1024:
        assert checksum([data.roll(512)]) != right
    assert checksum([data[: size // 2], data[size // 2 :]]) != checksum([data[size // 2 :], data[: size // 2]])
    assert checksum([data[:-1]]) != right
