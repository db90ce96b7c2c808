"""Imported once by the fork server: everything a rank needs, what the files import in which its program stands, and the command line.

Ray is left out: it reads its settings when it is loaded, and those of a worker come with the worker.
"""

import gc

import torch

from dapo_megatron.actor import cpu_adapter

cpu_adapter.install()
torch.set_num_threads(1)

import pytest  # noqa: F401
import torch._dynamo

import checkpoint_tools.cli  # noqa: F401
import dapo_megatron.actor.replay
import dapo_megatron.actor.worker
import dapo_megatron.cli
import dapo_megatron.eval.measure
import dapo_megatron.evaluate
import dapo_megatron.launcher.controller
import dapo_megatron.launcher.local_backend
import dapo_megatron.rollout.hf_engine  # noqa: F401
import tests.distributed.programs
import tests.tiny_models  # noqa: F401

gc.collect()
gc.freeze()  # a rank's collections leave what it shares with the server alone
