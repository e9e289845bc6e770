"""Residual sum, RMSNorm over channels and SiLU, in one pass: what stands between the convolutions of a VAE."""
