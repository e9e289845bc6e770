"""Clocks, velocities, guidance, tangents and samplers: the mathematics of method.md on plain callables."""
