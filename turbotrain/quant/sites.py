"""Which linears of a Wan block share an input, and how SmoothQuant's vector of that input is folded away.

y = W x = (W diag(s)) (x / s) (SmoothQuant, arXiv 2211.10438): the columns of W are multiplied by s, and whatever
makes x has to divide by s. Where that costs nothing (method.md section 7):

| input of                 | divided in                                                                                     |
|--------------------------|------------------------------------------------------------------------------------------------|
| self q, k, v; ffn.0      | the modulation, at run time: the block's buffers `smooth_attn`, `smooth_ffn`                   |
| cross q                  | norm3's weight and bias                                                                        |
| self o; cross o          | the rows of v (of v and v_img): attention is linear in v                                       |
| ffn.2                    | the layer's own `smooth` vector, where it quantises                                            |
| cross k, v (k_img, v_img)| nowhere: their input is made once for all blocks                                               |

The vector of o has one entry per feature of a head, shared by all heads, because SLA's output is o_s + P(o_l) with a
P that the heads share: o_s and o_l come out divided by s, and P(o_l) / s = (diag(1/s) P diag(s)) (o_l / s) + bias / s.

Shape suffixes: K input features, H features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turbotrain.model.quant_linear import BLOCK_VECTORS, QuantLinear

PROJECTION = "self_attn.attn_op.local_attn.proj_l"


@dataclass(frozen=True)
class Site:
    """One input of a block: the linears that read it, and what divides it.

    linears: names inside the block. fold: `modulation`, `norm`, `values`, `layer` or `none`.
    target: of the fold: name of the block's buffer, of the norm, or of the linears that make the values.
    """

    linears: tuple[str, ...]
    fold: str
    target: tuple[str, ...] = ()

    @property
    def at_run_time(self) -> bool:
        """Whether the vector is stored beside the weights; otherwise it disappears into other weights."""
        return self.fold in ("modulation", "layer")


# In the order in which they are chosen: folding o's vector rescales the rows of v, which then count in q, k, v's own
# choice.
SITES = (
    Site(("self_attn.o",), "values", ("self_attn.v",)),
    Site(BLOCK_VECTORS["smooth_attn"], "modulation", ("smooth_attn",)),
    Site(("cross_attn.o",), "values", ("cross_attn.v", "cross_attn.v_img")),
    Site(("cross_attn.q",), "norm", ("norm3",)),
    Site(("cross_attn.k", "cross_attn.v"), "none"),
    Site(("cross_attn.k_img", "cross_attn.v_img"), "none"),
    Site(BLOCK_VECTORS["smooth_ffn"], "modulation", ("smooth_ffn",)),
    Site(("ffn.2",), "layer"),
)


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block that are quantised: all but P, by name inside the block.

    Errors: ValueError for a layer that is quantised already.
    """
    done = [name for name, module in block.named_modules() if isinstance(module, QuantLinear)]
    if done:
        raise ValueError(
            f"{done[0]} is quantised already: start from the float model, or load it with an explicit dtype"
        )
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("proj_l")
    }


def block_sites(block: nn.Module) -> list[Site]:
    """The sites that this block has. Errors: ValueError for a linear that no site covers."""
    linears = block_linears(block)
    sites = [site for site in SITES if site.linears[0] in linears]
    missing = set(linears) - {name for site in sites for name in site.linears}
    if missing:
        raise ValueError(f"no smoothing rule for the block linears {', '.join(sorted(missing))}: add them to SITES")
    return sites


def model_sites(model: nn.Module) -> Iterator[tuple[str, nn.Module, Site]]:
    """(block name, block, site) of every block. Errors: ValueError for a model without `blocks`."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of blocks to quantise; pass a WanTransformer")
    for index, block in enumerate(blocks):
        for site in block_sites(block):
            yield f"blocks.{index}", block, site


def tile_heads(vector_H: Tensor, n_features: int) -> Tensor:
    """The vector (H,) of one head repeated over all heads, (K,); a vector of all features comes back as it is."""
    return vector_H.repeat(n_features // vector_H.numel())


def _scale_columns(linear: nn.Module, vector_K: Tensor) -> None:
    weight: Tensor = linear.get_parameter("weight")
    weight.copy_(weight.float() * vector_K)


def _divide_rows(module: nn.Module, vector_K: Tensor) -> None:
    """Divide a linear's output features, or a norm's weight and bias, by the vector."""
    for name, parameter in module.named_parameters(recurse=False):
        divisor = vector_K[:, None] if name == "weight" and parameter.ndim == 2 else vector_K
        parameter.copy_(parameter.float() / divisor)


@torch.no_grad()
def fold(block: nn.Module, site: Site, vector: Tensor) -> None:
    """Divide the site's input by the vector and multiply its linears' columns, in place: the block computes what it
    did.

    vector: (K,), for o's sites (H,). For fold `layer` only the columns are not touched here: QuantLinear does both.
    """
    if site.fold == "layer":
        raise ValueError(f"{site.linears[0]} takes its vector when it is quantised: use QuantLinear.from_linear")
    linears = block_linears(block)
    n_features = linears[site.linears[0]].in_features
    vector = vector.to(linears[site.linears[0]].weight.device)
    for name in site.linears:
        _scale_columns(linears[name], tile_heads(vector, n_features))
    if site.fold == "modulation":
        setattr(block, site.target[0], vector.clone())
    elif site.fold == "norm":
        _divide_rows(block.get_submodule(site.target[0]), vector)
    elif site.fold == "values":
        for name in site.target:
            if name in linears:
                _divide_rows(linears[name], tile_heads(vector, n_features))
        projection = dict(block.named_modules()).get(PROJECTION)
        if projection is not None and site.linears[0].startswith("self_attn"):
            _scale_columns(projection, vector)
            _divide_rows(projection, vector)
