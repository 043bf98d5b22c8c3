"""W4A16 products on every path against the dequantized weight in fp64; a weight keeps its numbers in every layout."""

import pytest
import torch

from sparsevila_kernels import AwqWeight, _awq_triton, awq_matmul, awq_weight, dequantize_gemm, pack, reference
from tests.kernels.kernel_accuracy import assert_as_exact_as_torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of the error of dequantizing to x's dtype and multiplying in it. Our kernels round no weight; torch's operator rounds scales
# and offsets instead.
RATIO = {F32: 2.0, F16: 1.0, BF16: 1.5}
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def random_tensors(num_in, num_out, group, scales=F16):
    """What a checkpoint holds. Zeros of any size: groups of one sign as well."""
    codes = torch.randint(0, 16, (num_in, num_out), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (num_in // group, num_out), dtype=torch.uint8)
    return pack(codes), pack(zeros), (torch.rand(num_in // group, num_out) * 0.02 + 0.001).to(scales)


def make(place, num_in, num_out, group, scales=F16):
    tensors = [t.to(place.device) for t in random_tensors(num_in, num_out, group, scales)]
    return AwqWeight.from_gemm(*tensors, layout="planes" if place.backend == "triton" else "auto")


def check(place, x, weight, bias=None):
    found = awq_matmul(x, weight, bias, backend=place.backend)
    assert found.dtype == x.dtype and found.device == x.device and found.is_contiguous()
    exact, plain = reference.awq_matmul(x, weight, bias), reference.awq_matmul(x, weight, bias, dtype=x.dtype)
    assert_as_exact_as_torch([found], [exact], [plain], {"product": RATIO[x.dtype]}, dtype=x.dtype)
    return found


# K, N, group: one group; padded K; a group in one plane, two, four, several spans; N of one word and ragged.
SHAPES = [
    (128, 64, 128),
    (96, 8, 32),
    (320, 40, 64),
    (896, 72, 128),
    (36, 16, 36),
    (512, 136, 256),
    (1536, 24, 512),
    (288, 200, 32),
]


@pytest.mark.parametrize("num_in, num_out, group", SHAPES)
@pytest.mark.parametrize("num_rows, dtype", [(1, BF16), (13, F16), (13, F32), (67, BF16)])
def test_product(place, num_in, num_out, group, dtype, num_rows):
    weight = make(place, num_in, num_out * place.scale, group)
    x = torch.randn(num_rows, num_in).to(place.device, dtype)
    check(place, x, weight, torch.randn(num_out * place.scale).to(place.device, dtype) if num_rows > 1 else None)


@pytest.mark.parametrize("scales", [BF16, F32])
@pytest.mark.parametrize("num_rows", [2, 17, 131])
def test_scales_of_any_float(place, scales, num_rows):
    check(place, torch.randn(num_rows, 256, device=place.device).bfloat16(), make(place, 256, 72, 64, scales))


@pytest.mark.parametrize("num_rows", [1, 3, 50, 150])
@pytest.mark.parametrize("num_in", [256, 1280])
def test_onto_a_residual(place, num_rows, num_in):
    weight, wide = make(place, num_in, 72, 128), torch.randn(num_rows, 80, device=place.device).bfloat16()
    before = wide.clone()
    check(place, torch.randn(num_rows, num_in, device=place.device).bfloat16(), weight, wide[:, 8:])
    assert torch.equal(wide, before)


def test_groups_that_no_kernel_reads(place):
    weight = make(place, 144, 24, 48)
    x = torch.randn(3, 144, device=place.device).bfloat16()
    if place.backend == "triton":
        with pytest.raises(ValueError, match="groups of 48"):
            awq_matmul(x, weight, backend="triton")
    else:
        check(place, x, weight)


def test_rows_with_a_stride(place):
    weight = make(place, 256, 40, 128)
    wide = torch.randn(5, 3 * 256, device=place.device).half()
    check(place, wide[:, 256:512], weight)
    check(place, torch.randn(256, 5, device=place.device).half().t(), weight)


def test_no_rows(place):
    weight = make(place, 128, 24, 64)
    for dtype in (F32, BF16):
        assert awq_matmul(torch.empty(0, 128, dtype=dtype, device=place.device), weight, backend=place.backend).shape == (0, 24)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("num_in, group", [(1536, 128), (640, 32)])
def test_a_row_does_not_see_the_batch(triton_place, dtype, num_in, group):
    """Up to 16 rows, bit for bit, and the same every time; K is split."""
    weight = make(triton_place, num_in, 136 * triton_place.scale, group)
    assert _awq_triton.num_splits(2, num_in) > 1
    x = torch.randn(16, num_in).to(triton_place.device, dtype)
    together = awq_matmul(x, weight, backend="triton")
    assert torch.equal(awq_matmul(x, weight, backend="triton"), together)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 16), slice(5, 10)):
        assert torch.equal(awq_matmul(x[rows], weight, backend="triton"), together[rows])


def run_ptx(text, first, second):
    """prmt, shr and lop3 of 32 bits as PTX defines them; $1 and $2 in, $0 out."""
    registers = {"$1": first, "$2": second}
    for line in text.strip("{} ").split(";"):
        name, *operands = line.replace(",", " ").split() or [""]
        given = [registers[o] if o in registers else int(o, 0) for o in operands[1:] if not name.startswith(".")]
        if name == "prmt.b32":
            pool = given[0].to_bytes(4, "little") + given[1].to_bytes(4, "little")
            value = int.from_bytes(bytes(pool[given[2] >> 4 * i & 7] for i in range(4)), "little")
        elif name == "shr.u32":
            value = given[0] >> given[1]
        elif name == "lop3.b32":
            a, b, c, table = given
            bits = [(a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32)]
            value = sum((table >> bit & 1) << i for i, bit in enumerate(bits))
        else:
            assert name in ("", ".reg"), f"{name}: not known here"
            continue
        registers[operands[0]] = value
    return registers["$0"]


@pytest.mark.parametrize("dtype, magic, base", [(BF16, 0x4300, 128), (F16, 0x6400, 1024)])
def test_the_assembler_unpacks(dtype, magic, base):
    """The interpreter cannot run it: two words in, one plane of both out, as numbers base + code, from which zeros go exactly."""
    words = torch.randint(0, 2**32, (20, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for plane in range(awq_weight.PLANES):
        text = _awq_triton._unpack_two(plane, magic << 16 | magic)
        for pair in words:
            packed = torch.tensor([run_ptx(text, *pair)]).to(torch.int32).view(dtype)
            codes = torch.tensor([word >> 4 * plane & 15 for word in pair])
            for zero in range(16):
                raised = torch.tensor([zero | magic], dtype=torch.int16).view(dtype)
                assert torch.equal((packed - raised).long(), codes - zero), (plane, zero)
            assert torch.equal(packed.long(), codes + base)


@pytest.mark.parametrize("num_tiles", [1, 5, 28, 132, 300])
@pytest.mark.parametrize("num_in", [32, 896, 3584, 18944])
def test_splits_cover_k(num_tiles, num_in):
    splits, spans = _awq_triton.num_splits(num_tiles, num_in), -(-num_in // awq_weight.SPAN)
    each = -(-spans // splits)
    assert 1 <= splits <= _awq_triton.MAX_SPLITS and (splits - 1) * each < spans <= splits * each


@pytest.mark.parametrize("num_in, num_out, group", SHAPES)
def test_layouts_keep_every_number(num_in, num_out, group):
    tensors = random_tensors(num_in, num_out, group)
    want = dequantize_gemm(tensors[0], tensors[1], tensors[2].float(), group)
    for layout in ("auto", "planes", "blocks"):
        weight = AwqWeight.from_gemm(*tensors, layout=layout)
        assert (weight.num_in, weight.num_out, weight.group_size) == (num_in, num_out, group)
        assert torch.equal(weight.dequantize(), want)
        assert torch.equal(weight.dequantize(F16), want.half())
        assert torch.equal(AwqWeight.cat([weight, weight]).dequantize(), torch.cat([want, want], 1))
        assert weight.to("cpu") is weight
        assert weight.in_blocks == (layout == "blocks" or layout == "auto" and AVX512 and group in (32, 64, 128, 256))


def test_four_bits_stay_four_bits():
    weight = AwqWeight.from_gemm(*random_tensors(1024, 1024, 128))
    awq_matmul(torch.randn(2, 1024).bfloat16(), weight)
    awq_matmul(torch.randn(100, 1024).bfloat16(), weight)
    assert 0.5 * 1024 * 1024 < weight.nbytes < 0.57 * 1024 * 1024


@pytest.mark.skipif(not AVX512, reason="torch's int4 operator is used with AVX-512 only")
def test_torchs_operator_reads_our_blocks():
    for num_in, num_out in ((64, 64), (128, 192)):
        codes = torch.randint(0, 16, (num_in, num_out), dtype=torch.uint8)
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.t().contiguous().int(), 1)
        weight = AwqWeight.from_codes(codes, torch.zeros(1, num_out, dtype=torch.uint8), torch.ones(1, num_out), "blocks")
        assert torch.equal(theirs.flatten(), weight.codes.flatten())


def test_a_large_weight_is_unpacked_in_pieces(place, monkeypatch):
    monkeypatch.setitem(awq_matmul.__globals__, "SCRATCH_BYTES", 100_000)
    monkeypatch.setitem(awq_matmul.__globals__, "PIECE_BYTES", 100_000)
    monkeypatch.setitem(awq_matmul.__globals__, "FUSED_ROWS", 0)
    monkeypatch.setitem(awq_matmul.__globals__, "OPERATOR_ROWS", 0)
    for dtype in (BF16, F16):
        x = torch.randn(9, 256, device=place.device).to(dtype)
        check(place, x, make(place, 256, 424, 64), torch.randn(424, device=place.device).to(dtype))


def test_what_does_not_fit_is_refused_by_name():
    weight = AwqWeight.from_gemm(*random_tensors(64, 16, 32), layout="blocks")
    other = AwqWeight.from_gemm(*random_tensors(96, 16, 32))
    x = torch.randn(2, 64)
    with pytest.raises(ValueError, match=r"\[M, 64\]"):
        awq_matmul(x[:, :32], weight)
    with pytest.raises(ValueError, match="torch.float64"):
        awq_matmul(x.double(), weight)
    with pytest.raises(ValueError, match="bias is torch.float16"):
        awq_matmul(x, weight, torch.zeros(16).half())
    with pytest.raises(ValueError, match="cannot join 96 inputs"):
        AwqWeight.cat([weight, other])
    if _awq_triton.INTERPRETED:
        with pytest.raises(ValueError, match="cannot read blocks"):
            awq_matmul(x.bfloat16(), weight, backend="triton")
