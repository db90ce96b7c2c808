"""megatron-core's torch_dist save, split so that the files can be written by a thread of this process while training goes on.

megatron-core 0.19.2 hands write results over through a manager process that it spawns on every rank: seconds at the first save,
and an orphan when the rank is killed. Here a queue of this process does it. Planning and file format are megatron-core's own.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType


class ThreadSaveStrategy(TorchDistSaveShardedStrategy):
    """Its requests write from memory of their own: parameters may change as soon as `async_save` has returned."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "mcore") -> AsyncRequest:
        """Plan with all ranks (collective) and copy what this rank writes to host memory."""
        tensors, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = _SnapshotWriter(checkpoint_dir, thread_count=1)
        planner = MCoreSavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(tensors, False), writer, None, 0, planner=planner)
        return self._get_save_and_finalize_callbacks(writer, planned, "mcore")


class _SnapshotWriter(FileSystemWriterAsync):
    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """One file a rank; its tensors are copies in host memory."""
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        data: list[tuple[WriteItem, Any]] = [(item, planner.resolve_data(item)) for item in plan.items]
        objects = [(item, value) for item, value in data if item.type == WriteItemType.BYTE_IO]
        tensors = [(item, value.detach().to("cpu", copy=True)) for item, value in data if item.type != WriteItemType.BYTE_IO]
        self.write_buckets = [(os.path.join(self.checkpoint_dir, name), name, (objects, tensors))] if data else []
        self.results_queue: queue.Queue[Any] | None = queue.Queue() if data else None
