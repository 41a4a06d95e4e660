"""`qlora_min.nf4` against bitsandbytes on the CPU: equal bit for bit, by stage, also where rounding decides."""

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_min import nf4

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "heavy tails", "zero blocks", "all zero", "constant"]


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, scale: float = 0.02) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * scale
    if kind == "heavy tails":  # a Cauchy's tails, cut where fp16 ends
        w = (w / torch.randn(shape, generator=g)).clamp(-6e4, 6e4)
    elif kind == "zero blocks":
        flat = w.view(-1)
        for i in range(0, flat.numel(), 192):  # every third block, and a few single zeros
            flat[i : i + 64] = 0
        flat[::7] = 0
    elif kind == "all zero":
        w = torch.zeros(shape)
    elif kind == "constant":
        w = torch.full(shape, scale)
    return w.to(dtype)


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal in dtype, shape and every bit: unlike `==`, this tells -0 from 0."""
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[ours.element_size()]
    assert torch.equal(ours.contiguous().view(as_int), theirs.contiguous().view(as_int))


def assert_equals_bitsandbytes(w: torch.Tensor) -> None:
    """Both levels, every stage."""
    packed, plain = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    codes, absmax = nf4.quantize_4bit(w.flatten().float())
    assert_same_bits(absmax, plain.absmax)
    nibbles = [nibble for byte in packed.flatten().tolist() for nibble in (byte >> 4, byte & 15)]
    assert codes.tolist() == nibbles[: w.numel()]

    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = nf4.quantize(w)
    assert_same_bits(ours.packed, packed.flatten())
    assert_same_bits(ours.mean, state.offset)
    assert_same_bits(ours.scales2, state.state2.absmax)
    assert_same_bits(ours.scales, state.absmax)
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert_same_bits(nf4.dequantize_scales(ours), scales)
    if w.shape[-1] % 64:  # as one row, which bitsandbytes gets right: see the AVX-512 note in the module
        state.shape = torch.Size((1, w.numel()))
    with torch.compiler.set_stance("force_eager"):  # odd sizes would start the compiler
        theirs = bnb.dequantize_4bit(packed, state)
    dequantised = nf4.dequantize(ours)
    assert dequantised.shape == w.shape
    assert_same_bits(dequantised.flatten(), theirs.flatten())


def ulps(x: torch.Tensor, steps: range) -> torch.Tensor:
    """(n,) fp32 -> (n * steps,): each value and its neighbours, by counting in its bits."""
    return (x.view(torch.int32)[:, None] + torch.tensor(steps, dtype=torch.int32)).view(torch.float32).flatten()


def test_levels_are_normal_quantiles():
    assert_same_bits(nf4.LEVELS, bnb.get_4bit_type("nf4", device="cpu"))
    levels = nf4.nf4_levels()
    assert levels.dtype == torch.float32 and levels.shape == (16,)
    torch.testing.assert_close(levels, nf4.LEVELS, rtol=0, atol=1e-6)
    assert levels[[0, 7, 15]].tolist() == [-1, 0, 1]


def test_equation_4_as_printed_has_15_levels():
    q = nf4.equation_4()
    assert q.shape == (15,) and q[7] == 0
    torch.testing.assert_close(q, -q.flip(0), rtol=0, atol=1e-7)
    nearest = (q[:, None] - nf4.LEVELS).abs().amin(dim=1)
    assert nearest.max() > 0.05  # nor are these the shipped levels with one left out


def test_dynamic_map_is_bitsandbytes():
    assert_same_bits(nf4.dynamic_map(), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(64, 1024), (3, 64), (130, 192)], ids=str)  # 4, 1 and 2 second-level blocks
def test_equals_bitsandbytes(kind, shape, dtype):
    assert_equals_bitsandbytes(make(kind, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (63,), (65,), (30, 50), (7, 33), (2, 3, 96), (16421,)], ids=str)
def test_sizes_that_are_not_whole_blocks(kind, shape, dtype):
    assert_equals_bitsandbytes(make(kind, shape, dtype))


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    log_scale=st.integers(-12, 3),
    seed=st.integers(0, 2**31),
)
def test_equals_bitsandbytes_property(kind, dtype, rows, columns, log_scale, seed):
    assert_equals_bitsandbytes(make(kind, (rows, columns), dtype, seed, 10.0**log_scale))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200))
def test_any_finite_floats(values):  # subnormals, huge spreads, -0
    assert_equals_bitsandbytes(torch.tensor(values))


def test_thresholds_of_the_first_level():
    """Weights within 4 ulps of a midpoint times absmax: here w * (1/c), for whole blocks, and w / c, for a short last
    block, give different codes."""
    g = torch.Generator().manual_seed(0)
    midpoints = (nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2
    c = torch.rand(1000, 1, generator=g) + 0.5
    near = ulps((c * midpoints).flatten(), range(-4, 5)).view(1000, -1)  # [1000, 15] -> [1000, 135]
    w = torch.cat([c, near.gather(1, torch.randint(135, (1000, 63), generator=g))], dim=1)  # [1000, 64]
    by_division, by_reciprocal = nf4._nearest(w / c, nf4.LEVELS), nf4._nearest(w * (1 / c), nf4.LEVELS)
    differ = by_division != by_reciprocal
    assert differ.sum() > 1000 and differ[:100, :50].sum() > 100  # so that what follows can fail
    assert_equals_bitsandbytes(w)
    for row in w[:100, :50]:
        assert_equals_bitsandbytes(row)


def test_a_tie_goes_to_the_lower_code():
    w = torch.cat([torch.tensor([1.0]), (nf4.LEVELS[:-1] + nf4.LEVELS[1:]) / 2])
    w = torch.cat([w, torch.zeros(48)])  # absmax 1, so w / c is exact
    assert nf4.quantize_4bit(w)[0][1:16].tolist() == list(range(15))
    assert_equals_bitsandbytes(w)


def test_thresholds_of_the_second_level():
    """Values around each cell edge where the code changes, and around each true midpoint: equal; nearest is not."""
    levels = nf4.dynamic_map()
    code_of_cell = nf4._nearest(2 * torch.arange(65536) / 65535 - 1, levels)
    edges = (code_of_cell.diff().nonzero().flatten() + 0.5) / 65535 * 2 - 1
    near = torch.cat([ulps(edges, range(-300, 301)), ulps((levels[:-1] + levels[1:]) / 2, range(-300, 301))])
    near = torch.cat([near, torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 1e-5])
    near = near[near.abs() <= 1]  # no NaN, which is what lies below 0 in bits
    x = nf4._blocks(near, 255)
    x = torch.cat([torch.ones(len(x), 1), x], dim=1).flatten()  # absmax 1 in each block
    codes, absmax = nf4.quantize_8bit(x)
    theirs, state = bnb.quantize_blockwise(x, blocksize=256)
    assert_same_bits(codes, theirs)
    assert_same_bits(absmax, state.absmax)
    assert (codes != nf4._nearest(x, levels)).sum() > 1000
    assert not ((codes >= 124) & (codes <= 130)).any()


def test_second_level_is_nearly_nearest_on_real_scales():
    _, absmax = nf4.quantize_4bit(make("normal", (2048, 1024), torch.float32).flatten())
    x = absmax - absmax.mean()
    codes, scales2 = nf4.quantize_8bit(x)
    nearest = nf4._nearest(x.view(-1, 256) * (1 / scales2)[:, None], nf4.dynamic_map()).flatten()
    off = (codes.int() - nearest).abs()
    assert 0 < (off > 0).float().mean() < 0.005 and off.max() <= 4


def test_packing_order_and_zeros():
    w = torch.zeros(65)
    w[0], w[1] = -2.0, 2.0
    q = nf4.quantize(w)
    assert q.packed[:2].tolist() == [0x0F, 0x77] and q.packed[-1] == 0x77
    assert torch.equal(nf4.dequantize(q)[2:], torch.zeros(63))


def test_bits_per_weight():
    q = nf4.quantize(make("normal", (256, 1024), torch.float32))
    assert q.bits_per_weight == 4 + 8 / 64 + 32 / (64 * 256) + 32 / (256 * 1024)
    assert round(4 + 8 / 64 + 32 / (64 * 256), 3) == 4.127


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(64, dtype=torch.float64), "float64"),
        (torch.zeros(64, dtype=torch.int8), "int8"),
        (torch.zeros(0, 64), "at least 1 element"),
        (torch.zeros(64, device="meta"), "on the CPU"),
        (torch.tensor([1.0, float("nan")]), "NaN"),
        (torch.tensor([1.0, float("-inf")]), "infinities"),
    ],
)
def test_bad_weights(bad, message):
    with pytest.raises(ValueError, match=message):
        nf4.quantize(bad)
