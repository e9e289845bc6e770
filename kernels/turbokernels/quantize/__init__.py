"""Symmetric 8-bit quantisation of activations and weights (method.md section 7)."""
