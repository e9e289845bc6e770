"""Pixels and words in and out of the network's spaces, over diffusers' VAE and transformers' umT5 and CLIP."""

from turbotrain.codecs.prompts import PromptEncoder
from turbotrain.codecs.text import TextEncoder
from turbotrain.codecs.vae import VideoCodec

__all__ = ["PromptEncoder", "TextEncoder", "VideoCodec"]
