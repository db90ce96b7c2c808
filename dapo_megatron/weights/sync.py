"""How weights travel from the actor to the engines.

The protocol in words
1.  The actor holds version V of the weights, spread over its ranks as boxes of megatron-core tensors; the engines want HF
    tensors. Both sides know their names, shapes and order from the model's config.json (`ModelMapping.hf_tensors`).
2.  A version is sent as a row of buckets, then one manifest. A bucket is a flat array of bytes that holds whole rows of HF
    tensors, in HF layout, all of one dtype. Each stretch of rows is a piece. The pieces of all buckets, read one after the
    other, are the HF tensors in order, rows ascending: each row once; those that stay fp32 (`in fp32` in a family's table) beside
    another dtype come last. A bucket is at most `bucket_bytes` long; a single row
    longer than that is a bucket of its own.
3.  Who fills which bytes is compiled once (`compile_send_plan`) and replayed for every version: for each bucket, each source
    rank has a list of chunks, rectangles of its boxes to be copied into rectangles of pieces. The chunks of all ranks tile the
    bucket; the compiler proves it. How chunks meet in one payload (shared memory, gather, device copies) is the actor's affair.
4.  Each rank hashes what it holds of every HF tensor, where it lies, and who put the chunks together hashes what has become of them
    (`place_hash.py`). The ranks exchange the hashes when each has sent its last chunk. Where the owners' do not add up to those of the gathered
    tensors, or a copy of an owner's elements differs on another rank (`share_ledger.py`), the version ends in a FingerprintError before 5.
5.  An engine takes the buckets in order and writes each piece into its live tensors, cast to the engine's dtype. The manifest
    holds a fingerprint of every HF tensor as sent. The engine commits the version when every row has arrived exactly once and
    the fingerprints agree: those of its live tensors where its dtype is the wire's, else those of the bytes that arrived.
6.  Between the first bucket and the commit the engine holds a mixture of two versions and must not generate. A version that
    does not commit leaves the mixture in place; the cure is to send a whole version again.

So an engine that commits holds what the ranks hold: its bytes are the gathered ones by 5, and these are the ranks' by 4.
`receiver.py` is the embedded engine's side of 5. A server's side of 5, and how buckets reach it, is told in
`transports/__init__.py`; a server takes whole tensors only, so its buckets are planned with `whole_tensors`: a tensor that is
longer than `bucket_bytes` is a bucket of its own. This file has no torch: plans are made and checked anywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.types import FingerprintError, MappingError
from dapo_megatron.weights.fingerprint import RunningFingerprint
from dapo_megatron.weights.plan import Box, Copy, ModelMapping, import_plan
from dapo_megatron.weights.tiling import Rectangle, prove_tiling

WIRE_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes a bucket may have, by their torch name -> bytes an element."""


@dataclass(frozen=True, slots=True)
class BucketPiece:
    """Rows [row_start, row_start + num_rows) of HF tensor `name`, at `byte_offset` of the bucket's payload, row-major."""

    name: str
    row_start: int
    num_rows: int
    byte_offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class WeightBucket:
    """One message: `payload` is a flat uint8 array that `pieces` cut up; it may be read-only (shared memory)."""

    version: int
    dtype: str
    """Of every element, a key of WIRE_ITEMSIZE."""
    pieces: tuple[BucketPiece, ...]
    payload: np.ndarray


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """The last message of a version: HF tensor name -> fingerprint of its bytes in the wire dtype."""

    version: int
    fingerprints: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SendChunk:
    """`piece[piece_slices] = boxes[box_index][box_slices]`, the piece seen as [num_rows, columns], or [num_rows] of a vector."""

    box_index: int
    box_slices: tuple[slice, ...]
    piece_index: int
    piece_slices: tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """What one bucket holds and who fills it. `chunks_by_rank` has the ranks with something to send, each in payload order."""

    dtype: str
    pieces: tuple[BucketPiece, ...]
    num_bytes: int
    chunks_by_rank: Mapping[int, tuple[SendChunk, ...]]


@dataclass(frozen=True, slots=True)
class SendPlan:
    """The buckets of every version, in the order they are sent."""

    buckets: tuple[BucketPlan, ...]


