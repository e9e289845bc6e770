"""Codec stage: the shapes world's VAE and text encoder, the real classes at tiny size (diffusers, transformers).

The VAE learns to reconstruct rendered clips. The umT5 encoder learns that every word of an object's phrase tells the object's
place in the caption and all its attributes, and every word the background: then attributes stay bound to their objects in the
embeddings that the DiT attends to. The linear probes that ask for this are thrown away.

Legend: B batch, L tokens, D text width, T frames, H, W pixels, C channels.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from turbotrain.checkpoint.atomic import new_folder
from turbotrain.codecs.text import TextEncoder
from turbotrain.codecs.vae import VideoCodec, frames_to_pixels
from turbotrain.codecs.whole_clip import posterior, reconstruct
from turbotrain.data.shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    FRAMES,
    Scene,
    render_batch,
    render_parallel,
    sample_clips,
    vocabulary,
)
from turbotrain.evaluation.readings import judge_clips
from turbotrain.stages.context import StageContext
from turbotrain.training.seeding import derive_seed

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
POOL = 8_192 * FRAMES  # rendered frames that the VAE trains on, in clips of the recipe's length
JUDGED = 256
KL_WEIGHT = 3e-6
RATE, RATE_OF_A_START = 1e-3, 4e-4  # the latter where there is something to keep: latents that a teacher knows


def run(context: StageContext) -> dict[str, object]:
    section = context.config.codec
    return train_codec(
        context.checkpoint,
        device=context.device,
        seed=context.config.seed,
        steps=section.steps,
        decoder_steps=section.decoder_steps,
        batch_size=section.batch_size,
        text_steps=section.text_steps,
        frames=context.config.data.frames,
        start=context.inputs.get("start"),
        say=context.say,
    )


def train_codec(
    folder: Path,
    *,
    device: torch.device,
    seed: int,
    steps: int,
    decoder_steps: int,
    batch_size: int,
    text_steps: int,
    frames: int = FRAMES,
    start: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, object]:
    """Train both and write `vae/`, `text_encoder/` and `tokenizer/` under `folder`, complete or not at all.

    Args:
        frames: of the clips that the VAE learns: it knows only such lengths as it has seen.
        start: a folder with a codec; its VAE is trained on, its text encoder is taken as it is.

    Returns:
        PSNR (dB) and judged accuracy of reconstructed held-out clips, and the accuracy of a text probe that was trained.
    """
    torch.manual_seed(derive_seed(seed, "codec"))
    vae, metrics = train_vae(device, seed, steps, decoder_steps, batch_size, say, frames, start)
    text: TextEncoder | None = None
    if start is None:
        text, text_metrics = train_text(device, seed, text_steps, say)
        metrics.update(text_metrics)
    with new_folder(folder) as new:
        vae.half().save_pretrained(new / "vae")
        if text is not None:
            text.encoder.save_pretrained(new / "text_encoder")
            text.tokenizer.save_pretrained(new / "tokenizer")
        elif start is not None:
            for name in ("text_encoder", "tokenizer"):
                shutil.copytree(start / name, new / name)
    return metrics


# ---- the VAE -------------------------------------------------------------------------------------------------------


def tiny_vae() -> AutoencoderKLWan:
    """4x in time, 8x in space (2x by patches, as Wan 2.2's), 24 latent channels: a clip decodes in about a tenth of a second on
    two cores."""
    channels = 24
    return AutoencoderKLWan(
        base_dim=16,
        z_dim=channels,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
    )


class Reconstruction(nn.Module):
    """Squared and absolute error of a clip through the VAE, objects weighing as much as the ground, and a trace of KL."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels_BCTHW: Tensor, weight_B1THW: Tensor) -> Tensor:
        latents = posterior(self.vae, pixels_BCTHW)
        loss = weighted_error(reconstruct(self.vae, latents.sample()), pixels_BCTHW, weight_B1THW)
        return loss + KL_WEIGHT * latents.kl().float().mean()


class Decoding(nn.Module):
    """The same error of a clip decoded from latents that stay as they are."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents_BCTHW: Tensor, pixels_BCTHW: Tensor, weight_B1THW: Tensor) -> Tensor:
        return weighted_error(reconstruct(self.vae, latents_BCTHW), pixels_BCTHW, weight_B1THW)


def weighted_error(got_BCTHW: Tensor, pixels_BCTHW: Tensor, weight_B1THW: Tensor) -> Tensor:
    error = got_BCTHW.float() - pixels_BCTHW
    return (weight_B1THW * (3 * error.square() + 0.3 * error.abs())).mean()


def object_weight(pixels_BCTHW: Tensor) -> Tensor:
    """(B, 1, T, H, W): 6 on objects and up to 3 pixels around them, 1 elsewhere. Objects cover a tenth of a clip: unweighted, an
    empty ground is a deep local minimum; with a weight that ends at their edge, the notches of a cross are filled in."""
    ground = pixels_BCTHW.flatten(2).median(-1).values[..., None, None, None]
    objects_B1THW = ((pixels_BCTHW - ground).abs().amax(1, keepdim=True) > 0.1).float()
    return 1 + 5 * F.max_pool3d(objects_B1THW, (1, 7, 7), stride=1, padding=(0, 3, 3))


def train_vae(
    device: torch.device,
    seed: int,
    steps: int,
    decoder_steps: int,
    batch_size: int,
    say: Callable[[str], None],
    frames: int = FRAMES,
    start: Path | None = None,
) -> tuple[AutoencoderKLWan, dict[str, object]]:
    """Train the VAE to reconstruct, then its decoder alone; measure the latents' mean and spread."""
    clips = render_parallel(min(max(1, POOL // frames), steps * batch_size), seed, frames=frames)
    pool = torch.from_numpy(clips).to(device)
    vae = tiny_vae()
    if start is not None:
        vae.load_state_dict(VideoCodec.from_pretrained(start / "vae").vae.state_dict())
    nn.Module.to(vae, device)  # diffusers' decorator hides the signature of its own `to`

    def reconstruction_batch(rows: Tensor) -> tuple[Tensor, ...]:
        pixels = frames_to_pixels(pool[rows], torch.float32)
        return pixels, object_weight(pixels)

    generator = torch.Generator().manual_seed(derive_seed(seed, "vae batches"))
    batches = (torch.randint(len(pool), (batch_size,), generator=generator).to(device) for _ in range(steps))
    _fit(
        "vae",
        Reconstruction(vae),
        map(reconstruction_batch, batches),
        steps,
        RATE if start is None else RATE_OF_A_START,
        say,
    )
    train_decoder(vae, pool, seed, decoder_steps, batch_size, say)
    vae.half().float().eval()  # it ships in float16: what is measured from here on is what ships
    mean, std = _latent_statistics(vae, pool[: min(len(pool), 1024)])
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return vae, reconstruction_metrics(VideoCodec(vae), seed, frames, device)


def train_decoder(
    vae: AutoencoderKLWan, pool_BTHWC: Tensor, seed: int, steps: int, batch_size: int, say: Callable[[str], None]
) -> None:
    """Train the decoder alone on the latents of `pool_BTHWC`: sharper clips from latents that networks already know."""
    if not steps:
        return
    with torch.no_grad():
        parts = [posterior(vae, frames_to_pixels(part, torch.float32)) for part in pool_BTHWC.split(64)]
        means, stds = torch.cat([part.mode() for part in parts]), torch.cat([part.std for part in parts])
    vae.requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)

    def batch(rows: Tensor) -> tuple[Tensor, ...]:
        pixels = frames_to_pixels(pool_BTHWC[rows], torch.float32)
        return means[rows] + stds[rows] * torch.randn_like(means[rows]), pixels, object_weight(pixels)

    generator = torch.Generator().manual_seed(derive_seed(seed, "decoder batches"))
    draws = (torch.randint(len(means), (batch_size,), generator=generator).to(means.device) for _ in range(steps))
    _fit("decoder", Decoding(vae), map(batch, draws), steps, 5e-4, say)


def _fit(
    name: str,
    objective: nn.Module,
    batches: Iterator[tuple[Tensor, ...]],
    steps: int,
    lr: float,
    say: Callable[[str], None],
) -> None:
    """Minimise objective(*batch) over the batches."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    on_gpu = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=on_gpu)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps))
    for step, batch in enumerate(batches):
        if step == 0 and on_gpu:
            # A small VAE is thousands of tiny kernels: replaying a graph of them is several times faster than launching them.
            torch.backends.cudnn.benchmark = True
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                # Of a module it makes a module.
                objective = cast(nn.Module, torch.cuda.make_graphed_callables(objective, batch))
        loss = objective(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            say(f"{name} {step + 1}/{steps}  loss {loss.item():.4f}")


def _warm_cosine(steps: int) -> Callable[[int], float]:
    """Factor of the learning rate by step: up in the first 100 steps (a tenth of a short run), then down to nothing."""
    warmup = max(1, min(100, steps // 10))
    return lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _latent_statistics(vae: AutoencoderKLWan, frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation (C,) of the posterior's mode."""
    latents = [posterior(vae, frames_to_pixels(part, torch.float32)).mode() for part in frames_BTHWC.split(64)]
    by_channel = torch.cat(latents).transpose(0, 1).flatten(1).double()
    return by_channel.mean(1), by_channel.std(1)


def reconstruction_metrics(
    codec: VideoCodec, seed: int, frames: int = FRAMES, device: torch.device | str = "cpu"
) -> dict[str, object]:
    """PSNR and judged accuracy of held-out clips that went through the codec; `device`: where they are judged."""
    errors, scores = [], []
    for begin in range(0, JUDGED, 32):
        clips = sample_clips(min(32, JUDGED - begin), seed, split="test", start=begin)
        part = torch.from_numpy(render_batch(clips, frames))
        again = codec.decode(codec.encode(part)).to(device)
        errors.append((again.double() - part.to(device).double()).square().mean((1, 2, 3, 4)))
        scores.append(judge_clips(again, [clip.scene for clip in clips]).accuracy_B)
    return {
        "psnr_db": float(10 * torch.log10(255**2 / torch.cat(errors).mean())),
        "judged_accuracy": float(torch.cat(scores).mean()),
    }


# ---- the text encoder ----------------------------------------------------------------------------------------------


def make_tokenizer(text_len: int) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the world's vocabulary that ends every prompt, also the empty one, with `</s>` as umT5 does."""
    words = {word: index for index, word in enumerate((PAD, END, UNKNOWN, *vocabulary()))}
    backend = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()  # type: ignore[assignment]  # a property of the Rust object
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {END}", special_tokens=[(END, words[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=text_len
    )


def tiny_text_encoder(text_len: int = 32) -> TextEncoder:
    tokenizer = make_tokenizer(text_len)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_max_distance=text_len,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return TextEncoder(UMT5EncoderModel(config), tokenizer, text_len)


def train_text(
    device: torch.device, seed: int, steps: int, say: Callable[[str], None], batch_size: int = 256
) -> tuple[TextEncoder, dict[str, object]]:
    """Train the encoder through its probes; embeddings leave with unit mean square."""
    text = tiny_text_encoder()
    encoder = text.encoder.train().requires_grad_(True)
    nn.Module.to(encoder, device)  # transformers' decorator hides the signature of its own `to`
    probes = nn.ModuleDict(
        {name: nn.Linear(encoder.config.d_model, len(values)) for name, values in _targets().items()}
    )
    probes.to(device)
    parameters = [*encoder.parameters(), *probes.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps))
    correct = 0.0
    for step in range(steps):
        scenes = sample_clips(batch_size, seed, split="train", start=step * batch_size)
        loss, correct, _ = _probe(text, probes, [(clip.caption, clip.scene) for clip in scenes])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0 or step == steps - 1:
            say(f"text {step + 1}/{steps}  loss {loss.item():.4f}  probe accuracy {correct:.4f}")
    encoder.eval().requires_grad_(False)
    held_out = [(clip.caption, clip.scene) for clip in sample_clips(1024, seed, split="test")]
    with torch.no_grad():
        _, correct, embeds_MD = _probe(text, probes, held_out)
        encoder.encoder.final_layer_norm.weight.div_(embeds_MD.square().mean().sqrt())
    return text, {"text_probe_accuracy": correct}


def _targets() -> dict[str, Sequence[str]]:
    return {"slot": ("first", "second"), **ATTRIBUTES, "background": tuple(BACKGROUNDS)}


def _probe(
    text: TextEncoder, probes: nn.ModuleDict, captions: Sequence[tuple[str, Scene]]
) -> tuple[Tensor, float, Tensor]:
    """Mean cross-entropy of the probes, their mean accuracy, and the embeddings (M, D) of all real tokens."""
    device = text.encoder.device
    tokens = text.tokenizer(
        [caption for caption, _ in captions], padding="max_length", max_length=text.text_len, return_tensors="pt"
    )
    mask_BL = tokens["attention_mask"].bool().to(device)
    embeds_BLD = text.encoder(input_ids=tokens["input_ids"].to(device), attention_mask=mask_BL).last_hidden_state
    labels = _labels(text, tokens["input_ids"], [scene for _, scene in captions])
    losses, correct = [], []
    for name, probe in probes.items():
        label_BL = labels[name].to(device)
        asked_BL = (label_BL >= 0) & mask_BL
        logits_MK, label_M = probe(embeds_BLD[asked_BL]), label_BL[asked_BL]
        losses.append(F.cross_entropy(logits_MK, label_M))
        correct.append((logits_MK.argmax(-1) == label_M).float().mean())
    return torch.stack(losses).mean(), float(torch.stack(correct).mean()), embeds_BLD[mask_BL]


def _labels(text: TextEncoder, ids_BL: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """For every probe the class (B, L) that each token should tell, -1 where it is not asked."""
    targets = _targets()
    labels = {name: torch.full(ids_BL.shape, -1) for name in targets}
    for row, scene in enumerate(scenes):
        labels["background"][row] = list(BACKGROUNDS).index(scene.background)
        words = text.tokenizer.convert_ids_to_tokens(ids_BL[row].tolist())
        for slot, (spec, span) in enumerate(zip(scene.objects, _phrases(words), strict=True)):
            labels["slot"][row, span] = slot
            for name in ATTRIBUTES:
                labels[name][row, span] = list(ATTRIBUTES[name]).index(getattr(spec, name))
    return labels


def _phrases(words: Sequence[str]) -> Iterator[slice]:
    """The tokens of each object's phrase: from its size to its speed."""
    begin = None
    for index, word in enumerate(words):
        if word in ATTRIBUTES["size"]:
            begin = index
        elif word in ATTRIBUTES["speed"] and begin is not None:
            yield slice(begin, index + 1)
            begin = None
