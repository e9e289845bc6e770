"""Kernels of a video VAE compile for GPUs that are not here: tensor cores that nobody waits for, and next to no spilling."""

from __future__ import annotations

import pytest
import triton
from compile_tools import SHARED_LIMIT, Build, compile_all, tile_type
from turbokernels.conv3d.kernel import launches as conv3d_launches
from turbokernels.fused_rms_silu.kernel import launches as norm_launches
from turbokernels.tuning import GLUON_VERSIONS, Launch


def conv3d_build(taps: tuple[int, int, int], launch: Launch) -> Build:
    first, second, width, depth = (launch[name] for name in ("N1", "N2", "WIDTH", "DEPTH"))
    types = {"x": tile_type("bf16", 1, 1, width, depth), "p_bias": "*bf16"}
    types |= {"w1": tile_type("bf16", first, depth), "y1": tile_type("bf16", 1, 2, width, first)}
    types |= dict.fromkeys(("n_t", "n_h", "n_w", "n_in", "n_out", "shift_h", "shift_w"), "i32")
    constants = dict(zip(("TAPS_T", "TAPS_H", "TAPS_W"), taps)) | {
        name: launch[name] for name in ("X_SLOTS", "W_SLOTS")
    }
    if second:
        types |= {"w2": tile_type("bf16", second, depth), "y2": tile_type("bf16", 1, 2, width, second)}
    else:
        constants |= {"w2": None, "y2": None}
    kernel = "turbokernels.conv3d.kernel_hopper:conv3d_kernel"
    return Build(kernel, types, constants, launch.num_warps, 1, ("n_in", "n_out"))


LAYERS = [((3, 3, 3), 96, 96), ((3, 3, 3), 192, 192), ((1, 2, 2), 96, 16)]


@pytest.mark.skipif(tuple(map(int, triton.__version__.split(".")[:2])) not in GLUON_VERSIONS, reason="another Gluon")
def test_convolution_on_hopper() -> None:
    builds = [conv3d_build(taps, conv3d_launches(taps[1], n_in, n_out)[0]) for taps, n_in, n_out in LAYERS]
    for build, result in zip(builds, compile_all(builds, 90)):
        columns = 1 if build.constants.get("w2", 0) is None else 2
        assert all(name.startswith("wgmma.mma_async") for name in result.matrix_instructions)
        assert len(result.matrix_instructions) == columns
        # The newest step's products stay in flight, for each of three consumers and every tap in height.
        waits = result.ptx.count(f"wgmma.wait_group.sync.aligned {columns}")
        assert waits == 3 * int(build.constants["TAPS_H"] or 0)
        assert result.spills <= 16, build  # of the warp that copies, which has 32 registers
        assert result.shared <= SHARED_LIMIT[90]


@pytest.mark.parametrize("arch", [80, 90])
def test_norm(arch: int) -> None:
    builds = []
    for channels in (96, 1024):
        launch = norm_launches(channels)[0]
        types = {"p_x": "*bf16", "p_weight": "*bf16", "p_residual": "*bf16", "p_total": "*bf16", "p_out": "*bf16"}
        types |= {"length": "i32", "stride_out": "i32"}
        constants = {"CHANNELS": channels, "BLOCK_C": triton.next_power_of_2(channels), **dict(launch.blocks)}
        kernel = "turbokernels.fused_rms_silu.kernel:_rms_silu_kernel"
        builds.append(Build(kernel, types, constants, launch.num_warps, 1))
    for result in compile_all(builds, arch):
        assert result.spills == 0
        assert result.registers <= 128
        assert "ld.global.v4" in result.ptx or "ld.global.L1::no_allocate.v4" in result.ptx  # 16 bytes at a time
