"""One sample while it grows: what is known of it survives the engine that made it."""

from __future__ import annotations

import numpy as np

from dapo_megatron.rollout.engine import SamplingParams
from dapo_megatron.rollout.routed_experts import ExpertShape
from dapo_megatron.rollout.sglang_engine import Continuation, Piece
from dapo_megatron.types import EngineError, FinishReason, Sample


class PartialSample:
    """The tokens of one sample so far, perhaps from several engines and weight versions."""

    def __init__(self, prompt: tuple[int, ...], started: Sample | None, experts: ExpertShape | None = None):
        """`started` is what an earlier request got; an aborted one goes on, any other is finished. `experts`: keep those too."""
        self._prompt, self._experts = prompt, experts
        self.token_ids: list[int] = started.token_ids.tolist() if started else []
        self.log_probs: list[float] = started.log_probs.tolist() if started else []
        self.weight_versions: list[int] = started.weight_versions.tolist() if started else []
        self.finish_reason: FinishReason | None = started.finish_reason if started else None
        if self.finish_reason == "abort":
            self.finish_reason = None
        self._routed = [started.routed_experts] if started and started.routed_experts is not None else []
        self._num_redrawn = 0

    def take_redrawn(self) -> int:
        """Tokens thrown away here since this was asked last; they are drawn again."""
        number, self._num_redrawn = self._num_redrawn, 0
        return number

    @property
    def is_finished(self) -> bool:
        """Whether the sample came to its own end."""
        return self.finish_reason is not None

    @property
    def num_routed(self) -> int:
        """Tokens, from the first of the prompt on, whose experts are known."""
        return sum(map(len, self._routed))

    def extend(self, piece: Piece, first_routed: int = 0) -> None:
        """Add what an engine sent; an abort leaves the sample unfinished. Its routed experts begin at token `first_routed`."""
        self.token_ids += piece.token_ids
        self.log_probs += piece.log_probs
        self.weight_versions += piece.weight_versions
        if piece.versions_of_all:
            self.weight_versions[-len(piece.versions_of_all) :] = piece.versions_of_all
        if piece.finish_reason != "abort":
            self.finish_reason = piece.finish_reason
        if self._experts is not None and piece.routed_experts is not None:
            rows = self._experts.decode(piece.routed_experts)
            self._routed.append(rows[self.num_routed - first_routed : self._num_computed - first_routed])

    def finish_if_complete(self, params: SamplingParams) -> None:
        """An engine may be lost between the last token and the word that it was the last, which also brings the routed experts.

        Without those the last token is drawn again.
        """
        if self.is_finished:
            return
        if self.token_ids and self.token_ids[-1] in params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= params.max_response_tokens:
            self.finish_reason = "length"
        if self.is_finished and self._experts is not None and self.num_routed < self._num_computed:
            self.finish_reason = None
            self._num_redrawn += 1
            for column in (self.token_ids, self.log_probs, self.weight_versions):
                column.pop()

    def drop_other_versions(self, weight_version: int) -> int:
        """Begin again, unless every token so far is of this version; how many tokens were dropped."""
        if all(version == weight_version for version in self.weight_versions):
            return 0
        num_tokens = len(self.token_ids)
        self._num_redrawn += num_tokens
        self.token_ids, self.log_probs, self.weight_versions, self._routed = [], [], [], []
        return num_tokens

    def continuation(self, rid: str, params: SamplingParams) -> Continuation:
        """What an engine is asked for next."""
        return Continuation(rid, [*self._prompt, *self.token_ids], params.max_response_tokens - len(self.token_ids))

    def sample(self, text: str) -> Sample:
        """As it is now; unfinished ones say abort. EngineError when it is finished and experts are missing."""
        if self._experts is not None and self.is_finished and self.num_routed != self._num_computed:
            raise EngineError(
                f"a server sent the routed experts of {self.num_routed} tokens of {self._num_computed}; "
                "start it with --enable-return-routed-experts."
            )
        return Sample(
            np.asarray(self.token_ids, np.int32),
            np.asarray(self.log_probs, np.float32),
            np.asarray(self.weight_versions, np.int32),
            self.finish_reason or "abort",
            text,
            np.concatenate(self._routed) if self._routed else None,
        )

    @property
    def _num_computed(self) -> int:
        """Tokens that went through the model: all but the last one."""
        return len(self._prompt) + len(self.token_ids) - 1
