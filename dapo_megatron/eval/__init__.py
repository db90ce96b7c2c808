"""Accuracy on a fixed set of prompts, through the engines and rewards of the run."""
