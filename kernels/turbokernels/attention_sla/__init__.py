"""Sparse-linear attention with a quantised sparse branch (SageSLA) as one call."""
