"""Reading at a place of a file, whole."""

from __future__ import annotations

import os


def read_into(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset` on; the bytes read, fewer only where the file ends. OSError as os.preadv."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done