def compile_send_plan(
    mapping: ModelMapping,
    boxes_by_rank: Sequence[Sequence[Box]],
    bucket_bytes: int,
    dtype: str,
    *,
    whole_tensors: bool = False,
) -> SendPlan:
    """Plan the buckets of a model whose elements are owned as `boxes_by_rank[rank][box_index]`.

    `dtype` is a key of WIRE_ITEMSIZE; what the mapping keeps in fp32 has buckets of its own. `whole_tensors`: no tensor is cut over
    buckets. MappingError names the HF tensor and rows that no rank or two ranks would send.
    """
    if bucket_bytes <= 0:
        raise MappingError(f"bucket_bytes ({bucket_bytes}) must be positive; correct the call")
    copies = _copies_by_tensor(mapping, boxes_by_rank)
    cut = _whole_tensors_in_buckets if whole_tensors else _cut_into_buckets
    tensors: dict[str, dict[str, tuple[int, ...]]] = {dtype: {}}
    for name, shape in mapping.hf_tensors.items():
        tensors.setdefault(mapping.dtype_of(name, dtype), {})[name] = shape
    return SendPlan(
        tuple(
            _plan_bucket(pieces, copies, of_bucket)
            for of_bucket, of_dtype in tensors.items()
            for pieces in cut(of_dtype, bucket_bytes, WIRE_ITEMSIZE[of_bucket])
        )
    )


def _copies_by_tensor(mapping: ModelMapping, boxes_by_rank: Sequence[Sequence[Box]]) -> dict[str, list[tuple[int, Copy]]]:
    """HF name -> (rank, copy) in row order, proven to tile the tensor."""
    copies: dict[str, list[tuple[int, Copy]]] = defaultdict(list)
    for rank, boxes in enumerate(boxes_by_rank):
        for copy in import_plan(mapping, boxes):
            copies[copy.hf_name].append((rank, copy))
    for name, shape in mapping.hf_tensors.items():
        sent = (Rectangle.of(copy.hf_slices) for _, copy in copies[name])
        prove_tiling(name, shape, sent, "each element must be sent by one rank: pass the owners' boxes only")
        copies[name].sort(key=lambda entry: entry[1].hf_slices[0].start)
    return copies


