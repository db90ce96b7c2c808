"""One actor rank that only holds weights: what an evaluation starts to bring a checkpoint to the engines.

Importing this module imports megatron-core; call `cpu_adapter.install()` first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dapo_megatron.actor import checkpoint, parallel
from dapo_megatron.actor.live_weights import live_boxes
from dapo_megatron.actor.policy import build_modules
from dapo_megatron.actor.weight_pusher import configured_pusher, transports
from dapo_megatron.actor.weight_sender import WeightSender, configured_sender
from dapo_megatron.config.schema import Config
from dapo_megatron.models.architecture import Architecture
from dapo_megatron.types import CheckpointError, EngineEndpoint
from dapo_megatron.weights.file_digest import FileDigest
from dapo_megatron.weights.plan import compile_mapping
from dapo_megatron.weights.sync import WeightBucket, WeightManifest
from dapo_megatron.weights.transports.records import PushReport


class FrozenActor:
    """The parameters of this rank, without gradients, optimizer or main copies. All methods are collective."""

    def __init__(self, config: Config, *, rank: int, init_method: str):
        """Join the world; the parameters are zero until `load_weights`."""
        hf_config = json.loads((config.model.path / "config.json").read_text())
        self._config = config
        self._device = parallel.initialize(config, rank=rank, init_method=init_method)
        self.mapping = compile_mapping(hf_config)
        self._modules, _ = build_modules(Architecture.from_hf(hf_config), config, self._device)
        self._sender: WeightSender | None = None

    def load_weights(self, directory: Path, digests: Mapping[str, FileDigest]) -> None:
        """Read the weights of what was saved, under this layout or another.

        Raises CheckpointError when a file is not the one of its digest, or when the weights do not fit the model.
        """
        checkpoint.check_files(directory, digests)
        checkpoint.load_weights(self._modules, directory)
        self._sender = configured_sender(self._config, self.mapping, self._modules)

    def send_weights(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        """The weights in HF layout: buckets, then the manifest with fingerprints. Yields on rank 0 only."""
        if self._sender is None:
            raise CheckpointError("there are no weights to send; load_weights must come first")
        yield from self._sender.send(version)

    def push_weights(
        self, version: int, endpoints: Sequence[EngineEndpoint], node: str, gpu_id: int | None = None
    ) -> PushReport | None:
        """Bring the weights to rollout servers, see `WeightPusher.push`; the report on rank 0, which is on GPU `gpu_id` of `node`."""
        if self._sender is None:
            raise CheckpointError("there are no weights to send; load_weights must come first")
        pusher = configured_pusher(self._config, self.mapping, live_boxes(self._modules))
        return pusher.push(version, transports(self._config, endpoints, node), gpu_id)

    def close(self) -> None:
        """Leave the process groups."""
        parallel.destroy()
