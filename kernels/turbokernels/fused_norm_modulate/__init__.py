"""LayerNorm without affine parameters, then adaptive scale and shift, in one pass."""
