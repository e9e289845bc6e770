"""What ships for the 81-frame world does what its page says."""

from __future__ import annotations

import torch

from turbotrain.checkpoint import read_meta
from turbotrain.codecs import VideoCodec
from turbotrain.config import resolve
from turbotrain.data.shapes import render_batch, sample_clips
from turbotrain.evaluation.readings import judge_clips

ASSET = resolve("asset:shapes_h200")


def test_its_vae_knows_long_clips() -> None:
    clips = sample_clips(1, seed=11, split="test", pairs=1.0)
    frames = torch.from_numpy(render_batch(clips, 33))
    codec = VideoCodec.from_pretrained(ASSET / "vae")
    again = codec.decode(codec.encode(frames))
    error_T = (again.float() - frames.float()).square().mean((0, 2, 3, 4))
    psnr_T = 10 * torch.log10(255**2 / error_T)
    assert psnr_T.min() > 28, psnr_T  # that of 13 frames has less than 10 dB from the 24th on
    assert judge_clips(again, [clips[0].scene]).accuracy_B.item() == 1.0


def test_its_network_says_where_it_comes_from() -> None:
    meta = read_meta(ASSET)
    assert [entry["stage"] for entry in meta.lineage] == ["teacher", "teacher"]
    assert meta.attention["kind"] == "dense"
    assert set(meta.components) == {"vae", "text_encoder", "tokenizer"}
    assert not any("/" in place for place in meta.components.values())
