"""Small Wan networks for the quantiser's tests: every structure, SLA with a trained-looking P, outlier channels on
demand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbotrain.model.attention_config import AttentionConfig
from turbotrain.model.variants import WanConfig
from turbotrain.model.wan import WanTransformer
from turbotrain.quant import ForwardCall

SLA = AttentionConfig("sla", topk=0.5, block_q=16, block_k=16)


def network(attention: AttentionConfig | None = None, seed: int = 0, image_dim: int | None = None) -> WanTransformer:
    """Random weights of the usual scale; norms, biases, modulation and P well away from their initial 1 and 0."""
    channels = 5 if image_dim else 4
    config = WanConfig(
        dim=48,
        ffn_dim=80,
        num_heads=3,
        num_layers=2,
        in_channels=channels,
        out_channels=4,
        text_dim=20,
        text_len=9,
        freq_dim=32,
        image_dim=image_dim,
        model_type="i2v" if image_dim else "t2v",
    )
    model = WanTransformer(config, attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "modulation" in name or parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def plant_outliers(model: WanTransformer, gain: float = 60.0) -> WanTransformer:
    """One loud channel at every input that smoothing can reach: the activation is loud there, the weights answer
    softly.
    """
    with torch.no_grad():
        for block in model.blocks:
            block.modulation[0, 1, 3] += gain  # scale of q, k, v's input
            block.modulation[0, 4, 5] += gain  # of ffn.0's
            block.norm3.weight[7] *= gain  # of cross q's
            block.ffn[0].weight[11] *= gain  # of ffn.2's
            block.self_attn.v.weight[2::16] *= gain  # of self o's, in every head
            block.cross_attn.v.weight[4::16] *= gain
    return model


def forward_calls(n_calls: int, seed: int = 0, image_dim: int | None = None, device: str = "cpu") -> list[ForwardCall]:
    """Calls at several times, batch 2, 2 x 4 x 12 latents: 24 tokens, two blocks of 16 with a ragged one."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    calls = []
    for index in range(n_calls):
        timestep = torch.tensor([900.0, 500.0]) / (index + 1)
        inputs = [noise(2, 4, 2, 4, 12), timestep, noise(2, 9, 20)]
        inputs += [noise(2, 1, 2, 4, 12), noise(2, 5, image_dim)] if image_dim else []
        inputs = [value.to(device) for value in inputs]
        calls.append(lambda model, inputs=inputs: model(*inputs))
    return calls


def relative(value: Tensor, reference: Tensor) -> float:
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
