from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.types import FingerprintError, MappingError
from dapo_megatron.weights.plan import Box, compile_mapping
from dapo_megatron.weights.receiver import BucketReceiver
from dapo_megatron.weights.sync import ManifestBuilder, WeightBucket, WeightManifest, compile_send_plan
from tests.published_configs import MOONLIGHT_16B_A3B
from tests.unit.weights_simulation import CONFIGS, LLAMA_TIED, LLAMA_UNTIED, QWEN2, identity_fill, owned_boxes, simulate_ranks

VERSION = 7


def send(config, tp=2, pp=1, bucket_bytes=1000, dtype="float32"):
    """Play the ranks: fill every bucket by the send plan. Returns buckets, manifest and the HF tensors of ids."""
    mapping, hf = compile_mapping(config), identity_fill(config)
    ranks = simulate_ranks(config, hf, tp, pp, vocab_multiple=8 * tp)
    torch_dtype = getattr(torch, dtype)
    boxes = [[torch.from_numpy(piece.expected).to(torch_dtype) for piece in rank if piece.owned] for rank in ranks]
    plan = compile_send_plan(mapping, owned_boxes(ranks), bucket_bytes, dtype)
    builder = ManifestBuilder(mapping.hf_tensors, VERSION)
    buckets = []
    for bucket_plan in plan.buckets:
        payload = torch.zeros(bucket_plan.num_bytes, dtype=torch.uint8)
        for rank, chunks in bucket_plan.chunks_by_rank.items():
            for chunk in chunks:
                piece = bucket_plan.pieces[chunk.piece_index]
                raw = payload[piece.byte_offset : piece.byte_offset + piece.num_bytes]
                rows = raw.view(torch_dtype).view(piece.num_rows, *mapping.hf_tensors[piece.name][1:])
                rows[chunk.piece_slices] = boxes[rank][chunk.box_index][chunk.box_slices]
        buckets.append(WeightBucket(VERSION, dtype, bucket_plan.pieces, payload.numpy()))
        builder.add(buckets[-1])
    return buckets, builder.build(), {name: torch.from_numpy(tensor).to(torch_dtype) for name, tensor in hf.items()}


def empty_engine(hf, dtype=None):
    return {name: torch.full_like(tensor, -1, dtype=dtype) for name, tensor in hf.items()}


def receive(targets, buckets, manifest):
    receiver = BucketReceiver(targets, VERSION)
    for bucket in buckets:
        receiver.receive(bucket)
    receiver.commit(manifest)


def corrupt(bucket, byte):
    payload = bucket.payload.copy()
    payload[byte] ^= 1
    return replace(bucket, payload=payload)


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1000, 10**6])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_engine_holds_exactly_what_the_ranks_own(config, tp, pp, bucket_bytes):
    buckets, manifest, hf = send(config, tp, pp, bucket_bytes)
    engine = empty_engine(hf)
    receive(engine, buckets, manifest)
    for name, tensor in hf.items():
        assert torch.equal(engine[name], tensor), name


@settings(max_examples=20, deadline=None)
@given(bucket_bytes=st.integers(1, 5000), tp=st.sampled_from([1, 2, 4]), pp=st.sampled_from([1, 2]))
def test_any_bucket_size_sends_every_row_once_and_stays_in_bounds(bucket_bytes, tp, pp):
    mapping, ranks = compile_mapping(QWEN2), simulate_ranks(QWEN2, identity_fill(QWEN2), tp, pp, vocab_multiple=8 * tp)
    plan = compile_send_plan(mapping, owned_boxes(ranks), bucket_bytes, dtype="bfloat16")
    rows = dict.fromkeys(mapping.hf_tensors, 0)
    for bucket in plan.buckets:
        assert bucket.num_bytes == sum(piece.num_bytes for piece in bucket.pieces)
        assert bucket.num_bytes <= bucket_bytes or (len(bucket.pieces) == 1 and bucket.pieces[0].num_rows == 1)
        for piece in bucket.pieces:
            assert piece.row_start == rows[piece.name]
            rows[piece.name] += piece.num_rows
        sent = sum(
            np.prod([axis.stop - axis.start for axis in chunk.piece_slices])
            for chunks in bucket.chunks_by_rank.values()
            for chunk in chunks
        )
        assert 2 * sent == bucket.num_bytes
    assert rows == {name: shape[0] for name, shape in mapping.hf_tensors.items()}


