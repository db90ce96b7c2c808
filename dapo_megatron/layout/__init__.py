"""Choosing a parallel layout without a GPU: what fits, how long a step takes, what is best and why the rest is not."""
