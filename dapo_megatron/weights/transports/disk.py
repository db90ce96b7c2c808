"""Safetensors files in a folder that sender and servers see, for servers that can only reload."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from dapo_megatron.types import ConfigError, EngineEndpoint
from dapo_megatron.weights.transports.channel import StagedBucket
from dapo_megatron.weights.transports.server import WeightServer


class VersionFolder:
    """The files of one version; channels of all servers share it, and each bucket is written once.

    ConfigError when it cannot be written: that is no fault of a server.
    """

    def __init__(self, directory: Path, version: int):
        self.path = directory / f"version_{version:08d}"
        self._lock = threading.Lock()
        self._num_written = 0
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.path.mkdir(parents=True)
        except OSError as error:
            raise self._in_words(error) from error

    def write(self, bucket: StagedBucket) -> None:
        """Write the bucket unless another channel has."""
        with self._lock:
            if bucket.index == self._num_written:
                try:
                    save_file(bucket.tensors(), self.path / f"model-{bucket.index:05d}.safetensors")
                except (OSError, SafetensorError) as error:
                    raise self._in_words(error) from error
                self._num_written += 1

    def remove(self) -> None:
        """Delete the files: servers have loaded them, or will not any more."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _in_words(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"rollout.engine.weight_sync_dir ({self.path.parent}) cannot be written: {error}; free space there, mend its permissions, or give "
            "another folder."
        )


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
