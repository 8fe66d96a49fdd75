# cython: boundscheck=False, wraparound=False
"""Captures: the disks as they were when an epoch was closed, while writing goes on.

A capture of closed epoch E for a replica at epoch A needs the chunks with A < last <= E. A writer in
a later epoch that is about to overwrite one of them copies it into the capture's *spill* first, then
marks, then writes. A reader reads the image, and looks at the marks after that: where a mark is
beyond E, the chunk may be overwritten, and its copy in the spill is the state at E; without a copy
the chunk was not part of the capture.

Shared memory, in the first page of the control file (fusedisk.changemap):

offset 72            u64: bit i set = capture i is open
offset 1024 + 128 i  u64 state (E << 2 | 1 closing, 2 closed, 3 given up), u64 since (A), u64 epoch (E),
                     u64 cursor (disk << 48 | chunk: everything before it has been read),
                     u64 records (taken in the spill), u64 limit (records), u64 sequence

``STATE/spill.i`` holds records of 4096 bytes and one chunk each. A record begins with u64 sequence,
u32 disk, u32 flags (1 = all zero, no data), u64 chunk, u64 length, u64 check. The reader's flock on
the file is its lease: a capture whose reader died is ended by the server.

- The bit is set before the epoch is advanced, so whoever writes in a later epoch sees it.
- Nobody preserves before E is closed: writers in E may still be at work. Who meets a capture that is
  closing waits for them, holding nothing that they could need.
- Check, copy and mark of one chunk are under a lock, with a second look at the mark inside, or a
  second writer could preserve the first one's data as old.
- The guest never waits for the reader: a spill that is full, fails, or leaves too little room on its
  filesystem gives the capture up.
- A server that is killed leaves copies without marks at most, so captures outlive it.
"""

import errno
import fcntl
import os
import secrets

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from fusedisk.changemap cimport ChangeMap, Control, Marks, quiet, raise_marks

