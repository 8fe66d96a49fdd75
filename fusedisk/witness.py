"""Witnesses: descriptors that see a failed writeback, although a server that died saw it before.

The kernel reports a failed writeback once for each open file description. A server killed in the
middle of the flush that met it takes the news along, and the flush of the next one succeeds. The
keeper holds a description of its own for each image, with which nobody flushes: the next server
asks these. Standard library only, as the keeper is.
"""

import ctypes
import os
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)
_SYNC_FILE_RANGE_WAIT_BEFORE = 1


def open_witnesses(images: Sequence[int]) -> list[int]:
    """For each descriptor of an image another one, which shares nothing with it."""
    return [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC) for fd in images]


def failed_unseen(witnesses: Sequence[int]) -> bool:
    """Whether writeback failed since this was asked last; nothing is written for the answer."""
    failed = False
    for fd in witnesses:
        # Waits for one page at most, and reports what fsync would (kernel: fs/sync.c).
        start, length = ctypes.c_int64(0), ctypes.c_int64(1)
        failed |= _libc.sync_file_range(fd, start, length, _SYNC_FILE_RANGE_WAIT_BEFORE) != 0
    return failed
