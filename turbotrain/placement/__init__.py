"""Where weights lie and what that costs: memory and time of a run by arithmetic, the choice between ways to fit a GPU, and the
machinery that moves blocks between host and GPU while others compute."""
