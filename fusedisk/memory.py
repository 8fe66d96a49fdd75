"""The disk server's memory stays bounded, however much of its images is read."""

from pathlib import Path

import trio

from fusedisk.datapath import DataPath

# Page tables take 8 bytes for each page of 4 KiB that was read: this much stands for 16 GiB read.
_PAGE_TABLES_MAX = 32 << 20
_CHECK_SECONDS = 1.0


async def bound_page_tables(path: DataPath) -> None:
    """Free the page tables of the mapped images whenever they have grown; runs until cancelled.

    The cached pages themselves are the kernel's to reclaim.
    """
    # What other mappings take, such as the change map of a large disk with small chunks, stays.
    others = page_table_bytes()
    while True:
        await trio.sleep(_CHECK_SECONDS)
        if page_table_bytes() > others + _PAGE_TABLES_MAX:
            await trio.to_thread.run_sync(path.forget_mapped)
            others = page_table_bytes()


def page_table_bytes() -> int:
    """Memory that this process's page tables take (proc(5), VmPTE). Asks the kernel, no disk."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) * 1024
    return 0
