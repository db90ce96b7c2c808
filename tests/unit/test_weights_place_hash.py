"""The hash is held against its definition: an element's bits times the number of its place, which a tensor of one bit shows."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.weights import place_hash
from dapo_megatron.weights.place_hash import PlaceHash

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32}


def random_bits(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    num_bits = 8 * dtype.itemsize - 1
    raw = torch.randint(-(2**num_bits), 2**num_bits, (rows, columns), generator=generator)
    return raw.to(BITS[dtype.itemsize]).view(dtype)


def weights(rows: int = 12, columns: int = 20, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(tensor: torch.Tensor) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in tensor.shape)


def hash_of(tensor: torch.Tensor, hasher: PlaceHash | None = None) -> int:
    hasher = hasher or PlaceHash([tuple(tensor.shape)], tensor.dtype, CPU)
    return int(hasher.of(tensor, whole(tensor)))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(BITS[tensor.dtype.itemsize])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hash_is_the_sum_of_bits_times_places_modulo_2_to_the_64(dtype: torch.dtype):
    tensor, unit = random_bits(5, 7, dtype), torch.zeros(5, 7, dtype=dtype)
    hasher = PlaceHash([(5, 7)], dtype, CPU)
    expected, places = 0, set()
    unsigned = bits(tensor).numpy().astype(f"<u{dtype.itemsize}")
    for row, column in np.ndindex(5, 7):
        bits(unit)[row, column] = 1
        place = hash_of(unit, hasher)
        bits(unit)[row, column] = 0
        places.add(place)
        element = int(unsigned[row, column])
        if (column + 1) * dtype.itemsize % 8 == 0:  # the top of a word has the sign
            element = int(bits(tensor)[row, column])
        expected += place * element
    assert len(places) == 35, "every element has a number of its own"
    assert (hash_of(tensor, hasher) - expected) % 2**64 == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), rows=st.integers(1, 9), columns=st.integers(1, 23))
def test_parts_add_up_however_the_tensor_is_cut(data: st.DataObject, dtype: torch.dtype, rows: int, columns: int):
    tensor = random_bits(rows, columns, dtype)
    hasher = PlaceHash([(rows, columns), (3, 40), (50,)], dtype, CPU)  # other tensors of the model are longer
    row_cuts = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=3))})
    total = 0
    for top, bottom in itertools.pairwise(row_cuts):
        cuts = sorted({0, columns, *data.draw(st.lists(st.integers(0, columns), max_size=3))})
        for left, right in itertools.pairwise(cuts):
            part = tensor[top:bottom, left:right]
            part = part if data.draw(st.booleans()) else part.clone()  # a view with the strides and offset of the whole, or not
            total += int(hasher.of(part, (slice(top, bottom), slice(left, right))))
    assert (total - hash_of(tensor, hasher)) % 2**64 == 0


def test_parts_of_a_vector_add_up():
    tensor = random_bits(1, 37, torch.bfloat16)[0]
    hasher = PlaceHash([(37,)], torch.bfloat16, CPU)
    parts = [hasher.of(tensor[start:stop], (slice(start, stop),)) for start, stop in ((0, 9), (9, 10), (10, 37))]
    assert torch.stack(parts).sum() == hash_of(tensor)


def test_strides_and_dtype_of_the_part_do_not_matter():
    tensor = weights()
    hasher = PlaceHash([(12, 20)], torch.bfloat16, CPU)
    assert hash_of(tensor.t().contiguous().t(), hasher) == hash_of(tensor, hasher)
    assert hash_of(tensor.float(), hasher) == hash_of(tensor, hasher), "ranks hold fp32 where bf16 is sent"


def test_rows_are_worked_on_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch):
    tensor = weights(rows=13)
    expected = hash_of(tensor)
    for num_words in (1, 5, 11):  # less than a row, one row, two
        monkeypatch.setitem(place_hash.CHUNK_WORDS, "cpu", num_words)
        assert hash_of(tensor) == expected


def with_(tensor: torch.Tensor, place, values: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = values
    return changed


FAULTS = {
    "rows exchanged": lambda t: t[[1, 0, *range(2, 12)]],
    "columns exchanged": lambda t: t[:, [0, 5, 2, 3, 4, 1, *range(6, 20)]],
    "columns of a word exchanged": lambda t: t[:, [1, 0, *range(2, 20)]],
    "halves of a word exchanged": lambda t: t[:, [2, 3, 0, 1, *range(4, 20)]],
    "blocks exchanged": lambda t: torch.cat([t[:, 10:], t[:, :10]], dim=1),
    "block transposed": lambda t: with_(t, (slice(0, 6), slice(4, 10)), t[0:6, 4:10].t()),
    "rows one too low": lambda t: t.roll(1, 0),
    "columns one too far": lambda t: t.roll(1, 1),
    "elements one too far": lambda t: t.flatten().roll(1).view_as(t),
    "chunk is zero": lambda t: with_(t, (slice(3, 5), slice(0, 20)), torch.zeros(2, 20).to(t)),
    "chunk is there twice": lambda t: with_(t, slice(0, 3), t[3:6]),
    "chunk is of the version before": lambda t: with_(t, (slice(0, 3), slice(4, 8)), t[0:3, 4:8] * 1.01),
    "all signs are wrong": lambda t: -t,
    "two signs are wrong": lambda t: with_(t, (2, slice(5, 7)), -t[2, 5:7]),
    "row is another row": lambda t: with_(t, 0, t[1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_fault_changes_the_hash(fault, dtype: torch.dtype):
    tensor = weights(dtype=dtype)
    changed = fault(tensor)
    assert not torch.equal(changed, tensor) and changed.shape == tensor.shape
    assert hash_of(changed.contiguous()) != hash_of(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_single_bit_changes_the_hash(dtype: torch.dtype):
    tensor = random_bits(3, 8, dtype)
    hasher = PlaceHash([(3, 8)], dtype, CPU)
    expected, raw = hash_of(tensor, hasher), tensor.view(torch.uint8)
    for byte in np.ndindex(*raw.shape):
        for bit in range(8):
            raw[byte] ^= 1 << bit
            assert hash_of(tensor, hasher) != expected, (byte, bit)
            raw[byte] ^= 1 << bit
    assert hash_of(tensor, hasher) == expected


def test_experts_that_took_each_others_place_have_other_hashes():
    first, second = weights(seed=1), weights(seed=2)
    hasher = PlaceHash([(12, 20)], torch.bfloat16, CPU)
    assert hash_of(first, hasher) != hash_of(second, hasher)


def test_pairs_of_wrong_signs_do_not_cancel():
    """The weakest case: all that differs is the highest bit of units, which leaves 33 bits of the numbers."""
    tensor = weights(32, 32, torch.float32)
    hasher = PlaceHash([(32, 32)], torch.float32, CPU)
    generator = torch.Generator().manual_seed(3)
    hashes = {hash_of(tensor, hasher)}
    for _ in range(500):
        signs = torch.randint(0, 2, (32, 32), generator=generator) * 2.0 - 1
        hashes.add(hash_of(tensor * signs, hasher))
    assert len(hashes) == 501
