"""Tensors cut into pieces anywhere in files, read by rows; and safetensors files laid out in advance."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from checkpoint_tools.safetensors_plan import TensorSpec, plan_files
from checkpoint_tools.spans import Span, SpanReader, SpanTensor
from dapo_megatron.types import CheckpointError


def cuts(size: int) -> st.SearchStrategy[list[int]]:
    """Where an axis is cut, both ends included."""
    return st.lists(st.integers(1, size), max_size=3).map(lambda inner: sorted({0, size, *inner}))


@st.composite
def stored_matrices(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, int, int, int, bool]]]:
    """A matrix and its pieces: rows, columns, and whether a piece is stored column by column."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    matrix = np.arange(rows * columns, dtype=np.uint16).reshape(rows, columns) + 1
    pieces = [
        (row0, row1, column0, column1, draw(st.booleans()))
        for row0, row1 in itertools.pairwise(draw(cuts(rows)))
        for column0, column1 in itertools.pairwise(draw(cuts(columns)))
    ]
    return matrix, pieces


def store(folder: Path, matrix: np.ndarray, pieces: list[tuple[int, int, int, int, bool]]) -> SpanTensor:
    """Every piece in a file of its own, behind something else."""
    spans = []
    for number, (row0, row1, column0, column1, transposed) in enumerate(pieces):
        file, part = folder / str(number), matrix[row0:row1, column0:column1]
        file.write_bytes(b"x" * number + (part.T if transposed else part).tobytes())
        rows, columns = part.shape
        strides = (2, 2 * rows) if transposed else (2 * columns, 2)
        spans.append(Span(file, number, *strides, row0, rows, column0, columns))
    return SpanTensor("x", matrix.shape, "BF16", tuple(spans))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stored=stored_matrices(), band_bytes=st.integers(1, 200))
def test_any_cut_of_a_matrix_is_put_together_in_any_bands(tmp_path: Path, stored: tuple, band_bytes: int):
    matrix, pieces = stored
    tensor, reader = store(tmp_path, matrix, pieces), SpanReader()
    memory = np.empty(60, dtype=np.uint8)
    bands = [reader.read_rows(tensor, row0, row1, memory).copy() for row0, row1 in tensor.bands(band_bytes)]
    reader.close()
    np.testing.assert_array_equal(np.concatenate(bands), matrix)


def test_a_piece_that_is_missing_or_ends_too_early_is_an_error_and_not_garbage(tmp_path: Path):
    matrix = np.arange(24, dtype=np.uint16).reshape(6, 4)
    tensor, reader = store(tmp_path, matrix, [(0, 3, 0, 4, False), (3, 6, 0, 4, False)]), SpanReader()
    half = SpanTensor("x", tensor.shape, tensor.dtype, tensor.spans[:1])
    with pytest.raises(CheckpointError, match="x: rows 2:5 are not saved completely"):
        reader.read_rows(half, 2, 5)
    (tmp_path / "1").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="1 ends within x"):
        reader.read_rows(tensor, 0, 6)
    reader.close()


def test_files_are_laid_out_so_that_safetensors_reads_them(tmp_path: Path):
    """Odd sizes, several dtypes, a tensor larger than a file may be."""
    arrays = {
        "bytes": np.arange(3, dtype=np.uint8),
        "halves": np.arange(5, dtype=np.float16),
        "large": np.arange(100, dtype=np.float32).reshape(4, 25),
        "doubles": np.arange(3, dtype=np.float64),
        "scalar": np.array(7.0, dtype=np.float32),
    }
    names = {"uint8": "U8", "float16": "F16", "float32": "F32", "float64": "F64"}
    plan = plan_files([TensorSpec(name, array.shape, names[str(array.dtype)]) for name, array in arrays.items()], 60)
    assert [set(file.offsets) for file in plan.files] == [{"bytes", "halves"}, {"large"}, {"doubles", "scalar"}]
    found = {}
    for file in plan.files:
        content = bytearray(file.num_bytes)
        content[: len(file.head)] = file.head
        for name, offset in file.offsets.items():
            assert offset % arrays[name].itemsize == 0
            content[offset : offset + arrays[name].nbytes] = arrays[name].tobytes()
        (tmp_path / file.name).write_bytes(content)
        found |= load_file(tmp_path / file.name)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
