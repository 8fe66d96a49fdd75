"""Which parts of a sparse image hold data, as the filesystem reports it."""

import errno
import os
import stat
from collections.abc import Iterator

# A filesystem that cannot tell says one of these; then everything has to count as data.
_CANNOT_TELL = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})


def data_extents(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) in bytes of each run of data within [start, end), in order.

    What lies between the runs reads as zeros. A block device, or a filesystem that cannot tell,
    is one run. Nothing past the end of a file is data. The position of `fd` moves.

    Raises ValueError for a negative or reversed range, and OSError if a seek fails.
    """
    if start < 0 or end < start:
        raise ValueError(f"no such range: [{start}, {end})")
    if start == end:
        return
    # Block devices answer SEEK_DATA with an error or, in some kernels, with a plain position.
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        yield start, end - start
        return
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
            if data >= end:
                return
            hole = min(os.lseek(fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno in _CANNOT_TELL:
                yield position, end - position
                return
            raise
        # Equal if the run was punched between the two seeks; the next SEEK_DATA gets past it.
        if hole > data:
            yield data, hole - data
        position = hole


def allocated_bytes(fd: int, size: int) -> int:
    """Count the bytes of data in the first `size` bytes of `fd`.

    Raises as `data_extents` does.
    """
    return sum(length for _, length in data_extents(fd, 0, size))
