"""Dense softmax attention with its tangent, for self-attention and cross-attention (method.md section 4)."""