def test_manifest_does_not_depend_on_layout_or_bucket_size():
    manifests = [send(QWEN2, tp, pp, size)[1] for tp, pp, size in ((1, 1, 10**6), (2, 2, 300), (4, 1, 1))]
    assert manifests[0] == manifests[1] == manifests[2]


def test_element_that_no_rank_owns_fails_the_plan():
    mapping, ranks = compile_mapping(LLAMA_UNTIED), simulate_ranks(LLAMA_UNTIED, identity_fill(LLAMA_UNTIED), tp=2)
    boxes = owned_boxes(ranks)
    boxes[1] = [box for box in boxes[1] if box.name != "decoder.layers.2.self_attention.linear_proj.weight"]
    with pytest.raises(MappingError, match=r"layers\.2\.self_attn\.o_proj\.weight: rows 0:16, columns 8:16 covered by nothing"):
        compile_send_plan(mapping, boxes, bucket_bytes=1000, dtype="float32")


def test_element_that_two_ranks_own_fails_the_plan():
    mapping, ranks = compile_mapping(LLAMA_UNTIED), simulate_ranks(LLAMA_UNTIED, identity_fill(LLAMA_UNTIED), tp=2)
    with_replicas = [[piece.box for piece in rank] for rank in ranks]
    with pytest.raises(MappingError, match=r"model\.norm\.weight: rows 0:16, columns 0:1 covered twice"):
        compile_send_plan(mapping, with_replicas, bucket_bytes=1000, dtype="float32")


def test_bucket_size_must_be_positive():
    with pytest.raises(MappingError, match=r"bucket_bytes \(0\)"):
        compile_send_plan(compile_mapping(LLAMA_TIED), [[]], bucket_bytes=0, dtype="float32")


@pytest.mark.filterwarnings("error")
def test_read_only_payload_is_received_without_a_warning():
    buckets, manifest, hf = send(LLAMA_TIED)
    for bucket in buckets:
        bucket.payload.flags.writeable = False
    engine = empty_engine(hf)
    receive(engine, buckets, manifest)
    assert torch.equal(engine["model.norm.weight"], hf["model.norm.weight"])


def test_live_parameters_that_require_grad_can_be_targets():
    buckets, manifest, hf = send(LLAMA_TIED)
    engine = {name: torch.nn.Parameter(tensor) for name, tensor in empty_engine(hf).items()}
    receive(engine, buckets, manifest)
    assert all(torch.equal(engine[name], tensor) for name, tensor in hf.items())


@pytest.mark.parametrize(("wire", "engine_dtype"), [("float32", torch.bfloat16), ("bfloat16", torch.float32)])
def test_rows_are_cast_to_the_dtype_of_the_engine(wire, engine_dtype):
    buckets, manifest, hf = send(LLAMA_TIED, dtype=wire)
    engine = empty_engine(hf, engine_dtype)
    receive(engine, buckets, manifest)
    for name, tensor in hf.items():
        assert torch.equal(engine[name], tensor.to(engine_dtype)), name


@pytest.mark.parametrize("engine_dtype", [torch.float32, torch.bfloat16], ids=["same_dtype", "other_dtype"])
def test_corrupted_payload_is_named_at_commit(engine_dtype):
    buckets, manifest, hf = send(LLAMA_TIED)
    buckets[3] = corrupt(buckets[3], byte=5)
    with pytest.raises(FingerprintError, match=rf"1 of {len(hf)} tensors differ.*{buckets[3].pieces[0].name}"):
        receive(empty_engine(hf, engine_dtype), buckets, manifest)


def test_tensor_overwritten_after_arrival_is_named_at_commit():
    buckets, manifest, hf = send(LLAMA_TIED)
    engine = empty_engine(hf)
    receiver = BucketReceiver(engine, VERSION)
    for bucket in buckets:
        receiver.receive(bucket)
    engine["model.norm.weight"][0] += 1
    with pytest.raises(FingerprintError, match=r"model\.norm\.weight"):
        receiver.commit(manifest)


