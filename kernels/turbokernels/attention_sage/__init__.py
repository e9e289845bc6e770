"""Quantised attention forward: int8 Q K^T, fp8 or fp16 P V (SageAttention 2, method.md section 7)."""
