"""Where the actor's memory is while engines share its devices (`actor.offload`).

The turns of one rollout step, on both sides; the controller calls them in this order:

    1. engines    are idle; release KV cache and weights
    2. actor      takes back parameters, optimizer state and gradient buffers; trains; copies what a checkpoint wants
    3. actor      gives up gradient buffers and optimizer state
    4. engines    take back weights, to be written over
    5. actor      sends parameters, which it takes back before if it has given them up; gives them up
    6. engines    take back the KV cache; generate

Training without 2 or sending without 3 is an EngineError. What is given up lies in pinned host memory, except gradients, of which
nothing is needed. Tensors and their views stay what they are: it is their storage that shrinks to nothing and grows again. Without CUDA
the same code moves between two places of host memory.

megatron-core 0.19.2 frees and restores gradient buffers itself (`offload_grad_buffers`). Its `offload_to_cpu` of the optimizer gives
parameters new tensors, so fp32 parameters would no longer be those that the optimizer updates: it is not used.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor

from dapo_megatron.actor.host_copy import HostCopy, storages_of
from dapo_megatron.actor.optimizer_state import parts_of
from dapo_megatron.actor.policy import Policy
from dapo_megatron.types import EngineError


class Held(Enum):
    """What of the actor is on its device."""

    ALL = "parameters, optimizer state and gradient buffers"
    PARAMETERS = "parameters"
    NOTHING = "nothing"


class ActorMemory:
    """Without `actor.offload`: everything stays on the device."""

    held = Held.ALL

    def take_back(self) -> None:
        """Before training, a save or a load: all of it is on the device."""

    def make_room(self) -> dict[str, float]:
        """After training: nothing but parameters is on the device. Metrics of what was moved since the last call."""
        return {}

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Parameters are on the device for the time of a send, and given up after it."""
        yield


class OffloadedMemory(ActorMemory):
    """See the top of the file. Not collective: each rank moves its own."""

    def __init__(self, policy: Policy, device: torch.device):
        """Parameters stay for the first send; the rest is given up, so that engines that start meanwhile find room."""
        self._policy = policy
        self._parameters, self._optimizer = HostCopy(device), HostCopy(device)
        self._parameter_bytes = sum(storage.nbytes() for storage in storages_of(self._parameter_tensors()))
        self._seconds = 0.0
        self.make_room()

    def take_back(self) -> None:
        with self._timed():
            self._take_back_parameters()
            if self.held is Held.PARAMETERS:
                self._optimizer.give_back()
                with _typed_storages():
                    for chunk in self._policy.chunks:
                        chunk.restore_grad_buffers(synchronize=False)
                self.held = Held.ALL

    def make_room(self) -> dict[str, float]:
        if self.held is Held.ALL:
            with self._timed():
                self._give_up_training_state()
                self.held = Held.PARAMETERS
        seconds, self._seconds = self._seconds, 0.0
        return {"actor/offload_bytes": self._parameter_bytes + self._optimizer.num_bytes, "actor/offload_seconds": seconds}

    @contextmanager
    def sending(self) -> Iterator[None]:
        if self.held is Held.ALL:
            raise EngineError(
                f"weights are to be sent while the actor holds {self.held.value}, in memory that the engines take back first; "
                "make_room() must come before"
            )
        with self._timed():
            self._take_back_parameters()
        try:
            yield
        finally:
            with self._timed():
                self._parameters.take(storages_of(self._parameter_tensors()))
            self.held = Held.NOTHING

    def _take_back_parameters(self) -> None:
        if self.held is Held.NOTHING:
            self._parameters.give_back()
            self.held = Held.PARAMETERS

    def _give_up_training_state(self) -> None:
        self._policy.optimizer.zero_grad()  # the gradients of main parameters may be views of the buffers
        with _typed_storages():
            for chunk in self._policy.chunks:
                chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        parameters = {storage.data_ptr() for storage in storages_of(self._parameter_tensors())}
        states = storages_of(self._optimizer_tensors())
        self._optimizer.take([storage for storage in states if storage.data_ptr() not in parameters])

    def _parameter_tensors(self) -> Iterator[Tensor]:
        for module in self._policy.modules:
            yield from module.parameters()

    def _optimizer_tensors(self) -> Iterator[Tensor]:
        """Main parameters, which may be views of the model's, and their states."""
        for part in parts_of(self._policy.optimizer):
            for parameter in (parameter for group in part.param_groups for parameter in group["params"]):
                yield parameter
                yield from (value for value in part.optimizer.state[parameter].values() if isinstance(value, Tensor))

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start


@contextmanager
def _typed_storages() -> Iterator[None]:
    """megatron-core 0.19.2 asks its buffers for typed storages, which torch warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