from fusedisk.direct import read_into

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <sched.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/statvfs.h>
    #include <unistd.h>

    struct fd_capture { uint64_t state, since, epoch, cursor, records, limit, sequence; };
    struct fd_record { uint64_t sequence; uint32_t disk, flags; uint64_t chunk, length, check; };
    /* A reader may see a record that is half written: all of its head has to fit together. */
    static uint64_t fd_check(const struct fd_record *r)
    {
        return r->sequence ^ (r->chunk + 1) * 0x9E3779B97F4A7C15u
               ^ ((uint64_t)r->disk << 32 | r->flags) ^ r->length << 20;
    }

    static uint64_t fd_get(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static void fd_put(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static uint64_t fd_take(uint64_t *p) { return __atomic_fetch_add(p, 1, __ATOMIC_SEQ_CST); }
    static int fd_swap(uint64_t *p, uint64_t from, uint64_t to)
    {
        return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static void fd_bits(uint64_t *p, uint64_t on, uint64_t off)
    {
        if (on) __atomic_fetch_or(p, on, __ATOMIC_SEQ_CST);
        if (off) __atomic_fetch_and(p, ~off, __ATOMIC_SEQ_CST);
    }
    static uint32_t fd_mark(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

    #define FD_STRIPES 256
    static pthread_mutex_t fd_stripes[FD_STRIPES];
    static void fd_stripes_begin(void)
    { for (int i = 0; i < FD_STRIPES; i++) pthread_mutex_init(&fd_stripes[i], NULL); }
    static void fd_stripe_lock(uint64_t n) { pthread_mutex_lock(&fd_stripes[n % FD_STRIPES]); }
    static void fd_stripe_unlock(uint64_t n) { pthread_mutex_unlock(&fd_stripes[n % FD_STRIPES]); }

    static int fd_read_chunk(int fd, char *into, uint64_t length, int64_t offset)
    {
        uint64_t done = 0;
        while (done < length) {
            ssize_t n = pread(fd, into + done, length - done, offset + done);
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) return -1;
            done += n;
        }
        return 0;
    }
    static int fd_all_zero(const char *data, uint64_t length)
    { return length == 0 || (data[0] == 0 && memcmp(data, data + 1, length - 1) == 0); }
    static int fd_write_whole(int fd, const char *data, uint64_t length, int64_t offset)
    {
        ssize_t n;
        do { n = pwrite(fd, data, length, offset); } while (n < 0 && errno == EINTR);
        return n == (ssize_t)length ? 0 : -1;
    }
    /* The head comes last: a server that is killed in between leaves no record. */
    static int fd_append(int fd, struct fd_record *head, const char *data, uint64_t length,
                         int64_t offset)
    {
        if (length && fd_write_whole(fd, data, length, offset + 4096))
            return -1;
        return fd_write_whole(fd, (const char *)head, sizeof *head, offset);
    }
    /* Whether a filesystem would still have as much room after a write as the file takes up by it,
       and what a guest needs for a while: so a spill takes half of the room that there was at most. */
    #define FD_ROOM_LEFT (64ULL << 20)
    static int fd_leaves_room(int fd, uint64_t end)
    {
        struct statvfs found;
        if (fstatvfs(fd, &found)) return 0;
        return (uint64_t)found.f_bavail * found.f_frsize >= end + FD_ROOM_LEFT;
    }
    static char *fd_buffer(uint64_t length)
    {
        void *found = NULL;
        return posix_memalign(&found, 4096, length) ? NULL : found;
    }
    """
    struct fd_capture:
        uint64_t state, since, epoch, cursor, records, limit, sequence
    struct fd_record:
        uint64_t sequence
        uint32_t disk
        uint32_t flags
        uint64_t chunk
        uint64_t length
        uint64_t check
    uint64_t fd_check(const fd_record *r) nogil
    uint64_t fd_get(const uint64_t *p) nogil
    void fd_put(uint64_t *p, uint64_t v) nogil
    uint64_t fd_take(uint64_t *p) nogil
    int fd_swap(uint64_t *p, uint64_t expected, uint64_t to) nogil
    void fd_bits(uint64_t *p, uint64_t on, uint64_t off) nogil
    uint32_t fd_mark(const uint32_t *p) nogil
    void fd_stripes_begin() nogil
    void fd_stripe_lock(uint64_t n) nogil
    void fd_stripe_unlock(uint64_t n) nogil
    int fd_read_chunk(int fd, char *into, uint64_t length, int64_t offset) nogil
    int fd_all_zero(const char *data, uint64_t length) nogil
    int fd_append(int fd, fd_record *head, const char *data, uint64_t length, int64_t offset) nogil
    int fd_leaves_room(int fd, uint64_t end) nogil
    char *fd_buffer(uint64_t length) nogil
    void free(void *p) nogil
    int sched_yield() nogil

# In the low bits of a state, above which stands the epoch: so a change of state that comes late can
# never meet another capture in the same place.
cdef uint64_t _CLOSING = 1, _CLOSED = 2, _GIVEN_UP = 3, _CODE = 3
cdef uint64_t _HEAD = 4096
cdef uint64_t _ZERO = 1
# Of a change map, under one entry of its summary.
cdef enum:
    _PAGE_MARKS = 1024

fd_stripes_begin()


cdef inline fd_capture *_slot(const char *control, int i) noexcept nogil:
    return <fd_capture *>(control + 1024 + 128 * i)


cdef inline uint64_t *_open_bits(const char *control) noexcept nogil:
    return <uint64_t *>(control + 72)


cdef bint captures_open(const char *control) noexcept nogil:
    """Whether any capture is open: the only cost to a writer while none is."""
    return fd_get(_open_bits(control)) != 0


cdef void preserve(
    char *control, const Spills *spills, uint32_t disk, const Marks *map, int image,
    uint64_t size, uint32_t epoch, uint64_t offset, uint64_t length,
) noexcept nogil:
    """Copy what open captures need of a range that is about to change in ``epoch``.

    The caller is announced in ``epoch`` and marks afterwards, whatever became of the captures.
    """
    # A capture that opens from now on has our epoch or a later one, and waits for us.
    cdef uint64_t chunk, wanting, mine = 0, bits = fd_get(_open_bits(control))
    cdef uint64_t last = (offset + length - 1) // map.chunk_size
    cdef uint64_t sequences[CAPTURES_MAX]
    cdef char *data = NULL
    cdef int i
    for i in range(CAPTURES_MAX):
        if bits >> i & 1:
            # Invariant: read first, so that a copy made for one capture never looks like one of a
            # later capture in the same place.
            sequences[i] = fd_get(&_slot(control, i).sequence)
            if _await_closed(control, _slot(control, i), sequences[i], epoch):
                mine |= 1ULL << i
    if mine == 0:
        return
    for chunk in range(offset // map.chunk_size, last + 1):
        if _wanting(control, mine, disk, map, chunk) == 0:
            continue
        if data == NULL:
            data = fd_buffer(map.chunk_size)
        fd_stripe_lock(chunk * 64 + disk)
        # Again: another writer may have copied and marked it meanwhile.
        wanting = _wanting(control, mine, disk, map, chunk)
        if wanting:
            _copy(control, spills, wanting, sequences, disk, map, image, size, chunk, data)
            # Invariant: marked after the copy and inside the lock. Where the mark finds no room the
            # caller's own attempt fails as well, and nothing is written.
            raise_marks(map, epoch, chunk * map.chunk_size, 1)
        fd_stripe_unlock(chunk * 64 + disk)
    free(data)


cdef bint _await_closed(
    char *control, fd_capture *capture, uint64_t sequence, uint32_t epoch
) noexcept nogil:
    """Wait until nobody writes in the captured epoch; false where the capture needs nothing of us.

    A capture of our own epoch or a later one waits for us: we must not wait for it.
    """
    cdef uint64_t state
    while True:
        state = fd_get(&capture.state)
        if state >> 2 >= epoch or fd_get(&capture.sequence) != sequence:
            return False
        if state & _CODE != _CLOSING:
            return state & _CODE == _CLOSED
        # Whoever sees it quiet says so: no writer waits for the reader, which may be dead.
        if quiet(control, <uint32_t>(state >> 2)):
            fd_swap(&capture.state, state, state + 1)
        else:
            sched_yield()


cdef uint64_t _wanting(
    char *control, uint64_t captures, uint32_t disk, const Marks *map, uint64_t chunk
) noexcept nogil:
    """Which of ``captures`` need the chunk as it is now, as bits."""
    cdef fd_capture *capture
    cdef uint64_t last, found = 0
    cdef int i
    if fd_mark(&map.summary[chunk // _PAGE_MARKS]) == 0:
        return 0
    last = fd_mark(&map.marks[chunk])
    for i in range(CAPTURES_MAX):
        capture = _slot(control, i)
        if (
            captures >> i & 1
            and fd_get(&capture.since) < last <= fd_get(&capture.epoch)
            and fd_get(&capture.cursor) <= (<uint64_t>disk << 48 | chunk)
            and fd_get(&capture.state) & _CODE == _CLOSED
        ):
            found |= 1ULL << i
    return found


cdef void _copy(
    char *control, const Spills *spills, uint64_t wanting, const uint64_t *sequences,
    uint32_t disk, const Marks *map, int image, uint64_t size, uint64_t chunk, char *data,
) noexcept nogil:
    cdef fd_record head
    cdef fd_capture *capture
    cdef uint64_t record, at, start = chunk * map.chunk_size
    cdef uint64_t length = min(map.chunk_size, size - start)
    cdef bint whole = data != NULL and fd_read_chunk(image, data, length, start) == 0
    cdef bint kept
    cdef int i
    memset(&head, 0, sizeof(head))
    head.disk, head.chunk, head.length = disk, chunk, length
    head.flags = <uint32_t>_ZERO if whole and fd_all_zero(data, length) else 0
    for i in range(CAPTURES_MAX):
        if not wanting >> i & 1:
            continue
        capture = _slot(control, i)
        head.sequence = sequences[i]
        head.check = fd_check(&head)
        record = fd_take(&capture.records)
        at = record * (_HEAD + map.chunk_size)
        # Invariant: the guest's own writes come first where room is scarce.
        kept = (
            whole and record < fd_get(&capture.limit)
            and fd_leaves_room(spills.fds[i], at + _HEAD + map.chunk_size)
            and 0 == fd_append(spills.fds[i], &head, data, 0 if head.flags else length, at)
        )
        if not kept:
            # The guest goes on; the capture's reader finds out before it believes anything.
            _give_up(capture)


cdef void _end_capture(char *control, int index) noexcept:
    fd_bits(_open_bits(control), 0, 1ULL << index)
    fd_put(&_slot(control, index).state, 0)
    # No writer's epoch is beyond this one: who looks while the next capture is set up finds nothing.
    fd_put(&_slot(control, index).epoch, <uint64_t>-1)


cdef void _give_up(fd_capture *capture) noexcept nogil:
    cdef uint64_t state = fd_get(&capture.state)
    if state & _CODE == _CLOSED:
        fd_swap(&capture.state, state, state + 1)


class NoCapture(Exception):
    """All places for captures are taken."""


cdef class Capture:
    """A reader's capture. Closes and frees its spill in :meth:`close`.

    ``Capture(state, control, limit_bytes, chunk_size)`` takes a place and nothing more, so that it
    can be had before the guest is frozen. :meth:`open` then advances the epoch; ``epoch`` is the
    one before, whose state is captured once :meth:`closed` says so. Raises NoCapture or OSError.
    """

    cdef Control _control
    cdef fd_capture *_capture
    cdef int _index, _spill
    cdef uint64_t _chunk_size
    cdef dict _found
    cdef uint64_t _scanned
    cdef readonly object epoch

    def __cinit__(self, str state, Control control not None, uint64_t limit_bytes,
                  uint64_t chunk_size):
        self._spill, self._control, self._chunk_size = -1, control, chunk_size
        self._found, self._scanned = {}, 0
        if not control.writable:
            raise ValueError("the mapping is read-only")
        for index in range(CAPTURES_MAX):
            if self._claim(f"{state}/spill.{index}", index):
                break
        else:
            raise NoCapture("too many captures are open; wait for another replica's")
        self._capture.limit = limit_bytes // (_HEAD + chunk_size)

    def open(self, uint64_t since):
        """Advance the epoch and begin to capture what was written after epoch ``since``."""
        self._capture.since = since
        while True:
            self._capture.cursor = self._capture.records = 0
            fd_put(&self._capture.sequence, secrets.randbits(63) | 1)
            guess = self._control.epoch
            fd_put(&self._capture.epoch, guess)
            fd_put(&self._capture.state, <uint64_t>guess << 2 | _CLOSING)
            fd_bits(_open_bits(self._control.base), 1ULL << self._index, 0)
            # Invariant: the bit and the epoch are there before anybody can write in the next one.
            self.epoch = self._control.advance()
            if self.epoch == guess:
                return
            # Another reader advanced in between: what is captured would not be what was closed.
            self._end()

    cdef bint _claim(self, path, int index) except -1:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._spill, self._index = fd, index
        self._capture = _slot(self._control.base, index)
        # A reader that died may have left it open.
        self._end()
        os.ftruncate(fd, 0)
        return True

    cdef _end(self):
        _end_capture(self._control.base, self._index)

    def closed(self):
        """Whether nobody writes in the captured epoch any more."""
        cdef uint64_t state = fd_get(&self._capture.state)
        if not self._control.quiet(self.epoch):
            return False
        if state & _CODE == _CLOSING:
            fd_swap(&self._capture.state, state, state + 1)
        return True

    @property
    def intact(self):
        """Whether everything read so far was the captured state; once false, for good."""
        return fd_get(&self._capture.state) & _CODE in (_CLOSING, _CLOSED)

    @property
    def spilled_bytes(self):
        """Bytes that the copies take in the spill."""
        return min(self._capture.records, self._capture.limit) * (_HEAD + self._chunk_size)

    @property
    def spill_bytes_max(self):
        """Bytes at which the capture is given up."""
        return self._capture.limit * (_HEAD + self._chunk_size)

    def runs(self, ChangeMap changes not None, int disk, uint64_t start, uint64_t end,
             Py_ssize_t most=4096):
        """Runs (first, count) of the chunks from ``start`` to ``end`` that the capture consists of.

        Returns also the chunk up to which that is all, since ``most`` and about as many are looked
        at; go on from there. Call it when :meth:`closed`, and not for what was read already. To be
        believed only if :attr:`intact` afterwards.
        """
        seen, reached = self._seen(changes, start, min(end, <uint64_t>changes.chunks), most)
        if any(newer for _, _, newer in seen):
            # In this order: a newer chunk belongs to the capture if there is a copy, which was made
            # before its mark.
            self._scan()
        found = []
        for first, count, newer in seen:
            if not newer:
                _join(found, first, count)
                continue
            for chunk in range(first, first + count):
                if (disk, chunk) in self._found:
                    _join(found, chunk, 1)
        return found, reached

    cdef _seen(self, ChangeMap changes, uint64_t start, uint64_t end, Py_ssize_t most):
        """Runs (first, count, newer) of chunks written since, by whether in a later epoch."""
        cdef uint64_t since = self._capture.since, epoch = self._capture.epoch
        cdef uint64_t chunk = start, following, first = start
        cdef int kind, before = 0
        cdef uint32_t last
        seen = []
        while chunk < end and len(seen) < most:
            following = (chunk // _PAGE_MARKS + 1) * _PAGE_MARKS
            kind = 0
            if fd_mark(&changes.map.summary[chunk // _PAGE_MARKS]) > since:
                last = fd_mark(&changes.map.marks[chunk])
                kind = 0 if last <= since else 1 if last <= epoch else 2
                following = chunk + 1
            if kind != before:
                if before:
                    seen.append((first, chunk - first, before == 2))
                first, before = chunk, kind
            chunk = min(following, end)
        if before:
            seen.append((first, chunk - first, before == 2))
        return seen, max(chunk, start)

    def fill(self, ChangeMap changes not None, int disk, int image, buffer, uint64_t offset):
        """Fill a writable buffer with captured bytes from ``offset`` on, all of :meth:`runs`.

        Call it in the order of disks and offsets: no copies are made of what was read. To be
        believed only if :attr:`intact` afterwards. Raises OSError.
        """
        view = memoryview(buffer)
        cdef uint64_t end = offset + len(view)
        cdef uint64_t size = self._chunk_size, low, high
        read_into(image, view, offset)
        # Invariant: the marks are looked at after the data was read. Whoever overwrote it marked it
        # before, and had copied it before that.
        newer = changes.newer(offset // size, (end - 1) // size - offset // size + 1, self.epoch)
        if newer:
            self._scan()
        for chunk in newer:
            low, high = max(offset, chunk * size), min(end, (chunk + 1) * size)
            self._take_copy(disk, chunk, view[low - offset:high - offset], low - chunk * size)
        fd_put(&self._capture.cursor, <uint64_t>disk << 48 | end // size)

    def _take_copy(self, int disk, uint64_t chunk, view, uint64_t skip):
        record = self._found.get((disk, chunk))
        if record is None:
            # Given up, or read out of order: either way this is not the captured state.
            _give_up(self._capture)
            return
        index, flags = record
        if flags & _ZERO:
            view[:] = bytes(len(view))
        else:
            read_into(self._spill, view, index * (_HEAD + self._chunk_size) + _HEAD + skip)

    def _scan(self):
        """Take note of records that came since; one that is being written is nobody's yet."""
        cdef fd_record head
        cdef uint64_t record, records = min(self._capture.records, self._capture.limit)
        cdef bint gap = False
        for record in range(self._scanned, records):
            raw = os.pread(self._spill, sizeof(head), record * (_HEAD + self._chunk_size))
            if len(raw) == sizeof(head):
                head = (<fd_record *><char *>raw)[0]
            if (
                len(raw) != sizeof(head)
                or head.sequence != self._capture.sequence
                or head.check != fd_check(&head)
            ):
                gap = True
                continue
            # The last one counts: a copy whose maker was killed is followed by another one before
            # the chunk is marked.
            self._found[head.disk, head.chunk] = (record, head.flags)
            if not gap:
                self._scanned = record + 1

    def close(self):
        """End the capture and free its spill."""
        if self._spill >= 0:
            self._end()
            os.ftruncate(self._spill, 0)
            os.close(self._spill)
            self._spill = -1

    def __dealloc__(self):
        # That gives up the lease; the mapping may be gone already.
        if self._spill >= 0:
            os.close(self._spill)


def _join(runs, first, count):
    """Add a run to ascending ones, joined to the last where they touch."""
    if runs and runs[len(runs) - 1][0] + runs[len(runs) - 1][1] == first:
        begun, before = runs.pop()
        first, count = begun, before + count
    runs.append((first, count))


def open_spills(state):
    """Descriptors of the spills of a mount, for the disk server. Raises OSError."""
    return [
        os.open(f"{state}/spill.{i}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for i in range(CAPTURES_MAX)
    ]


def end_abandoned(state, Control control not None):
    """End the captures whose readers died, so that no copies are made for them any more."""
    cdef uint64_t bits = fd_get(_open_bits(control.base))
    for index in range(CAPTURES_MAX):
        if not bits >> index & 1:
            continue
        fd = os.open(f"{state}/spill.{index}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _end_capture(control.base, index)
            os.ftruncate(fd, 0)
        finally:
            os.close(fd)
