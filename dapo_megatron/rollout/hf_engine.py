"""The embedded engine: a transformers model in this process, for one machine, CPU or GPU."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from dapo_megatron.config.schema import HfEngineConfig
from dapo_megatron.rollout.decoding import Decoding
from dapo_megatron.rollout.engine import GenerateRequest, GenerateResult
from dapo_megatron.rollout.kv_cache import ATTENTION, register_attention
from dapo_megatron.types import EngineError
from dapo_megatron.weights.receiver import BucketReceiver
from dapo_megatron.weights.sync import WeightBucket, WeightManifest

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STEPS_PER_CALL = 16


class HfEngine:
    """Implements `Engine`. Everything that touches the model runs in one worker thread, so the event loop stays free.

    Calls do not overlap: a second generate(), or a weight update while one is running, raises EngineError at once. Closing
    the iterator of generate() (`aclose`) gives up what is unfinished, within 16 decoding steps.
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
        self._model.to(device).eval().requires_grad_(False)
        self._max_batch_size = config.max_batch_size
        self._weight_version = 0
        self._receiver: BucketReceiver | None = None
        self._receiving_version: int | None = None
        self._running: str | None = None
        self._num_threads = num_threads or config.num_threads
        self._worker = worker or ThreadPoolExecutor(1, "hf-engine", initializer=self._set_num_threads)

    @property
    def weight_version(self) -> int:
        """Version of the last committed weights; 0 for those of the HF directory."""
        return self._weight_version

    async def generate(self, requests: Sequence[GenerateRequest]) -> AsyncGenerator[GenerateResult, None]:
        """See `Engine.generate`. The same requests give the same bits; different company only rounding differences."""
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
        with self._alone("generate()"):
            decoding = Decoding(self._model, self._tokenizer, requests, self._max_batch_size, self._weight_version)
            try:
                while not decoding.is_done:
                    if results := await self._in_worker(decoding.advance, _STEPS_PER_CALL):
                        yield results
            finally:
                # After a cancellation the worker may still be in advance(): wait until it has let go of the model.
                await self._in_worker(lambda: None)

    async def receive(self, message: WeightBucket | WeightManifest) -> int:
        """`receive_bucket` or `commit_weights`; the bytes of weights in the message."""
        if isinstance(message, WeightManifest):
            await self.commit_weights(message)
            return 0
        await self.receive_bucket(message)
        return message.payload.nbytes

    async def receive_bucket(self, bucket: WeightBucket) -> None:
        """See `Engine.receive_bucket`. Writes into the live parameters; a bucket of another version starts a new update."""
        with self._alone("receive_bucket()"):
            if self._receiver is None or bucket.version != self._receiving_version:
                # named_parameters() lists a tied lm_head once, as the embedding.
                self._receiver = BucketReceiver(dict(self._model.named_parameters()), bucket.version)
                self._receiving_version = bucket.version
            with self._dropping_receiver_on_error():
                await self._in_worker(self._receiver.receive, bucket)

    async def commit_weights(self, manifest: WeightManifest) -> None:
        """See `Engine.commit_weights`."""
        with self._alone("commit_weights()"):
            if self._receiver is None:
                raise EngineError(f"commit_weights({manifest.version}) must follow the buckets of that version; send them first.")
            with self._dropping_receiver_on_error():
                await self._in_worker(self._receiver.commit, manifest)
            self._receiver = self._receiving_version = None
            self._weight_version = manifest.version

    @contextmanager
    def _alone(self, call: str) -> Iterator[None]:
        if self._running is not None:
            raise EngineError(f"{call} must wait until {self._running} has ended; finish or aclose() it first.")
        self._running = call
        try:
            yield
        finally:
            self._running = None

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
