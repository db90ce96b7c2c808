"""What can go wrong while writing, as one line for the user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_megatron.types import CheckpointError, DapoMegatronError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class WriteError(DapoMegatronError):
    """Work began and could not go on. What was finished is kept; the same command continues."""


class InterruptedWork(WriteError):
    """ctrl-c."""


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn the system's refusal to read `path` into a CheckpointError that names it."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        remedy = "give yourself permission to read it" if error.errno in _NO_PERMISSION else "check the path and the disk"
        raise CheckpointError(f"{where} cannot be read ({error.strerror}); {remedy}") from error


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a WriteError with the remedy, CheckpointError when that is another folder."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in _NO_PERMISSION:
            raise CheckpointError(
                f"{where} cannot be written ({error.strerror}); choose a folder that you may write to"
            ) from error
        if error.errno in _NO_SPACE:
            remedy = "free some space or raise the quota, then run the same command again: finished tensors are kept"
        else:
            remedy = "check the disk, then run the same command again: finished tensors are kept"
        raise WriteError(f"{where} cannot be written ({error.strerror}); {remedy}") from error
