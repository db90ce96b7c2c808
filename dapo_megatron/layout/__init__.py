"""Choosing a parallel layout without a GPU: what fits, how long a step takes, what is best and why the rest is not.

Reading order: `model_shape.py`, `layout.py`, `memory.py` (parameters, activations, phases), `step_time.py`.
"""
