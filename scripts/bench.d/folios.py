"""What a write through the page cache costs, by the size of the folios that it meets there.

A file is written in pieces, which makes folios of their size where the filesystem has large ones.
Then 4 KiB go to random places, and 1 MiB at a time over all of it: while all is dirty, while all is
clean, and in pieces of 64 KiB after its clean pages were dropped, as the disk server does it with
single pages (fusedisk/cached.pyx). Microseconds of processor time, the interpreter's included.
"""

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

from common import MIB, scratch_parser, table
from freememory import little_free, recall

FOLIOS = [4 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 1 << 20]
PIECE = 64 << 10
SMALL_WRITES = 20_000


def parse() -> argparse.Namespace:
    """The command line."""
    parser = scratch_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256, help="size of the file")
    return parser.parse_args()


def cost(work: Callable[[], None], count: int) -> float:
    """Microseconds of processor time for one of so many."""
    begun = time.process_time()
    work()
    return (time.process_time() - begun) * 1e6 / count


class File:
    """A file in the page cache, none of whose blocks are new."""

    def __init__(self, fd: int, mib: int) -> None:
        self._fd, self._mib = fd, mib
        self._data = memoryview(os.urandom(MIB))
        self.fill(MIB)

    def fill(self, piece: int) -> None:
        """Write all of it in pieces to where nothing is cached."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for at in range(0, self._mib * MIB, piece):
            os.pwrite(self._fd, self._data[:piece], at)

    def small(self) -> None:
        """4 KiB at random places."""
        pages = self._mib * MIB // 4096
        for _ in range(SMALL_WRITES):
            os.pwrite(self._fd, self._data[:4096], random.randrange(pages) * 4096)

    def large(self) -> None:
        """All of it in calls of 1 MiB."""
        for at in range(0, self._mib * MIB, MIB):
            os.pwrite(self._fd, self._data, at)

    def anew(self) -> None:
        """The same, but for each MiB its pages are dropped, and then written in pieces."""
        for start in range(0, self._mib * MIB, MIB):
            os.posix_fadvise(self._fd, start, MIB, os.POSIX_FADV_DONTNEED)
            for at in range(0, MIB, PIECE):
                os.pwrite(self._fd, self._data[at : at + PIECE], start + at)

    def costs(self, folio: int) -> Iterator[float]:
        """In the order of the table."""
        self.fill(folio)
        yield cost(self.small, SMALL_WRITES)
        yield cost(self.large, self._mib)
        os.fsync(self._fd)
        yield cost(self.large, self._mib)
        os.fsync(self._fd)
        yield cost(self.anew, self._mib)


def main() -> None:
    """Measure each size in turn, round after round, and print medians."""
    arguments = parse()
    seen: dict[int, list[list[float]]] = {folio: [] for folio in FOLIOS}
    with (
        tempfile.NamedTemporaryFile(prefix="fusedisk-bench-", dir=arguments.scratch) as found,
        little_free(2 * arguments.mib * MIB),
    ):
        file = File(found.fileno(), arguments.mib)
        for _, folio in itertools.product(range(arguments.rounds), FOLIOS):
            recall()
            seen[folio].append(list(file.costs(folio)))
    rows = []
    for folio, runs in seen.items():
        medians = (statistics.median(one) for one in zip(*runs, strict=True))
        rows.append([f"{folio >> 10} KiB", *(f"{median:,.1f}" for median in medians)])
    columns = ["4 KiB at random", "1 MiB, dirty", "1 MiB, clean", "1 MiB, dropped and made anew"]
    table(["folios", *(f"{column} (us)" for column in columns)], rows)


if __name__ == "__main__":
    main()
