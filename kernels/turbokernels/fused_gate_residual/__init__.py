"""Residual plus gated branch, in one pass."""
