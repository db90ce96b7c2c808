"""The stream of prompts: order, epochs, resuming."""

import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.loader import PromptStream, StreamState
from dapo_megatron.data.prompts import DataReport, PromptSet
from dapo_megatron.types import DataError, Prompt


def prompt_set(num_prompts: int, fingerprint: str = "f0") -> PromptSet:
    prompts = tuple(Prompt(index, (index,), str(index), "0") for index in range(num_prompts))
    return PromptSet(prompts, DataReport(num_prompts, 0, 0, 0, ()), fingerprint)


def take(stream: PromptStream, num_prompts: int) -> list[int]:
    return [stream.next().index for _ in range(num_prompts)]


def test_without_shuffle_the_order_is_that_of_the_rows():
    assert take(PromptStream(prompt_set(3), seed=0, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_each_epoch_holds_every_prompt_once_in_a_new_order():
    stream = PromptStream(prompt_set(50), seed=0, shuffle=True)
    epochs = [take(stream, 50) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))


def test_order_is_a_function_of_the_seed():
    orders = [take(PromptStream(prompt_set(50), seed=seed, shuffle=True), 120) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


@given(num_prompts=st.integers(1, 7), num_taken=st.integers(0, 30), seed=st.integers(0, 2**63), shuffle=st.booleans())
def test_restored_stream_goes_on_where_the_saved_one_stood(num_prompts: int, num_taken: int, seed: int, shuffle: bool):
    prompts = prompt_set(num_prompts)
    stream = PromptStream(prompts, seed, shuffle)
    take(stream, num_taken)
    state = pickle.loads(pickle.dumps(stream.state()))
    restored = PromptStream.restore(prompts, seed, shuffle, state)
    assert restored.state() == state
    assert take(restored, 20) == take(stream, 20)


def test_state_survives_plain_fields():
    stream = PromptStream(prompt_set(5), seed=1, shuffle=True)
    take(stream, 7)
    assert StreamState(**dataclasses.asdict(stream.state())) == stream.state() == StreamState(1, 2, 1, True, "f0")


@pytest.mark.parametrize(
    ("fingerprint", "seed", "shuffle", "message"),
    [("f1", 0, True, r"fingerprint .*\(f1\).*\(f0\)"), ("f0", 1, True, r"run.seed \(1\)"), ("f0", 0, False, "data.shuffle")],
)
def test_another_stream_cannot_be_restored(fingerprint: str, seed: int, shuffle: bool, message: str):
    state = PromptStream(prompt_set(5), seed=0, shuffle=True).state()
    with pytest.raises(DataError, match=message):
        PromptStream.restore(prompt_set(5, fingerprint), seed, shuffle, state)
