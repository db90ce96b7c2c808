"""Command-line tools over `dapo_megatron.weights`."""
