"""The records of a file that torch.save wrote, a zip archive. Their checksums are not looked at: torch may leave them out."""

from __future__ import annotations

import struct
import zipfile
from typing import BinaryIO

from dapo_megatron.types import CheckpointError

_LOCAL_HEADER = struct.Struct("<26xHH")
"""Lengths of name and extra field in a record's own header, which its bytes follow."""


class TorchArchive:
    """`file` is open for reading and has the archive from its start to its end; `what` is its name in errors."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file, self._what = file, what
        try:
            with zipfile.ZipFile(file) as archive:
                records = {info.filename: info for info in archive.infolist()}
            (description,) = [name for name in records if name.endswith("/data.pkl")]
        except (zipfile.BadZipFile, ValueError, EOFError) as error:
            raise CheckpointError(f"{what} is damaged ({error}); get the checkpoint again") from error
        root = description.removesuffix("data.pkl")
        self._records = {name.removeprefix(root): info for name, info in records.items()}

    def read(self, name: str) -> bytes:
        """A whole record."""
        start, num_bytes = self.place(name)
        self._file.seek(start)
        content = self._file.read(num_bytes) or b""
        if len(content) != num_bytes:
            raise CheckpointError(f"{self._what} ends within its record {name}; it is truncated, get it again")
        return content

    def place(self, name: str) -> tuple[int, int]:
        """Where the bytes of a record start, and how many they are."""
        record = self._records.get(name)
        if record is None or record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self._what} has no plain record {name}; get the checkpoint again")
        self._file.seek(record.header_offset)
        header = self._file.read(_LOCAL_HEADER.size) or b""
        if len(header) != _LOCAL_HEADER.size:
            raise CheckpointError(f"{self._what} ends within its record {name}; it is truncated, get it again")
        return record.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)), record.file_size

    @property
    def is_little_endian(self) -> bool:
        """Old archives do not say; they are."""
        return "byteorder" not in self._records or self.read("byteorder") == b"little"
