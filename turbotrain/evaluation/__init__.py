"""What a model is worth: the judge, fidelity and speed, files to look at, and the report."""
