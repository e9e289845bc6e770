"""The evidence that each acceleration keeps quality: a matrix of runs declared as data, run, and rendered from JSON alone."""
