"""Accuracy on a fixed set of problems, through the engines and rewards of a run: during training, and by `dapo-megatron evaluate`."""
