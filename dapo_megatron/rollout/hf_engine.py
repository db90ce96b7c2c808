"""The embedded engine: a transformers model in this process, for one machine, CPU or GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from dapo_megatron.config.checks import read_hf_config
from dapo_megatron.config.schema import HfEngineConfig
from dapo_megatron.rollout.decoding import Decoding
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult, HoldsNothing
from dapo_megatron.rollout.kv_cache import ATTENTION, register_attention
from dapo_megatron.rollout.transformers_weights import hf_views
from dapo_megatron.types import EngineError
from dapo_megatron.weights.plan import compile_mapping
from dapo_megatron.weights.receiver import BucketReceiver
from dapo_megatron.weights.sync import WeightBucket, WeightManifest

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STEPS_PER_CALL = 16


@dataclass(eq=False, slots=True)
class _Call:
    """One generate(): the requests it still waits for, and what has come."""

    unfinished: set[int]
    arrived: asyncio.Queue[list[GenerateResult] | BaseException] = field(default_factory=asyncio.Queue)


class HfEngine(HoldsNothing):
    """Implements `Engine`. Everything that touches the model runs in one worker thread, so the event loop stays free.

    Calls of generate() overlap: their requests decode together. A weight update while one runs raises EngineError at once. Closing
    the iterator of generate() (`aclose`) gives up what is unfinished, `abort` brings it back, both within 16 decoding steps.
    """

    def __init__(
        self,
        model_dir: Path,
        config: HfEngineConfig,
        num_threads: int | None = None,
        device: str = "cpu",
        worker: ThreadPoolExecutor | None = None,
    ):
        """`model_dir` is an HF directory with weights and tokenizer; `num_threads` None leaves torch's own choice.

        `worker`, of one thread, is used in place of a new one; its number of torch threads stays as it is.
        """
        register_attention()
        self._tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=_DTYPES[config.dtype], attn_implementation=ATTENTION)
        _check_full_attention(self._model.config, model_dir)
        self._model_dir = model_dir
        self._model.to(device).eval().requires_grad_(False)
        self._max_batch_size = config.max_batch_size
        self._weight_version = 0
        self._receiver: BucketReceiver | None = None
        self._receiving_version: int | None = None
        self._updating: str | None = None
        self._calls: dict[int, _Call] = {}  # by request id
        self._decoding: Decoding | None = None  # touched in the worker only
        self._decoder: asyncio.Task[None] | None = None
        self._num_threads = num_threads or config.num_threads
        self._worker = worker or ThreadPoolExecutor(1, "hf-engine", initializer=self._set_num_threads)

    @property
    def weight_version(self) -> int:
        """Version of the last committed weights; 0 for those of the HF directory."""
        return self._weight_version

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """See `Engine.generate`. A call that is alone gives the same bits each time; different company only rounding differences."""
        async with aclosing(self.generate_together(requests)) as batches:
            async for results in batches:
                for result in results:
                    yield result

    async def generate_together(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[list[GenerateResult], None]:
        """As `generate`, what is finished at the same time in one list: fewer messages where they cross processes."""
        if not requests:
            return
        if self._receiving_version is not None:
            raise EngineError(
                f"The engine holds a part of weight version {self._receiving_version}; commit_weights() of that version, "
                "or a whole new update, must come before generate()."
            )
        if self._updating is not None:
            raise EngineError(f"generate() must wait until {self._updating} has ended.")
        call = _Call({request.request_id for request in requests})
        if twice := call.unfinished & self._calls.keys() or len(call.unfinished) < len(requests):
            raise EngineError(f"request ids must be unique among the requests in work, but are not: {twice}; number them anew.")
        self._calls |= dict.fromkeys(call.unfinished, call)
        try:
            await self._in_worker(self._add, requests)
            if self._decoder is None or self._decoder.done():
                self._decoder = asyncio.create_task(self._decode())
                self._decoder.add_done_callback(self._pass_on_error)
            while call.unfinished or not call.arrived.empty():  # what came while the caller was busy is still to be taken
                arrived = await call.arrived.get()
                if isinstance(arrived, BaseException):
                    raise arrived
                yield arrived
        finally:
            for request_id in call.unfinished:
                self._calls.pop(request_id, None)
            if call.unfinished:  # and the worker, perhaps still in advance(), must have let go of the model
                await self._in_worker(self._abort, frozenset(call.unfinished))

    async def abort(self, request_ids: Collection[int]) -> None:
        """See `Generator.abort`."""
        self._deliver(await self._in_worker(self._abort, frozenset(request_ids)))

    async def _decode(self) -> None:
        """Decode while there are calls."""
        while self._calls:
            self._deliver(await self._in_worker(self._advance))

    def _pass_on_error(self, decoder: asyncio.Task[None]) -> None:
        """What ended the decoding ends every call."""
        error = asyncio.CancelledError() if decoder.cancelled() else decoder.exception()
        if error is not None:
            for call in set(self._calls.values()):
                call.arrived.put_nowait(error)

    def _deliver(self, results: Sequence[GenerateResult]) -> None:
        """To each call what is its own; what nobody waits for any more is dropped."""
        shares: dict[_Call, list[GenerateResult]] = {}
        for result in results:
            if (call := self._calls.pop(result.request_id, None)) is not None:
                call.unfinished.discard(result.request_id)
                shares.setdefault(call, []).append(result)
        for call, share in shares.items():
            call.arrived.put_nowait(share)

    def _add(self, requests: Sequence[GenerateRequest]) -> None:
        if self._decoding is None:
            self._decoding = Decoding(self._model, self._tokenizer, self._max_batch_size, self._weight_version)
        self._decoding.add(requests)

    def _advance(self) -> list[GenerateResult]:
        return self._with_decoding(lambda decoding: decoding.advance(_STEPS_PER_CALL))

    def _abort(self, request_ids: Collection[int]) -> list[GenerateResult]:
        return self._with_decoding(lambda decoding: decoding.abort(request_ids))

    def _with_decoding(self, work: Callable[[Decoding], list[GenerateResult]]) -> list[GenerateResult]:
        """The memory of its rows is let go when it is idle or has failed."""
        decoding, self._decoding = self._decoding, None
        if decoding is None:
            return []
        results = work(decoding)
        if not decoding.is_idle:
            self._decoding = decoding
        return results

    async def receive(self, message: WeightBucket | WeightManifest) -> int:
        """`receive_bucket` or `commit_weights`; the bytes of weights in the message."""
        if isinstance(message, WeightManifest):
            await self.commit_weights(message)
            return 0
        await self.receive_bucket(message)
        return message.payload.nbytes

    async def receive_bucket(self, bucket: WeightBucket) -> None:
        """See `Engine.receive_bucket`. Writes into the live parameters; a bucket of another version starts a new update."""
        with self._updates("receive_bucket()"):
            if self._receiver is None or bucket.version != self._receiving_version:
                self._receiver = BucketReceiver(self._live_tensors, bucket.version)
                self._receiving_version = bucket.version
            with self._dropping_receiver_on_error():
                await self._in_worker(self._receiver.receive, bucket)

    async def commit_weights(self, manifest: WeightManifest) -> None:
        """See `Engine.commit_weights`."""
        with self._updates("commit_weights()"):
            if self._receiver is None:
                raise EngineError(f"commit_weights({manifest.version}) must follow the buckets of that version; send them first.")
            with self._dropping_receiver_on_error():
                await self._in_worker(self._receiver.commit, manifest)
            self._receiver = self._receiving_version = None
            self._weight_version = manifest.version

    @cached_property
    def _live_tensors(self) -> dict[str, torch.Tensor]:
        """What is sent, as views of what the model holds."""
        held = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return hf_views(held, compile_mapping(read_hf_config(self._model_dir)).hf_tensors)

    @contextmanager
    def _updates(self, call: str) -> Iterator[None]:
        running = "generate()" if self._calls else self._updating
        if running is not None:
            raise EngineError(f"{call} must wait until {running} has ended; finish, abort() or aclose() it first.")
        self._updating = call
        try:
            yield
        finally:
            self._updating = None

    @contextmanager
    def _dropping_receiver_on_error(self) -> Iterator[None]:
        """After a failed update the next bucket starts afresh; `_receiving_version` stays set, so generate() keeps refusing."""
        try:
            yield
        except BaseException:
            self._receiver = None
            raise

    async def _in_worker[*Args, T](self, function: Callable[[*Args], T], *args: *Args) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    def _set_num_threads(self) -> None:
        """Runs in the worker: OpenMP keeps the number of threads per calling thread."""
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)


def _check_full_attention(config: PretrainedConfig, model_dir: Path) -> None:
    """The engine's masks show every token all tokens before it, which a sliding window or linear attention contradicts."""
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other_layers or getattr(config, "sliding_window", None) is not None:
        kinds = ", ".join(sorted(other_layers)) or f"sliding_window {config.sliding_window}"
        raise EngineError(
            f"{model_dir} ({config.model_type}) has layers with {kinds}; rollout.engine.type hf serves full attention only. "
            "Use another engine type for this model."
        )
