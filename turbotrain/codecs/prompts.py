"""Text embeddings as a pipeline needs them: each prompt is looked up in memory, then on disk, then encoded.

The umT5 of Wan takes 11 GB in bf16, more than many networks. It is loaded when the first prompt needs it and leaves a GPU as soon
as the prompts of a call are encoded, unless memory there is plentiful. Where it does not fit, its layers pass through one by one.

Legend: B prompts, L tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from turbotrain.checkpoint.components import TEXT_DEVICES, TEXT_DTYPES
from turbotrain.codecs.cache import EmbeddingCache, files_identity
from turbotrain.codecs.text import TextEncoder, lent, streamed
from turbotrain.model.variants import WanConfig

# Beside the weights: activations of one batch, and what the libraries allocate on their own.
WORKING_BYTES = 2 * 2**30
# A large encoder's attention of 64 prompts takes gigabytes.
LARGE_BYTES = 2**30
TOGETHER, TOGETHER_LARGE = 64, 4


class PromptEncoder:
    """A text encoder with the memory of what it encoded.

    Args:
        load: makes the text encoder, on the CPU; called at most once, when it is first needed.
        device: of the embeddings, and of the encoder's work (`encoding_place`).
        wanted: a name of TEXT_DEVICES.
        cache: embeddings of earlier runs, or None.
    """

    def __init__(
        self,
        load: Callable[[], TextEncoder],
        device: torch.device,
        wanted: str = "auto",
        cache: EmbeddingCache | None = None,
    ) -> None:
        self._load = load
        self._text_encoder: TextEncoder | None = None
        self._embeddings: dict[str, Tensor] = {}  # on the CPU: thousands of prompts are gigabytes
        self.device = device
        self.wanted = wanted
        self.cache = cache

    @classmethod
    def holding(cls, text_encoder: TextEncoder, device: torch.device) -> PromptEncoder:
        """Around an encoder that stays where it is."""
        prompts = cls(lambda: text_encoder, device)
        prompts._text_encoder = text_encoder
        return prompts

    @property
    def text_encoder(self) -> TextEncoder:
        """The encoder, loaded now if it was not."""
        if self._text_encoder is None:
            with torch.inference_mode(False):  # its weights outlive the call that asks first
                self._text_encoder = self._load()
        return self._text_encoder

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D) float32 on the pipeline's device; each distinct prompt is encoded once."""
        missing = [text for text in dict.fromkeys(prompts) if text not in self._embeddings]
        if self.cache is not None:
            found = {text: self.cache.get(text) for text in missing}
            self._embeddings.update({text: embeds_LD for text, embeds_LD in found.items() if embeds_LD is not None})
            missing = [text for text in missing if text not in self._embeddings]
        for chunk, embeds_BLD in self._encoded(missing):
            for prompt, embeds_LD in zip(chunk, embeds_BLD):
                self._embeddings[prompt] = embeds_LD
                if self.cache is not None:
                    self.cache.put(prompt, embeds_LD)
        return torch.stack([self._embeddings[text] for text in prompts]).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The same, encoded now and not remembered."""
        return torch.cat([embeds_BLD for _, embeds_BLD in self._encoded(prompts)]).to(self.device)

    def _encoded(self, prompts: Sequence[str]) -> Iterator[tuple[Sequence[str], Tensor]]:
        if not prompts:
            return
        text = self.text_encoder
        together = TOGETHER if text.nbytes < LARGE_BYTES else TOGETHER_LARGE
        with self._at_work(text):
            for start in range(0, len(prompts), together):
                chunk = prompts[start : start + together]
                yield chunk, text.encode(chunk).cpu()

    def _at_work(self, text: TextEncoder) -> AbstractContextManager[None]:
        if text.device.type != "cpu":  # it has moved there for good
            return nullcontext()
        way, device = encoding_place(self.wanted, self.device, text.nbytes)
        if way == "stream":
            return streamed(text.encoder, device)
        if way == "visit":
            return lent(text.encoder, device)
        if way == "stay":
            with torch.inference_mode(False):
                nn.Module.to(text.encoder, device)
        return nullcontext()


def encoding_place(wanted: str, device: torch.device, nbytes: int) -> tuple[str, torch.device]:
    """How an encoder of `nbytes` computes, and where.

    `stay`: on the GPU from now on. `visit`: there until the prompts are encoded. `stream`: layer by layer. `cpu`: on the host.
    `wanted` may be one of these. `auto`: the first of them that fits; half of the GPU must be free beside an encoder that stays;
    the CPU where there is no GPU. `cuda`: stays or visits.
    """
    if wanted == "cpu" or (device.type != "cuda" and wanted != "cuda"):
        return "cpu", torch.device("cpu")
    device = device if device.type == "cuda" else torch.device("cuda")
    if wanted not in ("auto", "cuda"):
        return wanted, device
    free, total = torch.cuda.mem_get_info(device)
    if free - nbytes > total / 2:
        return "stay", device
    return ("visit" if wanted == "cuda" or free > nbytes + WORKING_BYTES else "stream"), device


def prompt_encoder(
    places: Mapping[str, str],
    config: WanConfig,
    device: torch.device,
    default_dtype: torch.dtype | None,
    wanted: str = "auto",
    dtype: str = "auto",
    cache_folder: Path | None = None,
) -> PromptEncoder:
    """The prompt encoder of a network.

    Args:
        places: `text_encoder` and `tokenizer`.
        default_dtype: what `auto` means.
        wanted: a name of TEXT_DEVICES. dtype: a name of TEXT_DTYPES.
        cache_folder: None keeps nothing on disk, and the encoder is loaded now, so that a bad one is told of now.

    Raises:
        ValueError: unknown names; the encoder cannot be read, or its embeddings are not of the width that the network reads.
    """
    for name, value, allowed in (("text_device", wanted, TEXT_DEVICES), ("text_dtype", dtype, TEXT_DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
    weights = default_dtype if dtype in ("auto", "int8") else getattr(torch, dtype)

    def load() -> TextEncoder:
        text = TextEncoder.from_pretrained(
            places["text_encoder"],
            places["tokenizer"],
            dtype=weights,
            text_len=config.text_len,
            int8=dtype == "int8",
        )
        if text.width != config.text_dim:
            raise ValueError(
                f"text_encoder={places['text_encoder']!r}: gives embeddings of width {text.width}, but the network reads "
                f"{config.text_dim}; use the text encoder that it was trained with"
            )
        return text

    files = None if cache_folder is None else files_identity((places["text_encoder"], places["tokenizer"]))
    cache = None
    if cache_folder is not None and files is not None:
        settings = {"dtype": dtype, "weights": str(weights), "device": device.type, "wanted": wanted}
        cache = EmbeddingCache(cache_folder, files, config.text_len, settings)
    prompts = PromptEncoder(load, device, wanted, cache)
    if cache is None:
        _ = prompts.text_encoder
    return prompts
