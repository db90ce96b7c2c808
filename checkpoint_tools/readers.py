"""The reader of a Megatron checkpoint, whichever format it has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint_tools.legacy_reader import LegacyReader, check_replicas
from checkpoint_tools.locate import Place
from checkpoint_tools.torch_dist import TorchDistReader

Reader = TorchDistReader | LegacyReader
"""Both have `directory`, `tensors`, `common` and `locate`."""


@contextmanager
def open_reader(place: Place, max_memory: int, num_workers: int | None) -> Iterator[Reader]:
    """Read the index, or of a legacy checkpoint the ranks' headers and every copy of what several ranks have."""
    if place.kind == "legacy":
        legacy = LegacyReader(place.weights)
        check_replicas(legacy, max_memory, num_workers)
        yield legacy
    else:
        with TorchDistReader(place.weights) as reader:
            yield reader
