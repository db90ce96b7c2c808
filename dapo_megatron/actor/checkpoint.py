"""Model, optimizer and random streams of all ranks in megatron-core's torch_dist format, which loads under other layouts.

    DIRECTORY/weights/             torch_dist: the parameters
    DIRECTORY/optimizer/           torch_dist: fp32 master weights, AdamW moments, step count
    DIRECTORY/rng/rank_NNNNN.pt    random streams of a rank
    DIRECTORY/canary.json          numbers that must come out again (canary.py)

A save has two halves: `BackgroundSave` plans with all ranks and copies what this rank writes to host memory, then a thread writes
while training goes on; `finish` ends it with all ranks. One save at a time bounds the host memory: one copy of the rank's share.
Completeness is the caller's matter (`launcher/run_folder.py` writes the marker).
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron.actor.canary import CANARY, Canary
from dapo_megatron.actor.live_weights import SHARDING
from dapo_megatron.actor.optimizer_state import in_parts_of, optimizer_state
from dapo_megatron.actor.policy import Policy
from dapo_megatron.actor.save_strategy import ThreadSaveStrategy
from dapo_megatron.types import CheckpointError
from dapo_megatron.weights.file_digest import FileDigest, digest_file

WEIGHTS, OPTIMIZER, RNG, CANARY_FILE = "weights", "optimizer", "rng", "canary.json"
_RESERVE = "reserve"
_RESERVE_BYTES = 16 * 2**20
"""Room kept for the shared metadata, which rank 0 writes last: a disk that is full fails before, where all ranks notice."""


class BackgroundSave:
    """One save of this rank, from the copy in memory to the hashed files."""

    def __init__(self, policy: Policy, directory: Path, canary: Canary):
        """Plan and copy; collective over all ranks. Raises CheckpointError on all of them when one cannot write there."""
        self._directory = directory
        self._error: str | None = None
        self._digests: dict[str, FileDigest] = {}
        writing = f"writing {directory}"
        _on_all_ranks(lambda: self._prepare_folders(directory, canary), writing)
        models = _models(policy.modules)
        states = {WEIGHTS: models, OPTIMIZER: {"optimizer": optimizer_state(policy.optimizer, models, is_loading=False)}}
        self._requests = [
            dist_checkpointing.save(
                state, str(directory / name), ThreadSaveStrategy(), async_sharded_save=True, content_metadata=dict(SHARDING)
            )
            for name, state in states.items()
        ]
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def is_written(self) -> bool:
        """Whether this rank's files are on disk, or have failed to get there."""
        return not self._thread.is_alive()

    def finish(self) -> dict[str, FileDigest]:
        """Wait for the files and write the shared metadata; collective. The digests of this rank's files, by relative name.

        Raises CheckpointError on all ranks when a rank's files could not be written.
        """
        self._thread.join()
        writing = f"writing {self._directory}"
        _on_all_ranks(self._raise_error, writing)
        if dist.get_rank() == 0:
            (self._directory / _RESERVE).unlink()
        for finalize in [finalize for request in self._requests for finalize in request.finalize_fns]:
            _on_all_ranks(finalize, writing)
        return self._digests

    def _prepare_folders(self, directory: Path, canary: Canary) -> None:
        for name in (WEIGHTS, OPTIMIZER, RNG):
            (directory / name).mkdir(exist_ok=True)
        if dist.get_rank() == 0:
            (directory / CANARY_FILE).write_bytes(CANARY.dump_json(canary, indent=2))
            with (directory / _RESERVE).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)
        torch.save(
            {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()},
            directory / RNG / _rng_file(dist.get_rank()),
        )

    def _write(self) -> None:
        try:
            for request in self._requests:
                if request.async_fn is not None:
                    request.async_fn(*request.async_fn_args, **request.async_fn_kwargs)
            rank = dist.get_rank()
            mine = [*self._directory.glob(f"*/__{rank}_*.distcp"), self._directory / RNG / _rng_file(rank)]
            mine += [self._directory / CANARY_FILE] if rank == 0 else []
            self._digests = {str(file.relative_to(self._directory)): digest_file(file) for file in mine}
        except (OSError, RuntimeError) as error:
            self._error = f"{type(error).__name__}: {error}"

    def _raise_error(self) -> None:
        if self._error is not None:
            raise CheckpointError(self._error)


def check_files(directory: Path, digests: Mapping[str, FileDigest]) -> None:
    """Compare the files of a checkpoint with their digests, each rank its share; collective. Raises CheckpointError."""

    def check() -> None:
        for name in sorted(digests)[dist.get_rank() :: dist.get_world_size()]:
            if digest_file(directory / name) != digests[name]:
                raise CheckpointError(f"{name} is not what was saved; the checkpoint is damaged, use an older one")

    _on_all_ranks(check, f"reading {directory}")


def load_canary(directory: Path) -> Canary:
    """The numbers that the saved policy gave."""
    return CANARY.validate_json((directory / CANARY_FILE).read_bytes())


def load(policy: Policy, directory: Path) -> None:
    """Read weights, optimizer and random streams into the policy, under this layout or another; collective over all ranks.

    Random streams are restored when the number of ranks is the one that saved; nothing of the policy draws random numbers
    unless dropout is switched on through `actor.megatron_extra`.
    """
    load_weights(policy.modules, directory)
    # The optimizer's sharded state refers to the parameters as they stand, so it is asked for after they are loaded.
    wanted = {"optimizer": optimizer_state(policy.optimizer, _models(policy.modules), is_loading=True)}
    state = _read(wanted, directory / OPTIMIZER)["optimizer"]
    with torch.no_grad():
        policy.optimizer.load_state_dict(in_parts_of(policy.optimizer, state))
    if len(list((directory / RNG).iterdir())) == dist.get_world_size():
        streams = torch.load(directory / RNG / _rng_file(dist.get_rank()), weights_only=True)
        torch.set_rng_state(streams["torch"])
        get_cuda_rng_tracker().set_states(streams["tracker"])
    dist.barrier()


def load_weights(modules: Sequence[GPTModel], directory: Path) -> None:
    """Read the weights alone, into bare modules: enough to generate and to evaluate, not to train on."""
    state = _read(_models(modules), directory / WEIGHTS)
    for index, module in enumerate(modules):
        module.load_state_dict(state[f"model{index}"])


def _read(wanted: dict[str, Any], directory: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():  # the common state is read by each rank alone, which torch finds remarkable
            warnings.simplefilter("ignore", UserWarning)
            return dist_checkpointing.load(wanted, str(directory))
    except CheckpointingException as error:
        raise CheckpointError(f"{directory} does not fit this model: {error}") from error


def _models(modules: Sequence[GPTModel]) -> dict[str, Any]:
    return {f"model{i}": module.sharded_state_dict(metadata=SHARDING) for i, module in enumerate(modules)}


def _rng_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _on_all_ranks(work: Callable[[], object], doing: str) -> None:
    """Do the work; when a rank fails, CheckpointError on every one of them, so that they stay in step."""
    error: str | None = None
    try:
        work()
    except CheckpointError as failure:
        error = str(failure)
    except CheckpointException as failure:  # the coordinator's carries the failures of the ranks
        error = "; ".join(f"rank {rank}: {wrapped[0]}" for rank, wrapped in failure.failures.items()) or None
    except (OSError, RuntimeError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next(((rank, text) for rank, text in enumerate(errors) if text), None)
    if first is not None:
        raise CheckpointError(f"{doing} failed on rank {first[0]}: {first[1]}")
