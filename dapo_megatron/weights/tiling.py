"""The proof that rectangles tile a tensor: every element covered exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from dapo_megatron.types import MappingError


@dataclass(frozen=True, slots=True)
class Rectangle:
    """Rows [row0, row1) x columns [column0, column1). A vector has one column."""

    row0: int
    row1: int
    column0: int = 0
    column1: int = 1

    @classmethod
    def of(cls, slices: tuple[slice, ...]) -> Rectangle:
        """The rectangle that (rows,) or (rows, columns) slices select; starts and stops must be numbers."""
        return cls(*(bound for axis in slices for bound in (axis.start, axis.stop)))


def prove_tiling(what: str, shape: tuple[int, ...], rectangles: Iterable[Rectangle], remedy: str) -> None:
    """Raise MappingError, naming the rows (and columns), unless the rectangles cover (rows,) or (rows, columns) exactly once.

    A sweep over row boundaries: no element is touched, the cost is that of sorting the rectangles.
    """
    rows, columns = shape if len(shape) == 2 else (shape[0], 1)
    pending = sorted((r for r in rectangles if r.row0 < r.row1 and r.column0 < r.column1), key=lambda r: r.row0)
    for rectangle in pending:
        if min(rectangle.row0, rectangle.column0) < 0 or rectangle.row1 > rows or rectangle.column1 > columns:
            raise MappingError(f"{what}: {_area(rectangle)} lies outside its shape {shape}; {remedy}")

    boundaries = sorted({0, rows, *(r.row0 for r in pending), *(r.row1 for r in pending)})
    active: list[Rectangle] = []
    arrived = 0
    for row0, row1 in itertools.pairwise(boundaries):
        active = [r for r in active if r.row1 > row0]
        while arrived < len(pending) and pending[arrived].row0 == row0:
            active.append(pending[arrived])
            arrived += 1
        covered = 0
        for start, end in sorted((r.column0, r.column1) for r in active):
            if start != covered:
                strip = Rectangle(row0, row1, min(start, covered), max(start, covered))
                raise MappingError(f"{what}: {_area(strip)} covered {'twice' if start < covered else 'by nothing'}; {remedy}")
            covered = end
        if covered < columns:
            raise MappingError(f"{what}: {_area(Rectangle(row0, row1, covered, columns))} covered by nothing; {remedy}")


def _area(rectangle: Rectangle) -> str:
    return f"rows {rectangle.row0}:{rectangle.row1}, columns {rectangle.column0}:{rectangle.column1}"