def _cut_into_buckets(
    hf_tensors: Mapping[str, tuple[int, ...]], bucket_bytes: int, itemsize: int
) -> Iterator[tuple[BucketPiece, ...]]:
    """Fill buckets with whole rows, greedily, in the order of the tensors."""
    pieces: list[BucketPiece] = []
    num_bytes = 0
    for name, (num_rows, *columns) in hf_tensors.items():
        row_bytes = math.prod(columns) * itemsize
        row = 0
        while row < num_rows:
            fitting_rows = min((bucket_bytes - num_bytes) // row_bytes, num_rows - row)
            if fitting_rows <= 0 and pieces:
                yield tuple(pieces)
                pieces, num_bytes = [], 0
                continue
            piece = BucketPiece(name, row, max(fitting_rows, 1), num_bytes, max(fitting_rows, 1) * row_bytes)
            pieces.append(piece)
            num_bytes += piece.num_bytes
            row += piece.num_rows
    if pieces:
        yield tuple(pieces)


def _whole_tensors_in_buckets(
    hf_tensors: Mapping[str, tuple[int, ...]], bucket_bytes: int, itemsize: int
) -> Iterator[tuple[BucketPiece, ...]]:
    """Fill buckets with whole tensors, greedily, in their order."""
    pieces: list[BucketPiece] = []
    num_bytes = 0
    for name, shape in hf_tensors.items():
        tensor_bytes = math.prod(shape) * itemsize
        if pieces and num_bytes + tensor_bytes > bucket_bytes:
            yield tuple(pieces)
            pieces, num_bytes = [], 0
        pieces.append(BucketPiece(name, 0, shape[0], num_bytes, tensor_bytes))
        num_bytes += tensor_bytes
    if pieces:
        yield tuple(pieces)


def _plan_bucket(pieces: tuple[BucketPiece, ...], copies: Mapping[str, Sequence[tuple[int, Copy]]], dtype: str) -> BucketPlan:
    chunks: dict[int, list[SendChunk]] = defaultdict(list)
    for piece_index, piece in enumerate(pieces):
        for rank, copy in copies[piece.name]:
            hf_rows, *columns = copy.hf_slices
            start, stop = max(hf_rows.start, piece.row_start), min(hf_rows.stop, piece.row_start + piece.num_rows)
            if start >= stop:
                continue
            box_row0 = copy.box_slices[0].start - hf_rows.start
            box_slices = (slice(start + box_row0, stop + box_row0), *copy.box_slices[1:])
            piece_slices = (slice(start - piece.row_start, stop - piece.row_start), *columns)
            chunks[rank].append(SendChunk(copy.box_index, box_slices, piece_index, piece_slices))
    return BucketPlan(
        dtype=dtype,
        pieces=pieces,
        num_bytes=pieces[-1].byte_offset + pieces[-1].num_bytes,
        chunks_by_rank={rank: tuple(of_rank) for rank, of_rank in sorted(chunks.items())},
    )


class BucketReader:
    """Reads the buckets of one version in order and checks that every row of every tensor comes exactly once."""

    def __init__(self, hf_tensors: Mapping[str, tuple[int, ...]], version: int) -> None:
        self._hf_tensors = dict(hf_tensors)
        self._version = version
        self._dtypes: dict[str, str] = {}
        self._num_rows_read = dict.fromkeys(hf_tensors, 0)

    def read(self, bucket: WeightBucket) -> Iterator[tuple[BucketPiece, np.ndarray]]:
        """Yield each piece with its bytes, a view of the payload.

        FingerprintError for another version or dtype and for rows that are repeated or left out; MappingError for a piece that
        does not fit the model.
        """
        if bucket.version != self._version:
            raise FingerprintError(
                f"bucket of version {bucket.version} must be of version {self._version}; send one version at a time"
            )
        if bucket.dtype not in WIRE_ITEMSIZE:
            raise MappingError(f"bucket dtype ({bucket.dtype!r}) must be one of {', '.join(WIRE_ITEMSIZE)}; cast before sending")
        for piece in bucket.pieces:
            yield piece, self._bytes_of(piece, bucket)

    def finish(self) -> None:
        """Raise FingerprintError unless every row of every tensor has come."""
        incomplete = [name for name, shape in self._hf_tensors.items() if self._num_rows_read[name] != shape[0]]
        if incomplete:
            name = incomplete[0]
            raise FingerprintError(
                f"version {self._version} is incomplete: {len(incomplete)} tensors lack rows, first {name} with "
                f"{self._num_rows_read[name]} of {self._hf_tensors[name][0]}; send every bucket before the manifest"
            )

    def _bytes_of(self, piece: BucketPiece, bucket: WeightBucket) -> np.ndarray:
        shape = self._hf_tensors.get(piece.name)
        if shape is None:
            raise MappingError(f"bucket has {piece.name}, which this engine does not; serve the model that is trained")
        if self._dtypes.setdefault(piece.name, bucket.dtype) != bucket.dtype:
            raise FingerprintError(
                f"{piece.name}: bucket dtype ({bucket.dtype}) must be {self._dtypes[piece.name]} as of the rows before; send a tensor in one dtype"
            )
        row_stop = piece.row_start + piece.num_rows
        num_bytes = piece.num_rows * math.prod(shape[1:]) * WIRE_ITEMSIZE[bucket.dtype]
        byte_stop = piece.byte_offset + piece.num_bytes
        in_payload = piece.byte_offset >= 0 and byte_stop <= bucket.payload.size
        if piece.num_rows <= 0 or row_stop > shape[0] or piece.num_bytes != num_bytes or not in_payload:
            raise MappingError(
                f"{piece} must hold rows of shape {shape} in {num_bytes} bytes of a payload of {bucket.payload.size}; "
                "serve the model that is trained"
            )
        if piece.row_start != self._num_rows_read[piece.name]:
            raise FingerprintError(
                f"{piece.name}: rows {piece.row_start}:{row_stop} came, row {self._num_rows_read[piece.name]} must come next; "
                "send each bucket once, in order"
            )
        self._num_rows_read[piece.name] = row_stop
        return bucket.payload[piece.byte_offset : byte_stop]


class ManifestBuilder:
    """The sender's side of the fingerprints: sees every bucket as it leaves, then makes the manifest."""

    def __init__(self, hf_tensors: Mapping[str, tuple[int, ...]], version: int) -> None:
        self._version = version
        self._reader = BucketReader(hf_tensors, version)
        self._running = {name: RunningFingerprint() for name in hf_tensors}

    def add(self, bucket: WeightBucket) -> None:
        """Take in the next bucket, filled; errors as `BucketReader.read`."""
        for piece, raw in self._reader.read(bucket):
            self._running[piece.name].update(raw)

    def build(self) -> WeightManifest:
        """The manifest. FingerprintError when rows are missing."""
        self._reader.finish()
        return WeightManifest(self._version, {name: running.hexdigest() for name, running in self._running.items()})
