"""DAPO as pure functions of numbers and tensors; only `dapo_loss` imports torch."""
