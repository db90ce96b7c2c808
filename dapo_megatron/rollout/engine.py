"""What the sampler asks of an engine. The embedded engine and a server behind HTTP implement the same protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dapo_megatron.types import EngineError, Sample

if TYPE_CHECKING:
    from dapo_megatron.weights.sync import WeightBucket, WeightManifest


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn: logits / temperature, then the top_k most likely, then the nucleus of mass top_p of what is left.

    `temperature` 0 takes the most likely token; `top_k` None keeps all. Generation of a sample ends after one of
    `stop_token_ids` (kept in the sample) or after `max_response_tokens`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_response_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise EngineError(f"temperature ({self.temperature}) must be 0 (greedy) or positive.")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p ({self.top_p}) must be in (0, 1]; use 1 for the whole distribution.")
        if self.top_k is not None and self.top_k < 1:
            raise EngineError(f"top_k ({self.top_k}) must be at least 1; use None for all tokens.")
        if self.max_response_tokens < 1:
            raise EngineError(f"max_response_tokens ({self.max_response_tokens}) must be at least 1.")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`num_samples` responses to one prompt. Sample i draws from a random stream that is a function of (`seed`, i) alone."""

    request_id: int
    """Unique among the requests that an engine works on at the same time."""
    prompt_token_ids: tuple[int, ...]
    num_samples: int
    seed: int
    params: SamplingParams
    started: tuple[Sample, ...] = ()
    """What an earlier call generated, one a sample, or nothing. A sample with `finish_reason` "abort" goes on after its tokens, which
    count against the limit and are returned in front of the new ones with their log-probs and weight versions; its random
    stream goes on too. Any other is finished and returned as it is."""

    def __post_init__(self) -> None:
        if not self.prompt_token_ids:
            raise EngineError(f"request {self.request_id} has an empty prompt; give at least one token (e.g. the BOS token).")
        if self.num_samples < 1:
            raise EngineError(f"num_samples ({self.num_samples}) of request {self.request_id} must be at least 1.")
        if self.seed < 0:
            raise EngineError(f"seed ({self.seed}) of request {self.request_id} must not be negative.")
        if len(self.started) not in (0, self.num_samples):
            raise EngineError(
                f"request {self.request_id} has {len(self.started)} started samples of {self.num_samples}; give one for each, or none."
            )
        limit = self.params.max_response_tokens
        if any(sample.finish_reason == "abort" and len(sample.token_ids) >= limit for sample in self.started):
            raise EngineError(
                f"request {self.request_id} has a started sample with no token left to max_response_tokens ({limit}); "
                'mark it as finished ("length").'
            )


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """All samples of one request; sample i stands at index i."""

    request_id: int
    samples: tuple[Sample, ...]
    num_tokens_redrawn: int = 0
    """Tokens that came and are in no sample: they were thrown away when an engine was lost, and drawn again by another."""

    @property
    def is_complete(self) -> bool:
        """Whether every sample came to its own end; False when the request was aborted before."""
        return all(sample.finish_reason != "abort" for sample in self.samples)


class Generator(Protocol):
    """The part of an engine that the sampler sees: one engine, or a router over many."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that the next token is drawn from; 0 until the first commit."""

    def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """Yield each request when its last sample is finished, in the order of completion; `aclose` gives up the rest.

        Calls may overlap: requests join those that are decoding, and each call yields its own. Raises EngineError when a weight
        update is half received.
        """

    async def abort(self, request_ids: Collection[int]) -> None:
        """End these requests soon with what they have: their generate() yields them, unfinished samples with `finish_reason` "abort".

        What an aborted sample holds (perhaps no token) may go on later as `GenerateRequest.started`, under other weights too. Requests
        that are unknown or finished are ignored.
        """

    async def hold(self, request_ids: Collection[int]) -> None:
        """As `abort`, but the engine may keep what it has computed for them: one that comes again with the samples that it was yielded
        with as `started` goes on from there, under the weights of then. No other request may be in work.
        """

    async def let_go(self, request_ids: Collection[int]) -> int:
        """Held requests will not come again; how many tokens of them came after they were yielded. Unknown ones are ignored."""


class HoldsNothing(ABC):
    """An engine that keeps nothing of an aborted request: it is computed again when it goes on."""

    @abstractmethod
    async def abort(self, request_ids: Collection[int]) -> None:
        """See `Generator.abort`."""

    async def hold(self, request_ids: Collection[int]) -> None:
        """See `Generator.hold`."""
        await self.abort(request_ids)

    async def let_go(self, request_ids: Collection[int]) -> int:
        """See `Generator.let_go`."""
        return 0


class Engine(Generator, Protocol):
    """One rollout engine. It either generates or receives weights; weights come when no request is left."""

    async def receive_bucket(self, bucket: WeightBucket) -> None:
        """Take one piece of a weight update. From here to `commit_weights` the engine cannot generate."""

    async def commit_weights(self, manifest: WeightManifest) -> None:
        """End the update: prove that the weights are those of the actor and take on `manifest.version`.

        Raises FingerprintError when they are not; the engine then stays unusable until an update that is right.
        """
