"""One table per checkpoint format, data only; turbotrain.checkpoint.layouts applies them in both directions."""
