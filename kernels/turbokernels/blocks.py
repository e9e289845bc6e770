"""Block-sparse attention masks: which key blocks each query block attends to, and the same lists seen from the keys.

Shape suffixes: B batch, N heads, I query blocks, J key blocks, M kept key blocks per query block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128)


def check_block_size(op: str, name: str, value: int) -> None:
    """Require a block size that the kernels know."""
    if value not in BLOCK_SIZES:
        raise ValueError(f"{op}: {name}={value!r} is not supported; use one of {', '.join(map(str, BLOCK_SIZES))}")


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Kept key blocks per query block. Block i covers tokens [i * block, (i + 1) * block); the last one may be ragged.

    kept: int32 (B, N, I, M), ascending along M, no index twice, values in [0, J).
    block_q, block_k: tokens per block; length_q, length_k: tokens in all.
    Errors: ValueError when `kept` does not fit the lengths and block sizes.
    """

    kept: Tensor
    block_q: int
    block_k: int
    length_q: int
    length_k: int

    def __post_init__(self) -> None:
        check_block_size("BlockMask", "block_q", self.block_q)
        check_block_size("BlockMask", "block_k", self.block_k)
        for name, length in (("length_q", self.length_q), ("length_k", self.length_k)):
            if length < 1:
                raise ValueError(f"BlockMask: {name}={length}; expected at least 1 token")
        if self.kept.dtype != torch.int32:
            raise ValueError(f"BlockMask: kept has dtype {self.kept.dtype}; expected int32: pass kept.int()")
        if self.kept.ndim != 4 or self.kept.shape[2] != self.n_q_blocks:
            raise ValueError(
                f"BlockMask: kept has shape {tuple(self.kept.shape)}; expected (batch, heads, {self.n_q_blocks}, m) "
                f"for {self.length_q} tokens in query blocks of {self.block_q}"
            )
        if not 1 <= self.kept.shape[3] <= self.n_k_blocks:
            raise ValueError(
                f"BlockMask: kept lists {self.n_kept} key blocks per query block; expected 1 to {self.n_k_blocks}"
            )

    @property
    def n_q_blocks(self) -> int:
        """Number of query blocks, the ragged one included."""
        return -(-self.length_q // self.block_q)

    @property
    def n_k_blocks(self) -> int:
        """Number of key blocks, the ragged one included."""
        return -(-self.length_k // self.block_k)

    @property
    def n_kept(self) -> int:
        """Kept key blocks per query block (M)."""
        return self.kept.shape[3]

    @cached_property
    def counts(self) -> Tensor:
        """int32 (B, N, J): how many query blocks keep key block j."""
        return self._transposed[0]

    @cached_property
    def offsets(self) -> Tensor:
        """int32 (B, N, J + 1): where key block j's list starts in `q_blocks`; the last entry is its length I * M."""
        return self._transposed[1]

    @cached_property
    def q_blocks(self) -> Tensor:
        """int32 (B, N, I * M): the transposed lists, one after the other (compressed rows, so no padding and no sync).

        Key block j is kept by the query blocks q_blocks[b, n, offsets[b, n, j] : offsets[b, n, j + 1]], ascending.
        """
        return self._transposed[2]

    @cached_property
    def _transposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """counts, offsets, q_blocks: by kernels on a GPU, where sorting the lists would take longer than using them."""
        if self.kept.is_cuda:
            from turbokernels.block_selection.kernel import transpose_lists  # here: it imports Triton

            return transpose_lists(self.kept, self.n_k_blocks)
        kept_BNE = self.kept.flatten(2).long()
        counts_BNJ = kept_BNE.new_zeros(*kept_BNE.shape[:2], self.n_k_blocks)
        counts_BNJ = counts_BNJ.scatter_add_(2, kept_BNE, torch.ones_like(kept_BNE)).int()
        offsets_BNJ = torch.nn.functional.pad(counts_BNJ.cumsum(2), (1, 0)).int()
        # Entry e of a flattened list belongs to query block e // M; a stable sort by key block keeps that order
        # ascending.
        order_BNE = kept_BNE.sort(dim=2, stable=True).indices
        return counts_BNJ, offsets_BNJ, torch.div(order_BNE, self.n_kept, rounding_mode="floor").int()

    def check_operands(self, op: str, q: Tensor, k: Tensor) -> None:
        """Require that q (B, Lq, N, D) and k (B, Lk, N, D) are what this mask was made for."""
        expected = (*self.kept.shape[:2], self.length_q, self.length_k)
        got = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        if expected != got:
            raise ValueError(
                f"{op}: the mask is for (batch, heads, query tokens, key tokens) = {expected}, the operands have {got}"
                "; select the blocks from operands of these shapes"
            )
        if self.kept.device != q.device:
            raise ValueError(f"{op}: the mask is on {self.kept.device} but q is on {q.device}; move them to one device")
