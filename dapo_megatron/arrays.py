"""Columns of the records: one-dimensional numpy arrays that are read-only, compare by value and survive JSON bit for bit.

numpy and pydantic are imported where they are used: verifier processes import the records and start without either.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


@dataclass(frozen=True, slots=True)
class Column:
    """The dtype of a record's array, and how pydantic writes and reads it: base64 of the zlib-packed little-endian elements."""

    dtype: str
    zlib_level: int
    """0 stores, for what does not shrink."""

    def array(self, values: Any) -> NDArray[Any]:
        """`values` as a read-only array [T]; nothing is copied when the dtype is right. ValueError for any other shape."""
        import numpy as np

        if type(values) is np.ndarray and values.ndim == 1 and values.dtype.str == self.dtype and not values.flags.writeable:
            return values
        array = np.asarray(values, dtype=self.dtype)
        if array.ndim != 1:
            raise ValueError(f"the array has shape {array.shape}; give one dimension")
        array = array.view()
        array.flags.writeable = False
        return array

    def dump(self, array: NDArray[Any]) -> str:
        """Text that `load` turns into the same bits."""
        return base64.b64encode(zlib.compress(array.astype(self.dtype, copy=False).tobytes(), self.zlib_level)).decode()

    def load(self, text: Any) -> NDArray[Any]:
        """What `dump` wrote; an array stays as it is. ValueError for any other input."""
        import numpy as np

        if isinstance(text, np.ndarray):
            return self.array(text)
        try:
            return self.array(np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), self.dtype))
        except (TypeError, binascii.Error, zlib.error) as error:
            raise ValueError(f"the text is not a packed array of {self.dtype}: {error}") from error

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            self.load, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )


INT32 = Column("<i4", zlib_level=1)
FLOAT32 = Column("<f4", zlib_level=0)


def pieces(flat: NDArray[Any], lengths: Iterable[int]) -> list[NDArray[Any]]:
    """One after the other, views of `flat` [sum of lengths], which is made read-only: columns of many records from one array."""
    flat.flags.writeable = False
    ends = list(itertools.accumulate(lengths, initial=0))
    return [flat[start:end] for start, end in itertools.pairwise(ends)]


def smallest(columns: Sequence[NDArray[Any]]) -> int:
    """The smallest element of all columns, some of which may be empty. ValueError when all are."""
    import numpy as np

    return int(np.concatenate(columns).min())


class _PackedTable:
    """How pydantic writes and reads a three-dimensional array: dtype, shape, and base64 of the zlib-packed elements."""

    def dump(self, array: NDArray[Any]) -> dict[str, Any]:
        data = base64.b64encode(zlib.compress(array.tobytes(), 1)).decode()
        return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}

    def load(self, packed: Any) -> NDArray[Any]:
        """What `dump` wrote; an array stays as it is. ValueError for any other input."""
        import numpy as np

        if isinstance(packed, np.ndarray):
            return expert_table(packed)
        try:
            data = zlib.decompress(base64.b64decode(packed["data"], validate=True))
            return expert_table(np.frombuffer(data, packed["dtype"]).reshape(packed["shape"]))
        except (KeyError, TypeError, binascii.Error, zlib.error) as error:
            raise ValueError(f"this is no packed table: {error!r}") from error

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            self.load, serialization=core_schema.plain_serializer_function_ser_schema(self.dump)
        )


def expert_table(values: NDArray[Any]) -> NDArray[Any]:
    """`values` as a read-only view [rows, layers, top_k]. ValueError for another shape, or a dtype other than uint8 and uint16."""
    if values.ndim != 3 or values.dtype.str not in ("|u1", "<u2"):
        raise ValueError(f"the array is {values.dtype} of shape {values.shape}; give uint8 or uint16 of three dimensions")
    view = values.view()
    view.flags.writeable = False
    return view


if TYPE_CHECKING:
    Int32Array = Annotated[NDArray[np.int32], INT32]
    Float32Array = Annotated[NDArray[np.float32], FLOAT32]
    ExpertTable = Annotated[NDArray[Any], _PackedTable()]
else:
    Int32Array = Annotated[Any, INT32]
    Float32Array = Annotated[Any, FLOAT32]
    ExpertTable = Annotated[Any, _PackedTable()]


def set_column(record: Any, name: str, column: Column) -> None:
    """Bring a field of a frozen record to its column's dtype; for `__post_init__`."""
    object.__setattr__(record, name, column.array(getattr(record, name)))


def records_equal(record: Any, other: Any) -> bool:
    """`__eq__` of a dataclass with array fields: same type, and every field equal (arrays element by element; NaN equals nothing)."""
    if type(record) is not type(other):
        return False
    return all(_equal(getattr(record, field.name), getattr(other, field.name)) for field in fields(record))


def _equal(a: Any, b: Any) -> bool:
    import numpy as np

    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return type(a) is type(b) and bool(a == b)
