"""Turns live parameters into buckets of HF tensors: the copy plan is compiled once and replayed for every version."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from dapo_megatron.actor.live_weights import LiveBox, live_boxes
from dapo_megatron.actor.shard_check import ShardCheck
from dapo_megatron.config.schema import Config
from dapo_megatron.weights.plan import ModelMapping
from dapo_megatron.weights.sync import (
    BucketPlan,
    ManifestBuilder,
    SendChunk,
    WeightBucket,
    WeightManifest,
    compile_send_plan,
)

ASSEMBLER = 0
"""Rank that puts the chunks of all ranks together."""


class WeightSender:
    """One per rank, collective. Extra memory: one bucket on the assembler, one bucket's own part on the others."""

    def __init__(
        self,
        mapping: ModelMapping,
        live: Sequence[LiveBox],
        bucket_bytes: int,
        *,
        whole_tensors: bool = False,
        dtype: torch.dtype | None = None,
        check_shards: bool = True,
        compare_copies: bool = True,
    ):
        """`dtype` is that of the wire, into which each rank casts what it owns; None: the parameters' own. What the mapping keeps in fp32
        stays so.

        `check_shards` and, in it, `compare_copies`: see `shard_check.py`.
        """
        self._mapping = mapping
        self._owned = [item for item in live if item.is_owner]
        boxes_by_rank: list = [None] * dist.get_world_size()
        dist.all_gather_object(boxes_by_rank, [item.box for item in self._owned])
        self._device = live[0].data.device
        wire_dtype = str(dtype or live[0].data.dtype).removeprefix("torch.")
        self.plan = compile_send_plan(mapping, boxes_by_rank, bucket_bytes, wire_dtype, whole_tensors=whole_tensors)
        self.check = ShardCheck(mapping, live, wire_dtype, ASSEMBLER, compare_copies=compare_copies) if check_shards else None

    def send(self, version: int) -> Iterator[WeightBucket | WeightManifest]:
        """Yields the buckets and the manifest of the present weights on the assembler, nothing on other ranks.

        FingerprintError in place of the manifest when the ranks hold something else.
        """
        manifest = ManifestBuilder(self._mapping.hf_tensors, version)
        if self.check:
            self.check.begin(version)
        for plan in self.plan.buckets:
            payload = torch.empty(plan.num_bytes if dist.get_rank() == ASSEMBLER else 0, dtype=torch.uint8)
            if not self.gather(plan, payload):
                continue
            bucket = WeightBucket(version, plan.dtype, plan.pieces, payload.numpy())
            manifest.add(bucket)
            if self.check:
                self.check.add(plan.pieces, payload)
            yield bucket
        if self.check:
            self.check.finish()
        if dist.get_rank() == ASSEMBLER:
            yield manifest.build()

    def gather(self, plan: BucketPlan, payload: Tensor) -> bool:
        """Put the chunks of all ranks into `payload`, uint8 on any device, of plan.num_bytes; other ranks leave theirs alone.

        Collective. Returns whether this rank is the assembler.
        """
        if dist.get_rank() == ASSEMBLER:
            self._assemble(plan, payload.view(getattr(torch, plan.dtype)))
            return True
        self._send_own_part(plan)
        return False

    def _send_own_part(self, plan: BucketPlan) -> None:
        chunks = plan.chunks_by_rank.get(dist.get_rank())
        if chunks:
            dist.send(torch.cat([self._source(plan, chunk).flatten() for chunk in chunks]), dst=ASSEMBLER)

    def _assemble(self, plan: BucketPlan, payload: Tensor) -> None:
        for rank, chunks in plan.chunks_by_rank.items():
            if rank == ASSEMBLER:
                sources = [self._source(plan, chunk) for chunk in chunks]
            else:
                received = torch.empty(sum(_num_elements(chunk) for chunk in chunks), dtype=payload.dtype, device=self._device)
                dist.recv(received, src=rank)
                sources = list(received.to(payload.device).split([_num_elements(chunk) for chunk in chunks]))
            for chunk, source in zip(chunks, sources, strict=True):
                target = self._piece(plan, chunk.piece_index, payload)[chunk.piece_slices]
                target.copy_(source.reshape(target.shape))

    def _source(self, plan: BucketPlan, chunk: SendChunk) -> Tensor:
        return self._owned[chunk.box_index].data[chunk.box_slices].to(getattr(torch, plan.dtype))

    def _piece(self, plan: BucketPlan, index: int, payload: Tensor) -> Tensor:
        """The piece as rows of its HF tensor."""
        piece = plan.pieces[index]
        start = piece.byte_offset // payload.itemsize
        count = piece.num_bytes // payload.itemsize
        return payload[start : start + count].view(piece.num_rows, *self._mapping.hf_tensors[piece.name][1:])


def configured_sender(config: Config, mapping: ModelMapping, modules: Sequence[GPTModel]) -> WeightSender:
    """The sender of a run with embedded engines; collective."""
    rollout = config.rollout
    bucket_bytes = rollout.weight_bucket_mib * 2**20
    return WeightSender(mapping, live_boxes(modules), bucket_bytes, compare_copies=rollout.compare_weight_copies)


def _num_elements(chunk: SendChunk) -> int:
    return math.prod(part.stop - part.start for part in chunk.piece_slices)
