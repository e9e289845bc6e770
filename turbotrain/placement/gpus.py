"""GPUs that people have, from their datasheets: what a prediction for another GPU than the measured one is scaled by.

No torch here: a plan is made before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 2**30
HOPPER = 9  # first number of its capability


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU.

    memory: bytes that the driver reports. bandwidth: of that memory, bytes/s. bf16, int8, fp8: dense operations/s with 32-bit
    accumulation (fp8 0: none). link: bytes/s from pinned host memory, about four fifths of what the bus is sold as.
    """

    name: str
    capability: tuple[int, int]
    memory: float
    bandwidth: float
    bf16: float
    int8: float
    fp8: float
    link: float

    def scaled_from(self, measured: Gpu, kind: str) -> float:
        """How many times longer this GPU takes than `measured` for work of a kind: a field name above."""
        own = getattr(self, kind)
        return getattr(measured, kind) / own if own else float("inf")


def _gpu(
    name: str, capability: tuple[int, int], gib: float, gb_s: float, bf16: float, int8: float, fp8: float, link: float
) -> Gpu:
    return Gpu(name, capability, gib * GIB, gb_s * 1e9, bf16 * 1e12, int8 * 1e12, fp8 * 1e12, link * 1e9)


_GEN5, _GEN4, _GEN4_X8 = 50.0, 25.0, 12.5

#          name, capability, GiB, GB/s, bf16, int8, fp8 in T/s, link in GB/s
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("H200", (9, 0), 139.8, 4800, 989, 1979, 1979, _GEN5),
        _gpu("H100 80GB", (9, 0), 79.6, 3350, 989, 1979, 1979, _GEN5),
        _gpu("H100 PCIe", (9, 0), 79.6, 2000, 756, 1513, 1513, _GEN5),
        _gpu("H20", (9, 0), 95.6, 4000, 148, 296, 296, _GEN5),
        _gpu("B200", (10, 0), 178.4, 8000, 2250, 4500, 4500, _GEN5),
        _gpu("A100 80GB", (8, 0), 79.3, 2039, 312, 624, 0, _GEN4),
        _gpu("A100 40GB", (8, 0), 39.5, 1555, 312, 624, 0, _GEN4),
        _gpu("A6000", (8, 6), 47.5, 768, 155, 310, 0, _GEN4),
        _gpu("A10", (8, 6), 22.5, 600, 125, 250, 0, _GEN4),
        _gpu("L40S", (8, 9), 44.5, 864, 362, 733, 733, _GEN4),
        _gpu("L4", (8, 9), 22.5, 300, 121, 242, 242, _GEN4),
        _gpu("RTX 6000 Ada", (8, 9), 47.5, 960, 364, 728, 728, _GEN4),
        _gpu("RTX PRO 6000", (12, 0), 95.0, 1792, 504, 1007, 1007, _GEN5),
        _gpu("RTX 5090", (12, 0), 31.8, 1792, 209, 838, 419, _GEN5),
        _gpu("RTX 5080", (12, 0), 15.9, 960, 113, 450, 225, _GEN5),
        _gpu("RTX 5070 Ti", (12, 0), 15.9, 896, 88, 352, 176, _GEN5),
        _gpu("RTX 5070", (12, 0), 11.9, 672, 62, 247, 123, _GEN5),
        _gpu("RTX 4090", (8, 9), 23.9, 1008, 165, 660, 330, _GEN4),
        _gpu("RTX 4080", (8, 9), 15.9, 717, 97, 390, 195, _GEN4),
        _gpu("RTX 4070 Ti SUPER", (8, 9), 15.9, 672, 88, 353, 176, _GEN4),
        _gpu("RTX 4070", (8, 9), 11.9, 504, 58, 233, 117, _GEN4),
        _gpu("RTX 4060 Ti", (8, 9), 15.9, 288, 44, 177, 88, _GEN4_X8),
        _gpu("RTX 3090", (8, 6), 23.9, 936, 71, 284, 0, _GEN4),
        _gpu("RTX 3080", (8, 6), 9.9, 760, 59, 238, 0, _GEN4),
        _gpu("RTX 3060", (8, 6), 11.9, 360, 25, 102, 0, _GEN4),
    )
}
MEASURED = GPUS["H200"]


def find_gpu(name: str) -> Gpu:
    """A GPU as the driver calls it ("NVIDIA GeForce RTX 4070 Ti SUPER"), by its name here, or by words of that name ("4070").

    Raises:
        ValueError: none, or several alike.
    """
    wanted = _words(name)
    inside = [gpu for gpu in GPUS.values() if _words(gpu.name) <= wanted]
    if inside:  # the driver's name of one has the words of shorter ones too
        return max(inside, key=lambda gpu: len(_words(gpu.name)))
    around = sorted((gpu for gpu in GPUS.values() if wanted <= _words(gpu.name)), key=lambda gpu: len(_words(gpu.name)))
    if (
        wanted
        and around
        and len(_words(around[0].name)) < min((len(_words(gpu.name)) for gpu in around[1:]), default=99)
    ):
        return around[0]
    names = ", ".join(gpu.name for gpu in around or GPUS.values())
    raise ValueError(f"gpu={name!r}: choose one of {names}; for another one say memory=SIZE and the nearest of these")


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", re.sub(r"rtx(?=\d)", "rtx ", name.lower())))
