"""Choice of the key blocks that each query block attends to (SLA, method.md section 3, steps 1-3)."""
