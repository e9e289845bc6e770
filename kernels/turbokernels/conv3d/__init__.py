"""Convolution over frames with channels last: what a video VAE computes."""
