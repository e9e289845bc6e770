"""What wrappers of training and packaging put around parameter names."""

from __future__ import annotations

# Anywhere in a name: a wrapped submodule (activation checkpointing, torch.compile, FSDP1).
INFIXES: tuple[str, ...] = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")

# In front of every name (DDP, ComfyUI), longest first.
PREFIXES: tuple[str, ...] = ("model.diffusion_model.", "diffusion_model.", "module.")
