"""The sender's view of a mount: its images, its change maps, and the epoch counter."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import trio

from fusedisk.changemap import ChangeMap, Control
from fusedisk.direct import read_into
from fusedisk.epochs import reserve
from fusedisk.errors import FuseDiskError
from fusedisk.extents import allocated_bytes, data_extents
from fusedisk.image import keep_pages_small
from fusedisk.mounting import find_state
from fusedisk.replicas import Lag, lag_since
from fusedisk.state import locked, read_mount_record
from replicator.rates import Rates

LITTLE_BYTES = 1 << 20
_RUNS_AT_ONCE = 4096
_QUIET_POLL_SECONDS = 0.001
_MEASURE_SECONDS = 1.0


class Copy:
    """A descriptor of its own for a thread, open until it is closed or nobody has it any more."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Close it; repeating that is fine."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Source:
    """A mounted set of disks, read directly from the backing images.

    Raises FuseDiskError where nothing is mounted or the state cannot be read.
    """

    def __init__(self, mountpoint: Path) -> None:
        self.state = find_state(mountpoint)
        self.record = read_mount_record(self.state)
        if self.record.standby:
            raise FuseDiskError(
                f"{mountpoint} stands by until its replica is promoted; cut over to it first"
            )
        self.fds: list[int] = []
        try:
            self.control = Control(self.state / "control", True)
            self.maps = [ChangeMap(self.state / f"{i}.map") for i in range(len(self.record.disks))]
            for disk in self.record.disks:
                # Invariant: in the server's mode. Cached pages beside direct writes may be stale,
                # and would still hash well.
                direct = os.O_DIRECT if self.record.cache == "none" else 0
                self.fds.append(os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC | direct))
                # What a sender reads first is in the page cache when the guest writes to it.
                keep_pages_small(self.fds[-1])
        except (OSError, ValueError) as error:
            self.close()
            raise FuseDiskError(f"cannot read the disks of {mountpoint}: {error}") from None

    def close(self) -> None:
        """Close the images."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    @property
    def mounted(self) -> bool:
        """Whether this very mount still lives: each makes its own control file."""
        try:
            same = os.path.samestat(os.fstat(self.control.fd), (self.state / "control").stat())
        except OSError:
            return False
        return same and locked(self.state)

    async def sync(self) -> None:
        """Sync the images. Cancelled, it leaves what hangs to itself. Raises OSError."""
        for fd in self.fds:
            copy = Copy(fd)
            await trio.to_thread.run_sync(self._sync, copy, abandon_on_cancel=True)

    def _sync(self, copy: Copy) -> None:
        try:
            os.fsync(copy)
        except OSError:
            # The kernel reports it once, and perhaps nobody waits for this any more.
            self.control.set_doubt()
            raise

    async def close_epoch(self) -> int:
        """Begin the next epoch; return the one before it, once no writer is left in it.

        Invariant: every write of the returned epoch is marked and in the image by then.
        """
        await trio.to_thread.run_sync(reserve, self.state, self.control)
        epoch = self.control.advance()
        # Invariant: an epoch is the sender's only if it was closed in the counter of this mount; a
        # later mount continues beyond it.
        if not self.mounted:
            raise FuseDiskError("the mount is gone; mount it again and start again")
        while not self.control.quiet(epoch):
            if not self.mounted:
                raise FuseDiskError("the mount is gone; mount it again and start again")
            await trio.sleep(_QUIET_POLL_SECONDS)
        return epoch

    def data_extents(self, disk: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run of data of a disk in a range. Raises OSError."""
        return data_extents(self.fds[disk], start, end)

    def read(self, disk: int, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from a byte of a disk; a thread's work. Raises OSError."""
        read_into(self.fds[disk], buffer, offset)

    @property
    def new_generation(self) -> str:
        """Why a replica of another generation is compared."""
        reason = self.record.reason
        return f"the source began a new generation{f': {reason}' if reason else ''}"

    def allocated(self) -> list[int]:
        """For each disk, the bytes of data; a thread's work. Raises OSError."""
        disks = zip(self.fds, self.record.disks, strict=True)
        return [allocated_bytes(fd, disk.size) for fd, disk in disks]

    def lag(self, since: int) -> Lag:
        """What was written to all disks after epoch ``since``."""
        return lag_since(self.maps, since)

    def changed_bytes(self, since: int) -> list[int]:
        """For each disk, bytes written after ``since``, rounded up to chunks."""
        return [
            min(m.count(since) * m.chunk_size, disk.size)
            for m, disk in zip(self.maps, self.record.disks, strict=True)
        ]

    def changed_data(self, since: int) -> int:
        """About how many bytes of data were written after ``since``; 0 for little. Raises OSError.

        What only became holes is not counted.
        """
        if sum(self.changed_bytes(since)) < LITTLE_BYTES:
            return 0
        return sum(
            length
            for disk in range(len(self.fds))
            for start, end in self.changed_ranges(disk, since)
            for _, length in self.data_extents(disk, start, end)
        )

    def whole(self, since: int | None, repairs: Iterable[tuple[int, int, int]]) -> int:
        """How many bytes a pass from epoch ``since`` has at most; without one, all data."""
        if since is not None:
            repaired = sum(end - start for _, start, end in repairs)
            return sum(self.changed_bytes(since)) + repaired
        return sum(self.allocated())

    def changed_ranges(
        self, disk: int, since: int, start: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """(start, end) of what of whole chunks of a disk was written after ``since``, joined.

        A thread's work. It is looked up while it is taken, so that no list of all is held.
        """
        changes, size = self.maps[disk], self.record.disks[disk].size
        chunk = -(-start // changes.chunk_size)
        end = size if end is None else end
        while runs := changes.runs(since, chunk, _RUNS_AT_ONCE):
            for first, count in runs:
                chunk = first + count
                begun = first * changes.chunk_size
                if begun >= end:
                    return
                yield begun, min(chunk * changes.chunk_size, end)


async def measure(source: Source, rates: Rates) -> None:
    """Measure the dirty rate of a source until cancelled."""
    while True:
        # Closing an epoch raises the counter, so what is newer than the last one is in this.
        closed = source.control.epoch - 1
        lag = await trio.to_thread.run_sync(source.lag, closed)
        rates.lag(closed, lag.bytes, trio.current_time())
        await trio.sleep(_MEASURE_SECONDS)
