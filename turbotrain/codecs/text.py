"""Prompts to embeddings through transformers' umT5 encoder, as Wan uses it (formats.md, section 9).

Text is cleaned (ftfy, HTML entities, white space), padded to `text_len`, and the rows past a prompt's own tokens are zero: the
network attends to them, there is no mask.

Legend: B batch, L tokens, D embedding width.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ftfy
import torch
from torch import Tensor, nn

from turbotrain.codecs.folders import reading, require_complete

if TYPE_CHECKING:  # importing transformers takes seconds, which a command that fails on bad input should not pay
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel


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
    ) -> TextEncoder:
        """Load a transformers umT5 folder and its tokenizer's (or hub ids).

        Raises:
            ValueError: a folder cannot be read, or weights are missing from it.
        """
        from transformers import AutoTokenizer, UMT5EncoderModel

        with reading("text_encoder", path, "umT5"):
            loaded: Any = UMT5EncoderModel.from_pretrained(
                str(path), dtype=dtype or torch.float32, output_loading_info=True
            )
            encoder, info = cast(
                "tuple[UMT5EncoderModel, dict[str, Any]]", loaded
            )  # annotated for the call without info
            require_complete(info)
        with reading("tokenizer", tokenizer_path, "tokenizer"):
            # AutoTokenizer on a folder: T5TokenizerFast(vocab_file=...) of transformers 5 gives unknown tokens only.
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_path))
        nn.Module.to(encoder, device)  # transformers' decorator hides the signature of its own `to`
        # AutoTokenizer is annotated with every backend there is; what it returns for a folder is one of this base.
        return cls(encoder, cast("PreTrainedTokenizerBase", tokenizer), text_len)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, L, D) float32, L = text_len; a longer prompt is cut."""
        tokens = self.tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = self.encoder.device
        ids_BL, mask_BL = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        embeds_BLD = self.encoder(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        return embeds_BLD.float() * mask_BL[..., None]


def clean(prompt: str) -> str:
    """Repaired Unicode, HTML entities resolved (twice: some captions are escaped twice), white space folded."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
