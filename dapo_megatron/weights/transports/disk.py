"""Safetensors files in a folder that sender and servers see, for servers that can only reload."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from safetensors.torch import save_file

from dapo_megatron.types import EngineEndpoint
from dapo_megatron.weights.transports.channel import StagedBucket
from dapo_megatron.weights.transports.server import WeightServer


class VersionFolder:
    """The files of one version; channels of all servers share it, and each bucket is written once."""

    def __init__(self, directory: Path, version: int):
        self.path = directory / f"version_{version:08d}"
        self._lock = threading.Lock()
        self._num_written = 0
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)

    def write(self, bucket: StagedBucket) -> None:
        """Write the bucket unless another channel has."""
        with self._lock:
            if bucket.index == self._num_written:
                save_file(bucket.tensors(), self.path / f"model-{bucket.index:05d}.safetensors")
                self._num_written += 1

    def remove(self) -> None:
        """Delete the files; servers have loaded them."""
        shutil.rmtree(self.path)


class DiskChannel:
    """See `channel.Channel`. Of one version."""

    def __init__(self, server: WeightServer, folder: VersionFolder, version: int):
        self._server, self._folder, self._version = server, folder, version

    @property
    def endpoint(self) -> EngineEndpoint:
        return self._server.endpoint

    def open(self) -> None:
        """Nothing: a server hears of the version when all of it is there."""

    def send(self, bucket: StagedBucket) -> None:
        self._folder.write(bucket)

    def close(self) -> None:
        self._server.update_from_disk(str(self._folder.path), self._version)

    def abandon(self) -> None:
        """Nothing: the server keeps the version it has, or is gone."""
