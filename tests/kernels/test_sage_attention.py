"""The quantised attention references against an emulation with real integers, block by block."""

from __future__ import annotations

import pytest
import torch
from kernel_oracles import masked_attention, random_operands, strided, token_mask
from torch import Tensor
from turbokernels import BlockMask, sage_attention, sage_sparse_attention, select_blocks


def to_int8(x_LD: Tensor) -> tuple[Tensor, float]:
    scale = float(x_LD.abs().max()) / 127 or 1.0
    return (x_LD / scale).round().to(torch.int8), scale


def emulate(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, mask: BlockMask, pv: str) -> Tensor:
    """One query block at a time: int64 dot products of int8 values, then a softmax whose P and V are rounded."""
    o_BLND = torch.full_like(q_BLND, float("nan"))
    smooth_BLND = k_BLND - k_BLND.mean(1, keepdim=True)
    dim = q_BLND.shape[-1]
    for b in range(q_BLND.shape[0]):
        for n in range(q_BLND.shape[2]):
            for i in range(mask.n_q_blocks):
                rows = slice(i * mask.block_q, (i + 1) * mask.block_q)
                q_int, q_scale = to_int8(q_BLND[b, rows, n])
                scores, values = [], []
                for j in mask.kept[b, n, i].tolist():
                    columns = slice(j * mask.block_k, (j + 1) * mask.block_k)
                    k_int, k_scale = to_int8(smooth_BLND[b, columns, n])
                    scores.append((q_int.long() @ k_int.long().T).float() * (q_scale * k_scale / dim**0.5))
                    values.append(v_BLND[b, columns, n])
                s_QK, v_KD = torch.cat(scores, 1), torch.cat(values)
                p_QK = (s_QK - s_QK.max(1, keepdim=True).values).exp()
                if pv == "fp16":
                    numerator_QD = p_QK.half().float() @ v_KD.half().float()
                else:
                    channel_D = v_BLND[b, :, n].abs().amax(0) / 448
                    v8_KD = (v_KD / channel_D).to(torch.float8_e4m3fn).float()
                    numerator_QD = (p_QK * 448).to(torch.float8_e4m3fn).float() @ v8_KD * channel_D / 448
                o_BLND[b, rows, n] = numerator_QD / p_QK.sum(1, keepdim=True)
    return o_BLND


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
@pytest.mark.parametrize(("length", "block_q", "block_k"), [(1, 16, 16), (63, 32, 16), (257, 64, 128)])
def test_sparse_matches_integer_arithmetic(pv: str, length: int, block_q: int, block_k: int) -> None:
    q, k, v, *_ = random_operands(2, length, 2, 16, dtype=torch.float32)
    k = k + 3.0
    mask = select_blocks(q, k, 0.5, block_q, block_k)
    expected = emulate(q, k, v, mask, pv)
    # Float32 sums differ in order; now and then that tips an 8-bit rounding, by at most one step of P V.
    step = 2**-4 if pv == "fp8" else 2**-11
    for operands in ((q, k, v), (strided(q), strided(k), strided(v))):
        difference = (sage_sparse_attention(*operands, mask, pv) - expected).abs()
        assert difference.max() < step * v.abs().max()
        assert difference.mean() < 1e-3 * step * v.abs().max()


@pytest.mark.parametrize(("length_q", "length_k"), [(63, 63), (257, 130)])
def test_dense_is_sparse_with_every_block(length_q: int, length_k: int) -> None:
    q, k, v, *_ = random_operands(1, length_q, 2, 16, length_k, dtype=torch.float32)
    mask = select_blocks(q, k, 1.0, 128, 64)
    assert sage_attention(q, k, v).equal(sage_sparse_attention(q, k, v, mask))


@pytest.mark.parametrize(("pv", "limit"), [("fp16", 0.015), ("fp8", 0.04)])
def test_error_is_that_of_eight_bits(pv: str, limit: float) -> None:
    """Uniform rounding of q and k to 1/127 of about 4 sigma gives scores off by about 0.013 for unit variances, so o is
    off by about that share; e4m3's 3 mantissa bits add up to 1/16 per product, which averages out over the keys."""
    q, k, v, *_ = random_operands(2, 256, 2, 64, dtype=torch.float32)
    mask = select_blocks(q, k, 0.5, 64, 64)
    exact = masked_attention(q.double(), k.double(), v.double(), token_mask(mask))
    error = (sage_sparse_attention(q, k, v, mask, pv).double() - exact).norm() / exact.norm()
    assert 1e-4 < error < limit


def test_smoothing_removes_a_common_key_offset() -> None:
    """Unsmoothed, the offset would take the whole int8 range and leave the differences between keys nothing."""
    q, k, v, *_ = random_operands(1, 128, 1, 32, dtype=torch.float32)
    offset = 100.0 * torch.randn(1, 1, 1, 32)
    exact = masked_attention(q.double(), k.double(), v.double())
    plain = (sage_attention(q, k, v).double() - exact).norm()
    shifted = (sage_attention(q, k + offset, v).double() - exact).norm()
    assert shifted < 1.1 * plain


def test_zero_operands_and_dtypes() -> None:
    zeros = torch.zeros(1, 40, 1, 16)
    for pv in ("fp8", "fp16"):
        assert sage_attention(zeros, zeros, zeros, pv).equal(zeros)
    q, k, v, *_ = random_operands(1, 40, 1, 16, dtype=torch.bfloat16)
    assert sage_attention(q, k, v).dtype == torch.bfloat16
    assert sage_attention(q, k, v).equal(sage_attention(q.float(), k.float(), v.float()).bfloat16())


@pytest.mark.parametrize("pv", ["fp8", "fp16"])
def test_nan_propagates(pv: str) -> None:
    q, k, v, *_ = random_operands(1, 40, 1, 16, dtype=torch.float32)
    k[0, 3, 0, 0] = float("nan")
    assert sage_attention(q, k, v, pv).isnan().all()


def test_bad_requests() -> None:
    q, k, v, *_ = random_operands(1, 40, 1, 16, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"pv='int8' .* auto, fp8, fp16"):
        sage_attention(q, k, v, "int8")
    with pytest.raises(ValueError, match=r"requires a gradient.*no_grad"):
        sage_attention(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not sage_attention(q, k, v).requires_grad
