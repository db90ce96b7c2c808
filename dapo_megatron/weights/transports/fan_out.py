"""One version to many servers at once: a server that fails is left out of the rest and named, the others get their version."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dapo_megatron.types import EngineError
from dapo_megatron.weights.held_hashes import HeldHashes
from dapo_megatron.weights.transports.channel import Channel, StagedBucket

logger = logging.getLogger(__name__)


class FanOut:
    """Of one version. `failures`: name of a server -> what happened to it."""

    def __init__(self, channels: Sequence[Channel], hashes: Sequence[HeldHashes], pool: ThreadPoolExecutor):
        """`hashes` are fed while the channels are busy; `pool` has a thread for each channel and one more."""
        self._channels, self._hashes, self._pool = list(channels), hashes, pool
        self._sending: list[Future[None]] = []
        self.failures: dict[str, str] = {}

    @property
    def alive(self) -> tuple[Channel, ...]:
        """Channels without a failure."""
        return tuple(self._channels)

    def open(self) -> None:
        """Begin the version with every server."""
        self._on_all(lambda channel: channel.open())

    def start(self, bucket: StagedBucket) -> None:
        """Begin to send a bucket; `wait` before its payload is written again."""
        self._sending = [self._pool.submit(self._guarded, channel, lambda c: c.send(bucket)) for channel in self._channels]
        self._sending.append(self._pool.submit(self._hash, bucket))

    def wait(self) -> None:
        """Until the bucket that was begun last is out, everywhere."""
        sending, self._sending = self._sending, []
        for future in sending:
            future.result()

    def close(self) -> None:
        """End the version with every server."""
        self.wait()
        self._on_all(lambda channel: channel.close())

    def _hash(self, bucket: StagedBucket) -> None:
        for name, tensor in bucket.reported():
            for hashes in self._hashes:
                hashes.add(name, tensor)

    def _on_all(self, action: Callable[[Channel], Any]) -> None:
        for future in [self._pool.submit(self._guarded, channel, action) for channel in self._channels]:
            future.result()

    def _guarded(self, channel: Channel, action: Callable[[Channel], Any]) -> None:
        if channel not in self._channels:
            return
        try:
            action(channel)
        except (EngineError, OSError) as error:
            logger.warning("weights: %s", error)
            self.failures[channel.endpoint.name] = str(error)
            self._channels.remove(channel)
            channel.abandon()
