"""Prompts to embeddings through transformers' umT5 encoder, as Wan uses it (formats.md, section 9).

Text is cleaned (ftfy, HTML entities, white space), padded to `text_len`, and the rows past a prompt's own tokens are zero: the
network attends to them, there is no mask.

Legend: B batch, L tokens, D embedding width; N output features, K input features.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ftfy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from turbokernels.w8a8.api import dequantize_weight, quantize_weight

from turbotrain.codecs.folders import reading, require_complete
from turbotrain.codecs.official import is_official_file, load_umt5
from turbotrain.placement.swap import Swap

if TYPE_CHECKING:  # importing transformers takes seconds, which a command that fails on bad input should not pay
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

logger = logging.getLogger(__name__)
_INT8 = "int8_channel"


class TextEncoder:
    def __init__(self, encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerBase, text_len: int) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_len = text_len

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer_path: str | Path,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        text_len: int = 512,
        *,
        int8: bool = False,
    ) -> TextEncoder:
        """Load a transformers umT5 folder (or hub id) or the official `.pth`, and its tokenizer's folder (or hub id).

        Args:
            dtype: of the weights; None: float32.
            int8: linear weights in 8 bits with one scale a row, half of what bf16 takes; multiplied in `dtype`.

        Raises:
            ValueError: a folder or file cannot be read, would run code, or lacks weights.
        """
        from transformers import AutoTokenizer, UMT5EncoderModel

        with reading("tokenizer", tokenizer_path, "tokenizer"):
            # AutoTokenizer on a folder: T5TokenizerFast(vocab_file=...) of transformers 5 gives unknown tokens only.
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path))
        if is_official_file(path):
            encoder = load_umt5(path, dtype or torch.float32)
        else:
            with reading("text_encoder", path, "umT5"):
                loaded: Any = UMT5EncoderModel.from_pretrained(
                    str(path), dtype=dtype or torch.float32, output_loading_info=True
                )
                encoder, info = cast(
                    "tuple[UMT5EncoderModel, dict[str, Any]]", loaded
                )  # annotated for the call without info
                require_complete(info)
        if int8:
            quantize_linears(encoder)
        nn.Module.to(encoder, device)  # transformers' decorator hides the signature of its own `to`
        # AutoTokenizer is annotated with every backend there is; what it returns for a folder is one of this base.
        return cls(encoder, cast("PreTrainedTokenizerBase", tokenizer), text_len)

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self.encoder.config.d_model

    @property
    def nbytes(self) -> int:
        """What the weights take."""
        return sum(tensor.nbytes for tensor in _weights(self.encoder))

    @property
    def device(self) -> torch.device:
        """Where it computes, although the table of embeddings may lie on the host (`streamed`)."""
        return self.encoder.encoder.final_layer_norm.weight.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, L, D) float32, L = text_len; a longer prompt is cut, and a warning says so."""
        texts = [clean(prompt) for prompt in prompts]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        table: Any = self.encoder.get_input_embeddings()
        words_BLD = table(tokens["input_ids"].to(table.weight.device)).to(self.device)
        mask_BL = tokens["attention_mask"].to(self.device)
        self._tell_of_cuts(texts, mask_BL)
        embeds_BLD = self.encoder(inputs_embeds=words_BLD, attention_mask=mask_BL).last_hidden_state
        return embeds_BLD.float() * mask_BL[..., None]

    def _tell_of_cuts(self, texts: list[str], mask_BL: Tensor) -> None:
        for index in mask_BL.all(dim=1).nonzero().flatten().tolist():
            count = len(self.tokenizer(texts[index], verbose=False)["input_ids"])
            if count > self.text_len:
                logger.warning(
                    "prompt %r... has %d tokens: only the first %d are read", texts[index][:40], count, self.text_len
                )


def clean(prompt: str) -> str:
    """Repaired Unicode, HTML entities resolved (twice: some captions are escaped twice), white space folded."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class Int8WeightLinear(nn.Module):
    """y = W x with W in 8 bits and one scale a row; the product is computed in x's dtype. x (..., K), y (..., N)."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_NK, scale_N = quantize_weight(linear.weight.detach().float(), _INT8)
        self.register_buffer("weight", weight_NK)
        self.register_buffer("scale", scale_N)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantize_weight(self.weight, self.scale, _INT8, x.dtype))


def quantize_linears(module: nn.Module) -> None:
    """Every linear layer in 8 bits, in place, one after the other, so that two copies of one layer are the most there is."""
    for name in [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)  # by the line above
        if layer.bias is not None:
            raise ValueError(f"{name} has a bias: umT5's linear layers have none")
        module.set_submodule(name, Int8WeightLinear(layer))


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """The module on `device` inside; afterwards its own tensors again. Its weights are frozen, so nothing is copied back."""
    tensors = [tensor for tensor in _weights(module) if tensor.device != device]
    own = [tensor.data for tensor in tensors]
    try:
        with torch.inference_mode(False):
            for tensor, data in zip(tensors, own):
                tensor.data = data.to(device)
        yield
    finally:
        with torch.inference_mode(False):
            for tensor, data in zip(tensors, own):
                tensor.data = data


@contextmanager
def streamed(encoder: UMT5EncoderModel, device: torch.device) -> Iterator[None]:
    """The encoder's layers on `device` one after the other inside, each while the one before computes: two of them are there at
    once. The table of embeddings, of which a prompt reads a few rows, stays on the host."""
    stack: Any = encoder.encoder
    layers = Swap([list(stack.block)], device, pin=False)  # locking 9 GB takes longer than one pass over them
    try:
        with lent(stack.final_layer_norm, device):
            yield
    finally:
        layers.close()


def _weights(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