def test_lost_last_bucket_fails_the_commit():
    buckets, manifest, hf = send(LLAMA_TIED, bucket_bytes=64)
    with pytest.raises(
        FingerprintError,
        match=r"version 7 is incomplete: 1 tensors lack rows, first model\.layers\.1\.mlp\.down_proj\.weight with 15 of 16",
    ):
        receive(empty_engine(hf), buckets[:-1], manifest)


def test_lost_middle_bucket_is_noticed_at_once():
    buckets, manifest, hf = send(LLAMA_TIED, bucket_bytes=200)
    with pytest.raises(FingerprintError, match="must come next"):
        receive(empty_engine(hf), [*buckets[:1], *buckets[2:]], manifest)


def test_repeated_bucket_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    with pytest.raises(FingerprintError, match="must come next"):
        receive(empty_engine(hf), [buckets[0], *buckets], manifest)


def test_bucket_or_manifest_of_another_version_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    with pytest.raises(FingerprintError, match="version 8 must be of version 7"):
        receive(empty_engine(hf), [replace(buckets[0], version=8)], manifest)
    with pytest.raises(FingerprintError, match="manifest of version 6 must be of version 7"):
        receive(empty_engine(hf), buckets, replace(manifest, version=6))


def test_dtype_that_changes_within_a_version_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    with pytest.raises(FingerprintError, match=r"\(bfloat16\) must be float32"):
        receive(empty_engine(hf), [buckets[0], replace(buckets[1], dtype="bfloat16")], manifest)


def test_dtype_outside_the_protocol_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    with pytest.raises(MappingError, match=r"\('int8'\) must be one of float32, bfloat16, float16"):
        receive(empty_engine(hf), [replace(buckets[0], dtype="int8")], manifest)


def test_engine_with_other_tensors_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    engine = empty_engine(hf)
    with pytest.raises(FingerprintError, match=r"incomplete: 1 tensors lack rows, first lm_head\.weight"):
        receive(engine | {"lm_head.weight": torch.zeros(21, 16)}, buckets, manifest)
    del engine["model.norm.weight"]
    with pytest.raises(MappingError, match=r"model\.norm\.weight, which this engine does not"):
        receive(engine, buckets, manifest)


def test_engine_with_another_shape_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    with pytest.raises(MappingError, match=r"must hold rows of shape \(21, 8\)"):
        receive(empty_engine(hf) | {"model.embed_tokens.weight": torch.zeros(21, 8)}, buckets, manifest)


def test_manifest_that_lacks_a_tensor_is_refused():
    buckets, manifest, hf = send(LLAMA_TIED)
    fingerprints = {name: value for name, value in manifest.fingerprints.items() if name != "model.norm.weight"}
    with pytest.raises(FingerprintError, match=r"differ in 1 tensors: model\.norm\.weight"):
        receive(empty_engine(hf), buckets, WeightManifest(VERSION, fingerprints))


def test_manifest_needs_every_bucket():
    mapping = compile_mapping(LLAMA_TIED)
    builder = ManifestBuilder(mapping.hf_tensors, VERSION)
    builder.add(send(LLAMA_TIED)[0][0])
    with pytest.raises(FingerprintError, match="incomplete"):
        builder.build()


def test_router_bias_travels_in_fp32_beside_weights_in_bf16():
    mapping = compile_mapping(MOONLIGHT_16B_A3B | {"num_hidden_layers": 3})
    whole = [Box(name, (0,) * len(tensor.shape), tensor.shape, tensor.shape) for name, tensor in mapping.tensors.items()]
    buckets = compile_send_plan(mapping, [whole], 2**28, "bfloat16").buckets
    dtypes = {piece.name: bucket.dtype for bucket in buckets for piece in bucket.pieces}
    assert dtypes.keys() == mapping.hf_tensors.keys()
    in_fp32 = {name for name, dtype in dtypes.items() if dtype == "float32"}
    assert in_fp32 == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}
    (last,) = (bucket for bucket in buckets if bucket.dtype == "float32")
    assert last is buckets[-1] and last.num_bytes == 2 * 64 * 4
