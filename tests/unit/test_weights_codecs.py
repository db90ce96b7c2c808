"""Block FP8: what is encoded decodes to what it was, as closely as e4m3 can say it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.weights.codecs import dequantise, quantise, scale_shape, scale_slices

BLOCK = (128, 128)
MAX_E4M3 = 448.0
HALF_STEP, SMALLEST_STEP = 2.0**-4, 2.0**-9
"""Relative to a normal number, and between subnormal ones."""


def decode(encoded, scales, block=BLOCK):
    return dequantise(encoded, scales, tuple(slice(0, size) for size in encoded.shape), block).float()


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 129), (257, 1)])
def test_decoded_weight_is_as_close_as_the_format_allows(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    encoded, scales = quantise(weight, BLOCK)
    assert encoded.dtype == torch.float8_e4m3fn and tuple(scales.shape) == scale_shape(shape, BLOCK)
    step = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]] * SMALLEST_STEP
    bound = torch.maximum(weight.abs() * HALF_STEP, step / 2) + weight.abs() * 2.0**-8  # and the rounding to bf16
    assert ((decode(encoded, scales) - weight).abs() <= bound).all()


def test_what_e4m3_holds_exactly_comes_back_exactly():
    values = torch.arange(-16, 17, dtype=torch.float32)
    values[0] = MAX_E4M3
    weight = values.repeat(33, 1) * 0.5
    encoded, scales = quantise(weight, (64, 64))
    assert scales.tolist() == [[0.5]]
    assert torch.equal(decode(encoded, scales, (64, 64)), weight)


def test_largest_element_of_each_block_is_kept():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    encoded, scales = quantise(weight, BLOCK)
    assert encoded.float().abs().amax() == MAX_E4M3
    assert torch.allclose(scales, weight.view(2, 128, 2, 128).abs().amax(dim=(1, 3)) / MAX_E4M3)


def test_zeros_stay_zeros():
    encoded, scales = quantise(torch.zeros(130, 5), BLOCK)
    assert not decode(encoded, scales).any() and torch.equal(scales, torch.ones(2, 1))


@given(st.integers(0, 2), st.integers(1, 3), st.integers(0, 2), st.integers(1, 3))
def test_slice_of_whole_blocks_encodes_by_itself(row, num_rows, column, num_columns):
    """A rank that holds whole blocks needs no other rank."""
    block = (4, 8)
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(2))
    slices = (slice(row * 4, (row + num_rows) * 4), slice(column * 8, (column + num_columns) * 8))
    encoded, scales = quantise(weight, block)
    own, own_scales = quantise(weight[slices], block)
    assert torch.equal(own.float(), encoded[slices].float())
    assert torch.equal(own_scales, scales[scale_slices(slices, block)])
