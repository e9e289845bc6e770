"""Losses of method.md, sections 2 to 4: pure functions of velocities and tensors (no config, device or randomness in
them)."""

from turbotrain.losses.common import LossOutput
from turbotrain.losses.consistency import boundary_consistency, dcm, scm
from turbotrain.losses.dmd import backward_simulation, critic, dmd
from turbotrain.losses.flow import flow_matching, sla_alignment

__all__ = [
    "LossOutput",
    "backward_simulation",
    "boundary_consistency",
    "critic",
    "dcm",
    "dmd",
    "flow_matching",
    "scm",
    "sla_alignment",
]
