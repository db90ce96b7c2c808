"""Records with arrays: what they take, when they are equal, and that they travel unchanged."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from dapo_megatron.types import OptimizerStepBatch, Prompt, RolloutGroup, Sample, Score, TrainBatch, TrainSample

AWKWARD = np.array([-0.0, -1e-45, -3.4028235e38, np.float32(-0.1), -np.inf], np.float32)
"""Negative zero, the smallest subnormal, the largest number, one that decimal text would round, an infinity."""


EXPERTS = np.arange(36, dtype=np.uint16).reshape(6, 3, 2) + 65500
"""Of a prompt of two tokens and a response of five."""


def sample(**changes: object) -> Sample:
    return replace(Sample([3, 2**31 - 1, 0, 7, 7], AWKWARD, [4, 4, 5, 5, 5], "stop", "2²\0", EXPERTS), **changes)


def group() -> RolloutGroup:
    empty = Sample((), (), (), "abort", "")
    return RolloutGroup(9, Prompt(1, (5, 6), "?", "0"), (sample(), empty), (Score(1.0, True), Score(-1.0, False, "late")))


def bits(array: np.ndarray) -> tuple[str, bytes]:
    return array.dtype.str, array.tobytes()


def test_any_sequences_become_compact_arrays():
    record = sample()
    assert (record.token_ids.dtype, record.log_probs.dtype, record.weight_versions.dtype) == (np.int32, np.float32, np.int32)
    assert Sample((1,), (-0.5,), (0,), "stop", "") == Sample(np.array([1]), np.array([-0.5]), np.array([0]), "stop", "")


def test_an_array_of_the_right_type_is_not_copied():
    token_ids = np.arange(5, dtype=np.int32)
    assert np.shares_memory(sample(token_ids=token_ids).token_ids, token_ids)


def test_arrays_of_a_record_cannot_be_written():
    token_ids = np.arange(5, dtype=np.int32)
    record = sample(token_ids=token_ids)
    with pytest.raises(ValueError, match="read-only"):
        record.token_ids[0] = 1
    with pytest.raises(FrozenInstanceError):
        record.token_ids = token_ids
    token_ids[0] = 8  # the caller's own array stays writeable


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"lengths \(4, 5, 5\)"):
        sample(token_ids=(1, 2, 3, 4))
    with pytest.raises(ValueError, match="2 entries for 3 response tokens"):
        TrainSample((1, 2, 3, 4), 1, (-0.5, -0.5), 1.0, 1.0)
    with pytest.raises(ValueError, match="one dimension"):
        sample(token_ids=np.zeros((5, 1)))


def test_records_are_equal_when_every_field_is():
    assert sample() == sample() and group() == group()
    for changed in (
        {"token_ids": (3, 2**31 - 1, 0, 7, 8)},
        {"log_probs": np.nextafter(AWKWARD, np.float32(0))},
        {"weight_versions": (4, 4, 4, 5, 5)},
        {"finish_reason": "length"},
        {"text": ""},
        {"routed_experts": EXPERTS[:5]},
        {"routed_experts": None},
        {"token_ids": (3,), "log_probs": (0.0,), "weight_versions": (4,)},
    ):
        assert sample(**changed) != sample()
    assert TrainSample((1, 2), 1, (-0.5,), 1.0, 1.0) == TrainSample((1, 2), 1, (-0.5,), 1.0, 1.0)
    assert TrainSample((1, 2), 1, (-0.5,), 1.0, 1.0) != TrainSample((1, 2), 1, (-0.5,), 1.0, 1.0, on_policy=False)
    assert sample() != "sample"


def test_a_group_survives_json_and_pickle_bit_for_bit():
    adapter = TypeAdapter(RolloutGroup)
    for copy in (adapter.validate_json(adapter.dump_json(group())), pickle.loads(pickle.dumps(group()))):
        assert copy == group()
        for name in ("token_ids", "log_probs", "weight_versions", "routed_experts"):
            assert bits(getattr(copy.samples[0], name)) == bits(getattr(group().samples[0], name))


@pytest.mark.parametrize("table", [EXPERTS.astype(np.int32), EXPERTS[0]])
def test_experts_of_another_type_or_shape_are_refused(table: np.ndarray):
    with pytest.raises(ValueError, match="give uint8 or uint16 of three dimensions"):
        sample(routed_experts=table)


@pytest.mark.parametrize("text", ["AAAA", "&"])
def test_experts_that_are_no_packed_table_are_refused(text: str):
    packed = TypeAdapter(Sample).dump_python(sample(), mode="json")
    packed["routed_experts"]["data"] = text
    with pytest.raises(ValidationError, match="this is no packed table"):
        TypeAdapter(Sample).validate_json(json.dumps(packed))


def test_nan_survives_json_with_its_payload():
    nans = np.array([0x7FC00001, 0xFFC12345 - 2**32, 0, 0, 0]).astype(np.int32).view(np.float32)
    adapter = TypeAdapter(Sample)
    assert bits(adapter.validate_json(adapter.dump_json(sample(log_probs=nans))).log_probs) == bits(nans)


def test_a_long_response_takes_little_json():
    num_tokens = 20_000
    random = np.random.default_rng(0)
    long = Sample(random.integers(0, 2**17, num_tokens), -random.random(num_tokens), np.full(num_tokens, 3), "length", "")
    assert len(TypeAdapter(Sample).dump_json(long)) < 12 * num_tokens


@pytest.mark.parametrize("text", ['"AAAA"', '"&"', "3", "[1, 2]", "null"])
def test_text_that_is_no_packed_array_is_refused(text: str):
    adapter = TypeAdapter(Sample)
    damaged = adapter.dump_json(sample()).replace(adapter.dump_json(sample()).split(b":")[1].split(b",")[0], text.encode())
    with pytest.raises(ValidationError, match="not a packed array of <i4"):
        adapter.validate_json(damaged)


def test_a_share_holds_the_micro_batches_of_one_rank_and_the_normaliser_of_all():
    def micro_batch(*tokens: int) -> tuple[TrainSample, ...]:
        return tuple(TrainSample((token, token), 1, (-0.5,), 1.0, 1.0) for token in tokens)

    steps = [
        OptimizerStepBatch(((micro_batch(1, 2), micro_batch(3)), (micro_batch(4), ())), num_loss_tokens=4),
        OptimizerStepBatch(((micro_batch(5),), (micro_batch(6),)), num_loss_tokens=2),
    ]
    batch = TrainBatch(tuple(steps))
    for rank in (0, 1):
        share = batch.share(rank)
        assert [step.micro_batches[rank] for step in share.optimizer_steps] == [step.micro_batches[rank] for step in steps]
        assert [step.micro_batches[1 - rank] for step in share.optimizer_steps] == [(), ()]
        assert [step.num_loss_tokens for step in share.optimizer_steps] == [4, 2]
