"""The endless stream of prompts: a new order each epoch, and a position that can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from dapo_megatron.data.prompts import PromptSet
from dapo_megatron.types import DataError, Prompt


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a stream stands: `position` prompts of `epoch` are out. The rest says which stream it is."""

    epoch: int
    position: int
    seed: int
    shuffle: bool
    fingerprint: str


class PromptStream:
    """Prompts without end, each once per epoch; order is a function of (seed, epoch) alone, so a position restores it."""

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool):
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._order_of_epoch()

    def next(self) -> Prompt:
        """The next prompt; the first of the next epoch after the last of this one."""
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._order_of_epoch()
        prompt = self._prompts.prompts[self._order[self._position]]
        self._position += 1
        return prompt

    def state(self) -> StreamState:
        """What `restore` needs to go on behind the last prompt given."""
        return StreamState(self._epoch, self._position, self._seed, self._shuffle, self._prompts.fingerprint)

    @classmethod
    def restore(cls, prompts: PromptSet, seed: int, shuffle: bool, state: StreamState, *, allow_changed: bool = False) -> Self:
        """The stream that gives next what the saved one would have given.

        When prompts, seed or shuffle are not those of the saved stream: DataError or, with `allow_changed`, the stream of the
        given ones from the next epoch on.
        """
        stream = cls(prompts, seed, shuffle)
        if allow_changed and (state.fingerprint, state.seed, state.shuffle) != (prompts.fingerprint, seed, shuffle):
            stream._epoch = state.epoch + 1
            stream._order = stream._order_of_epoch()
            return stream
        for setting, saved, given in (
            ("the fingerprint of data.path's prompts", state.fingerprint, prompts.fingerprint),
            ("run.seed", state.seed, seed),
            ("data.shuffle", state.shuffle, shuffle),
        ):
            if saved != given:
                raise DataError(
                    f"{setting} ({given}) must be the checkpoint's ({saved}) to go on with its stream of "
                    "prompts; put the data and the setting of the saved run back."
                )
        stream._epoch = state.epoch
        stream._position = state.position
        stream._order = stream._order_of_epoch()
        return stream

    def _order_of_epoch(self) -> Sequence[int]:
        num_prompts = len(self._prompts.prompts)
        if not self._shuffle:
            return range(num_prompts)
        return np.random.default_rng((self._seed, self._epoch)).permutation(num_prompts).tolist()
