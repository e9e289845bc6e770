"""The shapes judge over many clips at once, on any device: what thousands of videos are read with.

`judge.read_clip` is the specification and reads one clip in numpy; here the same steps are tensor operations over a batch, so
that 2,048 clips of 81 frames take seconds on a GPU. What is read beside the attributes (`steady`) is for temporal consistency.

Legend: B clips, T frames, H, W pixels, C colour channels, K colours, S objects of a caption (at most 2), A attributes of an
object in the order of `ATTRIBUTES`, P window rows/columns. Coordinates are (y, x) in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from turbotrain.data.shapes import ATTRIBUTES, GRID, Scene
from turbotrain.data.shapes_render import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZE,
    SIZES,
    SPEEDS,
    pace,
    signed_distance,
)
from turbotrain.evaluation.judge import CONTRAST, HALF, LEAST_AREA, LEAST_FRAMES, LEAST_MOTION, MEAN_SPEED

NAMES = tuple(ATTRIBUTES)
MOST_OBJECTS = 2
# A frame is steady where an object lies this near its straight path and covers so nearly its usual area.
OFF_PATH, OFF_AREA = 1.0, 0.2


@dataclass(frozen=True)
class Judgements:
    """What holds of each clip's caption. Objects that a caption does not name are False, 0 and nan.

    Attributes:
        named_BS: whether the caption has that object. right_BSA: its attributes read right; ground_B: the background.
        start_BS2: where the object began. steady_BS: the share of frames in which it kept its path and its area.
        found_BS: whether shape and colour are right, so that the start is its own.
    """

    named_BS: Tensor
    right_BSA: Tensor
    ground_B: Tensor
    start_BS2: Tensor
    steady_BS: Tensor

    @property
    def found_BS(self) -> Tensor:
        return self.right_BSA[..., NAMES.index("shape")] & self.right_BSA[..., NAMES.index("colour")]

    @property
    def accuracy_B(self) -> Tensor:
        """Fraction of the captioned attributes read right, as `judge.Judgement.accuracy`."""
        claims_B = len(NAMES) * self.named_BS.sum(1) + 1
        return (self.right_BSA.sum((1, 2)) + self.ground_B) / claims_B

    @property
    def cell_BS(self) -> Tensor:
        """Index of the GRID x GRID cell in which the object began; -1 where it was not found."""
        row_column = (self.start_BS2 * GRID / SIZE).nan_to_num().long().clamp(0, GRID - 1)
        return torch.where(self.found_BS, row_column[..., 0] * GRID + row_column[..., 1], -1)

    def cpu(self) -> Judgements:
        return Judgements(*(getattr(self, field.name).cpu() for field in fields(self)))

    @staticmethod
    def joined(parts: Iterable[Judgements]) -> Judgements:
        parts = list(parts)
        return Judgements(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Judgements)))


@dataclass(frozen=True)
class Readings:
    """What is seen of each clip, whatever its caption says: its background's index, and of the two objects that cover most the
    attributes' indices (-1 where unreadable), the first centre, and the share of steady frames.
    """

    ground_B: Tensor
    values_BSA: Tensor
    start_BS2: Tensor
    steady_BS: Tensor


def judge_clips(frames_BTHWC: Tensor, scenes: Sequence[Scene]) -> Judgements:
    """Compare clips, uint8 (B, T, 64, 64, 3), with what their captions say.

    Raises:
        ValueError: frames of another shape, or not one scene a clip.
    """
    return compare(read_clips(frames_BTHWC), scenes)


def compare(read: Readings, scenes: Sequence[Scene]) -> Judgements:
    """What was read of clips against captions: their own, or others', which tells the level of chance.

    Raises:
        ValueError: not one scene a clip.
    """
    if len(scenes) != len(read.ground_B):
        raise ValueError(f"{len(scenes)} scenes for {len(read.ground_B)} clips: expected one a clip")
    named_BS, wanted_BSA, ground_B = (tensor.to(read.ground_B.device) for tensor in _wanted(scenes))
    # Only as many objects are looked for as the caption names: the most covering ones.
    values_BSA = torch.where(named_BS[..., None], read.values_BSA, -1)
    right = values_BSA == wanted_BSA
    crossed = values_BSA.flip(1) == wanted_BSA
    # Objects are matched to phrases in the order that agrees best; of equals, the first.
    both_B = named_BS.all(1)
    swap_B = both_B & (crossed.sum((1, 2)) > right.sum((1, 2)))
    right_BSA = torch.where(swap_B[:, None, None], crossed, right) & named_BS[..., None]
    start_BS2 = torch.where(swap_B[:, None, None], read.start_BS2.flip(1), read.start_BS2)
    steady_BS = torch.where(swap_B[:, None], read.steady_BS.flip(1), read.steady_BS) * named_BS
    start_BS2 = torch.where(named_BS[..., None], start_BS2, torch.nan)
    return Judgements(named_BS, right_BSA, read.ground_B == ground_B, start_BS2, steady_BS)


def _wanted(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """named (B, S), attribute indices (B, S, A) and background indices (B,)."""
    named_BS = torch.tensor([[slot < len(scene.objects) for slot in range(MOST_OBJECTS)] for scene in scenes])
    wanted_BSA = torch.full((len(scenes), MOST_OBJECTS, len(NAMES)), -2)
    for row, scene in enumerate(scenes):
        for slot, spec in enumerate(scene.objects):
            indices = [ATTRIBUTES[name].index(getattr(spec, name)) for name in NAMES]
            wanted_BSA[row, slot] = torch.tensor(indices)
    grounds = list(BACKGROUNDS)
    return named_BS, wanted_BSA, torch.tensor([grounds.index(scene.background) for scene in scenes])


def read_clips(frames_BTHWC: Tensor) -> Readings:
    """Read clips, uint8 (B, T, 64, 64, 3). Raises ValueError for frames of another shape."""
    if frames_BTHWC.ndim != 5 or frames_BTHWC.shape[2:] != (SIZE, SIZE, 3) or frames_BTHWC.dtype != torch.uint8:
        given = f"{tuple(frames_BTHWC.shape)} {frames_BTHWC.dtype}"
        raise ValueError(f"frames are {given}: the judge reads uint8 (B, T, {SIZE}, {SIZE}, 3)")
    device = frames_BTHWC.device
    ground_BC = _median(frames_BTHWC.flatten(1, 3))
    palette_KC = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)
    background_B = (palette_KC - ground_BC[:, None]).square().sum(-1).argmin(1)
    colour_BTHW, share_BTHW = _coverage_by_colour(frames_BTHWC.float(), ground_BC)
    per_colour = [(share_BTHW * (colour_BTHW == index)).sum((2, 3)) for index in range(len(COLOURS))]
    area_BKT = torch.stack(per_colour, 1)
    order_BK = area_BKT.mean(2).argsort(dim=1, descending=True, stable=True)
    slots = []
    for slot in range(MOST_OBJECTS):
        chosen_B = order_BK[:, slot]
        cover_BTHW = share_BTHW * (colour_BTHW == chosen_B[:, None, None, None])
        area_BT = area_BKT.gather(1, chosen_B[:, None, None].expand(-1, 1, area_BKT.shape[2]))[:, 0]
        slots.append(_read_object(chosen_B, cover_BTHW, area_BT))
    return Readings(background_B, *(torch.stack(parts, 1) for parts in zip(*slots, strict=True)))


def _median(values_BNC: Tensor) -> Tensor:
    """Median over N of uint8 values, of an even count the mean of the middle two: (B, C) float32. By bisection of the 256
    values, which takes eight passes and no sorting."""
    count = values_BNC.shape[1]

    def ranked(rank: int) -> Tensor:
        low = torch.zeros(values_BNC.shape[0], values_BNC.shape[2], dtype=torch.int64, device=values_BNC.device)
        high = torch.full_like(low, 255)
        for _ in range(8):
            middle = (low + high) // 2
            enough = (values_BNC <= middle[:, None].to(torch.uint8)).sum(1) >= rank
            low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
        return low.float()

    return (ranked((count + 1) // 2) + ranked(count // 2 + 1)) / 2


def _coverage_by_colour(pixels_BTHWC: Tensor, ground_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pixel the colour (B, T, H, W) that explains it best, and how much of it that colour covers; 0 on the ground."""
    excess_BTHWC = pixels_BTHWC - ground_BC[:, None, None, None]
    direction_BKC = (
        torch.tensor(list(COLOURS.values()), dtype=torch.float32, device=pixels_BTHWC.device) - ground_BC[:, None]
    )
    best = torch.full(pixels_BTHWC.shape[:4], torch.inf, device=pixels_BTHWC.device)
    colour_BTHW = torch.zeros_like(best, dtype=torch.int8)
    share_BTHW = torch.zeros_like(best)
    for index, direction_BC in enumerate(direction_BKC.unbind(1)):
        along_BTHW = torch.einsum("bthwc,bc->bthw", excess_BTHWC, direction_BC)
        share = (along_BTHW / (direction_BC.square().sum(1) + 1e-6)[:, None, None, None]).clamp(0, 1)
        misfit = (excess_BTHWC - share[..., None] * direction_BC[:, None, None, None]).square().sum(-1)
        better = misfit < best
        best = torch.where(better, misfit, best)
        share_BTHW = torch.where(better, share, share_BTHW)
        colour_BTHW.masked_fill_(better, index)
    strong_BTHW = excess_BTHWC.square().sum(-1) > CONTRAST**2
    return colour_BTHW, share_BTHW * strong_BTHW


