"""Imported once by the fork server: everything a rank needs."""

import torch

from dapo_megatron.actor import cpu_adapter

cpu_adapter.install()
torch.set_num_threads(1)

import dapo_megatron.actor.worker  # noqa: F401
