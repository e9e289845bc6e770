"""Rotary tables against the published definition, and the order of tokens in blocks."""

from __future__ import annotations

import pytest
import torch

from turbotrain.model.rope import axis_pairs, cube_shape, inverse_order, rope_table, token_order

CPU = torch.device("cpu")


def test_axis_split_of_the_published_head() -> None:
    assert axis_pairs(128) == (22, 21, 21)
    assert all(sum(axis_pairs(head)) == head // 2 for head in (8, 16, 32, 64, 96, 128))


@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_table_is_the_published_one(head_dim: int) -> None:
    grid = (2, 3, 5)
    table = rope_table(grid, head_dim, None, CPU, torch.float64)
    widths = [head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)]
    for token, position in enumerate((t, h, w) for t in range(2) for h in range(3) for w in range(5)):
        angles = [p / 10_000 ** (2 * j / width) for p, width in zip(position, widths) for j in range(width // 2)]
        exact = torch.tensor(angles, dtype=torch.float64)
        assert torch.allclose(table[0, token], exact.cos(), atol=1e-14)
        assert torch.allclose(table[1, token], exact.sin(), atol=1e-14)
    assert rope_table(grid, head_dim, None, CPU, torch.float32).dtype == torch.float32


def test_table_made_while_sampling_can_be_trained_with() -> None:
    with torch.inference_mode():
        table = rope_table((1, 2, 7), 8, 16, CPU, torch.float32)
    x = torch.zeros(14, 4, requires_grad=True)
    (x * table).abs().sum().backward()


GRIDS = [(4, 8, 8), (21, 30, 52), (1, 16, 16), (3, 5, 7), (31, 22, 40), (2, 2, 33), (1, 1, 3)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("block", [16, 64, 128])
def test_every_block_is_compact(grid: tuple[int, int, int], block: int) -> None:
    """A block's bounding box holds few tokens of other blocks, and its sides are near those of the intended box."""
    order = token_order(grid, block, CPU)
    assert order is not None
    assert torch.equal(order.sort().values, torch.arange(order.numel()))
    assert torch.equal(order[inverse_order(grid, block, CPU)], torch.arange(order.numel()))
    positions = torch.stack(torch.unravel_index(order, grid), dim=1)
    parts = [positions[start : start + block] for start in range(0, order.numel(), block)]
    extents = torch.stack([part.amax(0) - part.amin(0) + 1 for part in parts]).float()
    assert extents.prod(1).mean() <= 1.5 * block
    assert (extents.mean(0) <= 1.3 * torch.tensor(cube_shape(grid, block)) + 1).all()


@pytest.mark.parametrize(
    ("grid", "block", "box"), [((4, 8, 8), 16, (2, 2, 4)), ((4, 8, 8), 64, (4, 4, 4)), ((1, 16, 16), 64, (1, 8, 8))]
)
def test_a_box_that_divides_the_grid_is_exact(
    grid: tuple[int, int, int], block: int, box: tuple[int, int, int]
) -> None:
    assert cube_shape(grid, block) == box
    order = token_order(grid, block, CPU)
    assert order is not None
    positions = torch.stack(torch.unravel_index(order, grid), dim=1).view(-1, block, 3)
    extents = positions.amax(1) - positions.amin(1) + 1
    assert (extents == torch.tensor(box)).all()


def test_raster_is_no_permutation() -> None:
    assert token_order((2, 3, 4), None, CPU) is None
