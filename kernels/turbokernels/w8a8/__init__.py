"""Linear layers with 8-bit weights and 8-bit activations (method.md section 7)."""
