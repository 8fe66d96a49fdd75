"""A model of captures, explored exhaustively: fusedisk/capture.pyx and disk.pyx step by step.

Each method of `Model` follows the function that it names, one operation for each access to shared
memory and each system call. Processors are taken to keep one order of all accesses: what is stored
and loaded in the control file and the marks is SEQ_CST, with fences where data follows or precedes
a mark. A sector is written and read at once, a chunk is not; a record's head is written at once
(its check sees to that), its data before it. Left out: the gate, and more than one page of marks.

writers    `disk_write` and `disk_zero`: announce, preserve, mark, write sector by sector, leave
sender     opens a capture, waits until it is closed, looks for its chunks, reads them sector by
           sector, looks at the marks again, takes copies, and does so again from there
janitor    `end_abandoned` of the disk server, once
other      another sender closes an epoch
faults     the disk server is killed between any two steps, its I/O ends, the announcements are
           cleared, and the writes in flight are made again; a sender is killed, which
           frees its lease

Checked, for each setup (capture_setups.py) in every reachable state:

- instant: what a sender believes (its capture was intact afterwards), laid over what it had at
  epoch A, is every write of an epoch up to E and none of a later one. Epochs never go back from
  one acknowledged write to the next, so that is one instant of the disks.
- closed: nothing is written in an epoch that a sender found closed
- nothing lost: where a disk is not as it was at the end of an epoch, the mark says so
- the guest never waits for a sender: from every state the writers can end while all else stands
  still, be it killed, stopped or slow

Each of `MUTATIONS` leaves out one thing that the code does (or does one that it does not), and
breaks one of these in its setup. Two things the code does are not needed here: that a head comes
after its data, and that the last copy of a chunk counts. Either alone is enough.
"""

from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

from capture_memory import (
    CLOSED,
    CLOSING,
    GIVEN_UP,
    HOLE,
    NO_EPOCH,
    NOBODY,
    SECTORS,
    Setup,
    SharedMemory,
)
from interleaving import Operation, Thread

Steps: TypeAlias = Generator[Operation, Any, Any]