def _read_object(colour_B: Tensor, cover_BTHW: Tensor, area_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(attribute indices (B, A), -1 where unreadable; first centre (B, 2); share of steady frames (B,))."""
    frames = area_BT.shape[1]
    visible_B = area_BT.mean(1) >= LEAST_AREA
    present_BT = (area_BT >= LEAST_AREA) & visible_B[:, None]
    axis = torch.arange(SIZE, device=area_BT.device) + 0.5
    mass_BT = area_BT.clamp_min(1e-6)
    centre_BT2 = torch.stack([cover_BTHW.sum(3) @ axis / mass_BT, cover_BTHW.sum(2) @ axis / mass_BT], -1)
    shape_B, size_B = _match_template(cover_BTHW, centre_BT2, present_BT)
    slope_B2, path_BT2 = _straight(centre_BT2.double(), present_BT)
    enough_B = present_BT.sum(1) >= LEAST_FRAMES
    slope_B2 = slope_B2 * enough_B[:, None]
    distance_B = slope_B2.abs().amax(1) / pace(frames)
    moves_B = enough_B & (distance_B >= LEAST_MOTION)
    ways = torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64, device=area_BT.device)
    direction_B = torch.where(moves_B, (slope_B2 @ ways.T).argmax(1), -1)
    by_speed = sorted(range(len(SPEEDS)), key=list(SPEEDS.values()).__getitem__)
    speed_B = torch.where(moves_B, torch.where(distance_B < MEAN_SPEED, by_speed[0], by_speed[-1]), -1)
    read = {"shape": shape_B, "colour": colour_B, "size": size_B, "direction": direction_B, "speed": speed_B}
    values_BA = torch.where(visible_B[:, None], torch.stack([read[name] for name in NAMES], 1), -1)
    first_B = present_BT.int().argmax(1)
    start_B2 = centre_BT2[torch.arange(len(first_B), device=first_B.device), first_B] - slope_B2 * first_B[:, None]
    usual_B1 = torch.where(present_BT, area_BT, torch.nan).nanmedian(1, keepdim=True).values
    on_path_BT = (centre_BT2 - path_BT2).norm(dim=-1) <= OFF_PATH
    same_area_BT = (area_BT / usual_B1 - 1).abs() <= OFF_AREA
    steady_B = (present_BT & on_path_BT & same_area_BT).float().mean(1)
    return values_BA, start_B2.float(), steady_B


def _straight(centre_BT2: Tensor, present_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares over the frames where an object is seen: slope (B, 2) in pixels a frame, and its path (B, T, 2)."""
    weight_BT1 = present_BT.double()[..., None]
    count_B11 = weight_BT1.sum(1, keepdim=True).clamp_min(1)
    time_T1 = torch.arange(centre_BT2.shape[1], dtype=torch.float64, device=centre_BT2.device)[:, None]
    mean_time = (weight_BT1 * time_T1).sum(1, keepdim=True) / count_B11
    mean_place = (weight_BT1 * centre_BT2).sum(1, keepdim=True) / count_B11
    spread = (weight_BT1 * (time_T1 - mean_time).square()).sum(1, keepdim=True).clamp_min(1e-12)
    slope_B12 = (weight_BT1 * (time_T1 - mean_time) * (centre_BT2 - mean_place)).sum(1, keepdim=True) / spread
    return slope_B12[:, 0], mean_place + slope_B12 * (time_T1 - mean_time)


def _match_template(cover_BTHW: Tensor, centre_BT2: Tensor, present_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B,) of the shape and the size whose picture at these centres differs least from the coverage."""
    pad = HALF + 1
    corner_BT2 = centre_BT2.floor().long().clamp(0, SIZE - 1) - HALF
    offset_P = torch.arange(2 * HALF + 1, device=cover_BTHW.device)
    rows_BTP1 = (corner_BT2[..., :1] + pad + offset_P)[..., None]
    columns_BT1P = (corner_BT2[..., 1:] + pad + offset_P)[..., None, :]
    padded = torch.nn.functional.pad(cover_BTHW, (pad, pad, pad, pad)).flatten(2)
    places = (rows_BTP1 * (SIZE + 2 * pad) + columns_BT1P).flatten(2)
    window_BTPP = padded.gather(2, places).unflatten(2, (2 * HALF + 1, 2 * HALF + 1))
    dy_BTP1 = (corner_BT2[..., :1] + offset_P + 0.5 - centre_BT2[..., :1])[..., None]
    dx_BT1P = (corner_BT2[..., 1:] + offset_P + 0.5 - centre_BT2[..., 1:])[..., None, :]
    dy_BTPP, dx_BTPP = torch.broadcast_tensors(dy_BTP1, dx_BT1P)
    misfits = [
        ((0.5 - signed_distance(shape, dy_BTPP, dx_BTPP, radius, torch)).clamp(0, 1) - window_BTPP).abs().sum((2, 3))
        for shape in SHAPES
        for radius in SIZES.values()
    ]
    best_B = (torch.stack(misfits, 2) * present_BT[..., None]).sum(1).argmin(1)
    return best_B // len(SIZES), best_B % len(SIZES)
