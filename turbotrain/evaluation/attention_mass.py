"""How much of the softmax the kept blocks of sparse attention hold, by layer and head, and top-k shared out by it.

Legend: B samples, L tokens, N heads, Q query blocks, K key blocks, T values of top-k.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import turbokernels as tk
from torch import Tensor, nn

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.tangent import Dual
from turbotrain.model.wan import WanTransformer

Masses = list[list[list[float]]]  # layer, head, top-k
SCORES_AT_ONCE = 2**26


@torch.no_grad()
def attention_mass(
    network: WanTransformer,
    calls: Iterable[Callable[[nn.Module], Any]],
    topks: Sequence[float],
    attention: AttentionConfig,
) -> Masses:
    """For every layer, head and top-k the share of softmax mass on the blocks that `select_blocks` keeps: a mean over queries,
    samples and passes. topk 1 keeps all: 1.

    attention: whose blocks, of tokens in its order; what the network computes is its own attention, in that order.
    """
    own = network.attention_config
    blocks = {"order": attention.order, "block_q": attention.block_q, "block_k": attention.block_k}
    layers = len(network.blocks)
    sums: list[Tensor | None] = [None] * layers
    passes = [0] * layers

    def look(layer: int, q_BLND: Tensor, k_BLND: Tensor) -> None:
        held_NT = _held(q_BLND.float(), k_BLND.float(), topks, attention.block_q, attention.block_k)
        previous = sums[layer]
        sums[layer] = held_NT if previous is None else previous + held_NT
        passes[layer] += 1

    network.set_attention(dataclasses.replace(own, **blocks))
    try:
        with _watched(network, look):
            for call in calls:
                call(network)
    finally:
        network.set_attention(own)
    found = [total / max(1, count) for total, count in zip(sums, passes) if total is not None]
    if len(found) != layers:
        raise ValueError(f"{layers - len(found)} of {layers} layers were never asked: calls must run the network")
    return [[[float(value) for value in head] for head in layer.tolist()] for layer in found]


@contextmanager
def _watched(network: WanTransformer, look: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """`look(layer, q, k)` at every pass of every self-attention."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def before(_: nn.Module, given: tuple[Any, ...]) -> None:
            q, k = given[0], given[1]
            assert isinstance(q, Dual)
            look(layer, q.x, k.x)

        return before

    operators = [block.get_submodule("self_attn.attn_op") for block in network.blocks]
    handles = [operator.register_forward_pre_hook(hook(layer)) for layer, operator in enumerate(operators)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _held(q_BLND: Tensor, k_BLND: Tensor, topks: Sequence[float], block_q: int, block_k: int) -> Tensor:
    """Mass (N, T), over a part of the queries at a time: all scores of a long video would not fit."""
    q_BNLD, k_BNLD = q_BLND.transpose(1, 2), k_BLND.transpose(1, 2)
    batch, heads, length, width = q_BNLD.shape
    key_blocks = -(-length // block_k)
    query_block_L = torch.arange(length, device=q_BLND.device) // block_q
    kept = [tk.select_blocks(q_BLND, k_BLND, topk, block_q, block_k).kept for topk in topks]
    held_NT = q_BLND.new_zeros(heads, len(topks))
    rows = max(block_q, SCORES_AT_ONCE // (batch * heads * length))
    for start in range(0, length, rows):
        part = slice(start, start + rows)
        shares_BNRL = (q_BNLD[:, :, part] @ k_BNLD.mT * width**-0.5).softmax(-1)
        padded = torch.nn.functional.pad(shares_BNRL, (0, key_blocks * block_k - length))
        by_block_BNRK = padded.unflatten(-1, (key_blocks, block_k)).sum(-1)
        for t, kept_BNQM in enumerate(kept):
            own_BNRM = kept_BNQM[:, :, query_block_L[part]].long()
            held_NT[:, t] += by_block_BNRK.gather(-1, own_BNRM).sum((0, 2, 3))
    return held_NT / (batch * length)


def share_out(masses: Masses, topks: Sequence[float], budget: float) -> list[float]:
    """A top-k for every layer, from `topks` in rising order, whose mean is at most `budget` and which keep the most mass. What
    keeps no more mass is not bought, whatever is left of the budget.

    Greedy over the steps of each layer's concave hull: the best use of a budget but for the last step's remainder.

    Raises:
        ValueError: topks that do not rise, or a budget below the smallest of them.
    """
    if list(topks) != sorted(set(topks)):
        raise ValueError(f"topks={list(topks)}: must rise")
    if budget < topks[0]:
        raise ValueError(f"budget={budget}: below the smallest top-k, {topks[0]}")
    curves = [[sum(head[t] for head in layer) / len(layer) for t in range(len(topks))] for layer in masses]
    steps: list[tuple[float, int, int, int]] = []  # (gain per top-k, layer, from, to)
    for layer, curve in enumerate(curves):
        hull = _hull(topks, curve)
        for first, last in itertools.pairwise(hull):
            gain = (curve[last] - curve[first]) / (topks[last] - topks[first])
            if gain > 0:
                steps.append((gain, layer, first, last))
    chosen = [0] * len(curves)
    spent = len(curves) * topks[0]
    for _, layer, first, last in sorted(steps, key=lambda step: (-step[0], step[2])):
        price = topks[last] - topks[first]
        # A hull's steps come in order, so a layer that could not pay for one has none of the later ones.
        if chosen[layer] == first and spent + price <= budget * len(curves) + 1e-9:
            chosen[layer] = last
            spent += price
    return [topks[index] for index in chosen]


def _hull(xs: Sequence[float], ys: Sequence[float]) -> list[int]:
    """Indices of the upper concave hull of the points, from the first to the last."""
    kept: list[int] = []
    for index in range(len(xs)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (ys[b] - ys[a]) * (xs[index] - xs[a]) > (ys[index] - ys[a]) * (xs[b] - xs[a]):
                break
            kept.pop()
        kept.append(index)
    return kept
