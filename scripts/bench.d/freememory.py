"""Free memory that costs every system the same.

A virtual machine may give free memory back to its host some seconds after it was freed (free page
reporting of virtio-balloon), and then waits for each page that it takes again: 0.3 to 1.8 s for
1 GiB were seen. What a system is measured at would depend on what was freed before it, and when.
So most of the free memory is held for as long as a benchmark runs, and the rest is taken and let
go just before each run.
"""

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

from common import GIB, MIB

# Beyond what the kernel keeps for itself (vm.min_free_kbytes), so that no cached page has to go.
_LEFT = 768 * MIB


def _free() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemFree:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo does not say how much memory is free")


def _take(size: int) -> mmap.mmap | None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
    return mmap.mmap(-1, size, flags=flags) if size > 0 else None


@contextlib.contextmanager
def little_free(needed: int) -> Iterator[None]:
    """Leave this much and 1 GiB of what is free; the rest is held meanwhile."""
    held = _take(_free() - needed - GIB)
    if held is not None:
        held.madvise(mmap.MADV_DONTFORK)
    try:
        yield
    finally:
        if held is not None:
            held.close()


def room_to_dirty(size: int) -> int:
    """Memory to leave free so that no writeback begins before ``size`` bytes are dirty.

    The kernel begins it at vm.dirty_background_ratio percent of what is free and cached
    (Documentation/admin-guide/sysctl/vm.rst), or at vm.dirty_background_bytes whatever the room.
    """
    percent = int(Path("/proc/sys/vm/dirty_background_ratio").read_text())
    return size * 11 // 10 * 100 // percent if percent else size


def recall(most: int | None = None) -> None:
    """Have the kernel own all that is free, or the ``most`` bytes of it that it uses first."""
    free = _free() - _LEFT
    taken = _take(free if most is None else min(free, most))
    if taken is not None:
        taken.close()