class Model(SharedMemory):
    """The programs, with one mutation or none."""

    def __init__(self, setup: Setup, mutation: str = "") -> None:
        super().__init__(setup)
        self._mutation = mutation

    def _is(self, mutation: str) -> bool:
        return self._mutation == mutation

    # --- writers --------------------------------------------------------------------------------

    def disk_write(self, me: int, what: str, first: int, last: int) -> Steps:
        """`disk_write`, and `disk_zero` of one run of data."""
        if what == "zero":
            # A hole already: nothing to mark, nothing to do.
            data = []
            for sector in range(first, last + 1):
                value = yield self.load, ("sector", sector)
                data.append(value != HOLE)
            if not any(data):
                return
        epoch = yield from self._enter(me)
        yield from self._mark(me, epoch, first // SECTORS, last // SECTORS)
        for sector in range(first, last + 1):
            yield self.write, sector, HOLE if what == "zero" else what, epoch
        if self._is("marks come after the data"):
            yield from self._raise_marks(epoch, first // SECTORS, last // SECTORS)
        yield self.store, ("slot", me), 0

    def _enter(self, me: int) -> Steps:
        """`enter`."""
        while True:
            word = yield self.load, "word"
            yield self.store, ("slot", me), word
            again = yield self.load, "word"
            if again == word or self._is("a writer does not look at the word again"):
                return word
            yield self.store, ("slot", me), 0

    def _mark(self, me: int, epoch: int, first: int, last: int) -> Steps:
        """`disk._mark`."""
        bits = yield self.load, "bits"
        if bits:
            del bits
            yield from self._preserve(me, epoch, first, last)
        if not self._is("marks come after the data"):
            yield from self._raise_marks(epoch, first, last)

    def _raise_marks(self, epoch: int, first: int, last: int) -> Steps:
        """`raise_marks`."""
        for chunk in range(first, last + 1):
            yield self.most, ("summary", self._disk(chunk)), epoch
            yield self.most, ("mark", chunk), epoch

    def _disk(self, chunk: int) -> int:
        return next(i for i, chunks in enumerate(self.setup.disks) if chunk in chunks)

    def _preserve(self, me: int, epoch: int, first: int, last: int) -> Steps:
        """`preserve`."""
        bits = yield self.load, "bits"
        mine: tuple[tuple[int, int], ...] = ()
        for i in range(self.setup.places):
            if bits >> i & 1:
                sequence = yield self.load, ("sequence", i)
                closed = yield from self._await_closed(i, sequence, epoch)
                if closed:
                    mine += ((i, sequence),)
        bits = i = sequence = closed = None
        if not mine:
            return
        for chunk in range(first, last + 1):
            wanting = yield from self._wanting(mine, chunk)
            if not wanting:
                continue
            if not self._is("no lock on the chunk"):
                yield self.lock, ("stripe", chunk), me + 1
            if not self._is("no second look at the mark"):
                wanting = yield from self._wanting(mine, chunk)
            if wanting:
                if self._is("marked before the copy"):
                    yield from self._raise_marks(epoch, chunk, chunk)
                yield from self._copy(wanting, chunk)
                if not self._is("not marked inside the lock"):
                    yield from self._raise_marks(epoch, chunk, chunk)
            if not self._is("no lock on the chunk"):
                yield self.store, ("stripe", chunk), NOBODY

    def _await_closed(self, i: int, sequence: int, epoch: int) -> Steps:
        """`_await_closed`."""
        if self._is("nobody waits until it is closed"):
            return True
        while True:
            state = yield self.load, ("state", i)
            if state and state[0] >= epoch:
                return False
            # A state of 0 is of epoch 0.
            now = yield self.load, ("sequence", i)
            if now != sequence:
                return False
            code = state[1] if state else 0
            if code != CLOSING:
                return code == CLOSED
            quiet = yield from self._quiet(state[0])
            if quiet:
                yield from self._close(i, state)

    def _close(self, i: int, state: tuple[int, int]) -> Steps:
        if self._is("a state has no epoch"):
            seen = yield self.load, ("state", i)
            if seen and seen[1] == CLOSING:
                yield self.swap, ("state", i), seen, (seen[0], CLOSED)
        else:
            yield self.swap, ("state", i), state, (state[0], CLOSED)

    def _quiet(self, epoch: int) -> Steps:
        """`quiet`."""
        for slot in range(len(self.setup.writes)):
            seen = yield self.load, ("slot", slot)
            if seen != 0 and seen <= epoch:
                return False
        return True

    def _wanting(self, mine: Sequence[tuple[int, int]], chunk: int) -> Steps:
        """`_wanting`: those of the captures that need the chunk as it is now."""
        summary = yield self.load, ("summary", self._disk(chunk))
        if summary == 0:
            return ()
        del summary
        last = yield self.load, ("mark", chunk)
        found: tuple[tuple[int, int], ...] = ()
        for i, sequence in mine:
            since = yield self.load, ("since", i)
            if not since < last:
                continue
            epoch = yield self.load, ("epoch", i)
            if not last <= epoch:
                continue
            cursor = yield self.load, ("cursor", i)
            if not cursor <= chunk:
                continue
            state = yield self.load, ("state", i)
            if state and state[1] == CLOSED:
                found += ((i, sequence),)
            since = epoch = cursor = state = None
        return found

    def _copy(self, wanting: Sequence[tuple[int, int]], chunk: int) -> Steps:
        """`_copy`."""
        data: tuple[str, ...] = ()
        for sector in range(chunk * SECTORS, (chunk + 1) * SECTORS):
            value = yield self.load, ("sector", sector)
            data += (value,)
        value = None
        for i, sequence in wanting:
            record = yield self.add, ("records", i)
            limit = yield self.load, ("limit", i)
            if record < limit:
                parts = [(1, data), (0, (sequence, chunk))]
                if self._is("a copy that was cut short counts"):
                    parts.reverse()
                for part, value in parts:
                    yield self.spill, i, record, part, value
            elif not self._is("a full spill is not given up"):
                yield from self._give_up(i)
            if self._is("a writer waits until the sender has read"):
                cursor = yield self.load, ("cursor", i)
                while not cursor > chunk:
                    cursor = yield self.load, ("cursor", i)

    def _give_up(self, i: int) -> Steps:
        """`_give_up`."""
        state = yield self.load, ("state", i)
        if state and state[1] == CLOSED:
            yield self.swap, ("state", i), state, (state[0], GIVEN_UP)

    # --- the sender -----------------------------------------------------------------------------

    def sender(self, me: int, passes: int) -> Steps:
        """`replicator.captured.capture`, what a pass reads, and its end; again from there."""
        since = 1 if self.setup.old else 0
        replica = tuple(self.layout.memory[self._names["sector", n]] for n in self._sectors())
        if not self.setup.old:
            replica = ("nothing",) * len(replica)
        for _number in range(passes):
            place = yield from self._claim(me)
            epoch = yield from self._open(place, since)
            yield from self._await_quiet(place, epoch)
            found: dict[int, int] = {}
            scanned = 0
            runs: tuple[int, ...] = ()
            for disk in self.setup.disks:
                chunks, scanned = yield from self._runs(place, since, epoch, disk, found, scanned)
                runs += chunks
            copies = 0
            for chunk in runs:
                data = yield from self._read(place, epoch, chunk, found, scanned)
                data, scanned, copied = data
                copies += copied
                if data:
                    replica = (
                        *replica[: chunk * SECTORS],
                        *data,
                        *replica[(chunk + 1) * SECTORS :],
                    )
            state = yield self.load, ("state", place)
            intact = bool(state) and state[1] in (CLOSING, CLOSED)
            if self._is("nobody asks whether the capture is intact"):
                intact = True
            if intact:
                yield self.believed, epoch, copies, replica
            else:
                yield (self.given_up,)
            yield from self._end(place)
            yield self.truncate, place
            yield self.store, ("lease", place), NOBODY
            if not intact:
                return
            since = epoch
            place = epoch = found = scanned = runs = disk = chunks = chunk = data = None
            copies = copied = state = intact = None

    def _sectors(self) -> range:
        return range(len(self.chunks) * SECTORS)

    def _claim(self, me: int) -> Steps:
        """`Capture._claim`."""
        while True:
            for i in range(self.setup.places):
                got = yield self.try_lock, ("lease", i), me + 1
                if got:
                    yield from self._end(i)
                    yield self.truncate, i
                    return i

    def _end(self, i: int) -> Steps:
        """`_end_capture`."""
        yield self.bit, i, False
        yield self.store, ("state", i), 0
        yield self.store, ("epoch", i), NO_EPOCH

    def _open(self, i: int, since: int) -> Steps:
        """`Capture.__cinit__`."""
        yield self.store, ("since", i), since
        while True:
            yield self.store, ("records", i), 0
            yield self.store, ("cursor", i), 0
            yield self.fresh, ("sequence", i)
            guess = yield self.load, "word"
            yield self.store, ("epoch", i), guess
            yield self.store, ("state", i), (guess, CLOSING)
            if not self._is("the epoch advances before the bit is set"):
                yield self.bit, i, True
            epoch = yield self.add, "word"
            if self._is("the epoch advances before the bit is set"):
                yield self.bit, i, True
            if epoch == guess or self._is("another sender's epoch is taken for ours"):
                return epoch
            yield from self._end(i)

    def _await_quiet(self, i: int, epoch: int) -> Steps:
        """`Capture.closed`, until it is."""
        while True:
            state = yield self.load, ("state", i)
            quiet = yield from self._quiet(epoch)
            if quiet or self._is("the sender does not wait for the writers"):
                if state and state[1] == CLOSING:
                    yield self.swap, ("state", i), state, (state[0], CLOSED)
                yield self.found_closed, epoch
                return

    def _runs(
        self,
        i: int,
        since: int,
        epoch: int,
        chunks: Sequence[int],
        found: dict[int, int],
        scanned: int,
    ) -> Steps:
        """`Capture.runs` of one disk: chunks, each a run of its own."""
        changed = yield from self._newer(chunks, since)
        newer = yield from self._newer(chunks, epoch)
        scanned = yield from self._scan(i, found, scanned)
        if self._is("a newer chunk is no part of the capture"):
            return tuple(c for c in changed if c not in newer), scanned
        return tuple(c for c in changed if c not in newer or c in found), scanned

    def _newer(self, chunks: Sequence[int], since: int) -> Steps:
        """`ChangeMap.newer` and `ChangeMap.runs`."""
        newer: tuple[int, ...] = ()
        for chunk in chunks:
            summary = yield self.load, ("summary", self._disk(chunk))
            if summary <= since:
                continue
            mark = yield self.load, ("mark", chunk)
            if mark > since:
                newer += (chunk,)
            summary = mark = None
        return newer

    def _scan(self, i: int, found: dict[int, int], scanned: int) -> Steps:
        """`Capture._scan`."""
        records = yield self.load, ("records", i)
        gap = False
        for record in range(scanned, min(records, self.setup.records)):
            spill = yield self.load, ("spill", i)
            head = spill[record][0]
            del spill
            sequence = yield self.load, ("sequence", i)
            if head is None or head[0] != sequence:
                gap = not self._is("a record that is not there yet is not looked for again")
                continue
            if head[1] not in found or not self._is("a copy that was cut short counts"):
                found[head[1]] = record
            if not gap:
                scanned = record + 1
        return scanned

    def _read(self, i: int, epoch: int, chunk: int, found: dict[int, int], scanned: int) -> Steps:
        """`CapturedSource.data_extents`, then `Capture.fill`."""
        sectors = range(chunk * SECTORS, (chunk + 1) * SECTORS)
        holes = []
        for sector in sectors:
            value = yield self.load, ("sector", sector)
            holes.append(value == HOLE)
        hole = all(holes)
        del holes, value
        if hole:
            newer = yield from self._newer((chunk,), epoch)
            if not newer or self._is("the marks are not looked at after the holes"):
                return (HOLE,) * SECTORS, scanned, 0
        if self._is("the marks are looked at before the data"):
            newer = yield from self._newer((chunk,), epoch)
        if self._is("the cursor moves before the data is read"):
            yield self.store, ("cursor", i), chunk + 1
        data: tuple[str, ...] = ()
        for sector in sectors:
            value = yield self.load, ("sector", sector)
            data += (value,)
        value = sector = hole = None
        if self._is("the marks are not looked at after the data"):
            newer = ()
        elif not self._is("the marks are looked at before the data"):
            newer = yield from self._newer((chunk,), epoch)
        copied = 0
        if newer:
            scanned = yield from self._scan(i, found, scanned)
            if chunk in found:
                spill = yield self.load, ("spill", i)
                data, copied = spill[found[chunk]][1], 1
            else:
                yield from self._give_up(i)
        yield self.store, ("cursor", i), chunk + 1
        return data, scanned, copied

    # --- who else is there ----------------------------------------------------------------------

    def janitor(self) -> Steps:
        """`end_abandoned`."""
        bits = yield self.load, "bits"
        for i in range(self.setup.places):
            if not bits >> i & 1:
                continue
            got = yield self.try_lock, ("lease", i), -1
            if got:
                yield from self._end(i)
                yield self.truncate, i
                yield self.store, ("lease", i), NOBODY

    def other(self) -> Steps:
        """`Source.close_epoch`."""
        yield self.add, "word"

    def threads(self) -> list[Thread]:
        """Writers first."""
        found = [
            Thread(f"writer {n}", lambda n=n, write=write: self.disk_write(n, *write))
            for n, write in enumerate(self.setup.writes)
        ]
        found += [
            Thread(f"sender {n}", lambda n=n, passes=passes: self.sender(n, passes))
            for n, passes in enumerate(self.setup.passes)
        ]
        if self.setup.janitor:
            found.append(Thread("server", self.janitor))
        if self.setup.other:
            found.append(Thread("other", self.other))
        return found
