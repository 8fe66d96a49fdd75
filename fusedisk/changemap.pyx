# cython: boundscheck=False, wraparound=False
"""The change map: for every chunk the epoch of its last write, in shared file mappings.

Two kinds of file, both little endian and local to one host:

control file   offset 0   8 bytes magic ``FDCTRL1\\0``
               offset 64  u64 control word: bits 0-31 epoch, bit 32 gate, bit 33 fence, bit 34 doubt,
                         bit 35 promotion begun (fusedisk.gateword)
               offset 72 and from 1024 on: open captures (fusedisk.capture)
               offset 128 u64 the last epoch that may be opened (fusedisk.epochs)
               offset 192 rate of a slowed guest, its lease (fusedisk.slowing)
               offset 256 until when the gate stays closed (fusedisk.gateword)
               offset 4096, one slot every 64 bytes (a cache line): u64 announced word, 0 = free
map file       offset 0   8 bytes magic ``FDMAP01\\0``, u64 disk size, u64 chunk size (bytes)
               offset 4096 u32 summary[pages]: the highest mark in each page of marks; 0 = the page
                          holds no mark and may be unallocated
               then, page aligned, u32 marks[chunks]: epoch of the last write, 0 = never written

Who may touch what: writers announce themselves in a slot, then raise marks by an atomic maximum.
The control word is moved by the disk server and by senders, in atomic steps. Readers map both files
read-only; what they see of a closed epoch is complete, because closing waits until nobody announces
that epoch or an older one.

A crash at any step leaves too many marks at most, never too few: a mark is set before its data.
"""

import mmap
import os

from libc.stdint cimport uint32_t, uint64_t, int64_t
from cpython.buffer cimport PyObject_GetBuffer, PyBuffer_Release, PyBUF_SIMPLE, PyBUF_WRITABLE

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sched.h>
    #include <stdint.h>

    static uint64_t fd_load(uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static void fd_store(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static uint64_t fd_add(uint64_t *p, uint64_t v)
    { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
    static void fd_or(uint64_t *p, uint64_t v) { __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); }
    static void fd_and(uint64_t *p, uint64_t v) { __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); }
    static void fd_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static int fd_claim(uint64_t *p, uint64_t v)
    {
        uint64_t none = 0;
        return __atomic_compare_exchange_n(p, &none, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static uint32_t fd_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    /* Invariant: a mark never goes back, so a straggler cannot hide a newer epoch. */
    static void fd_max32(uint32_t *p, uint32_t v)
    {
        uint32_t seen = __atomic_load_n(p, __ATOMIC_RELAXED);
        while (seen < v && !__atomic_compare_exchange_n(p, &seen, v, 1, __ATOMIC_SEQ_CST,
                                                        __ATOMIC_RELAXED)) { }
    }
    """
    uint64_t fd_load(uint64_t *p) nogil
    void fd_store(uint64_t *p, uint64_t v) nogil
    uint64_t fd_add(uint64_t *p, uint64_t v) nogil
    void fd_or(uint64_t *p, uint64_t v) nogil
    void fd_and(uint64_t *p, uint64_t v) nogil
    void fd_fence() nogil
    int fd_claim(uint64_t *p, uint64_t v) nogil
    uint32_t fd_load32(const uint32_t *p) nogil
    void fd_max32(uint32_t *p, uint32_t v) nogil
    int posix_fallocate(int fd, int64_t offset, int64_t length) nogil
    int sched_yield() nogil

PAGE = 4096
SLOTS = 512
CHUNK_MIN = 4096
CHUNK_MAX = 16 << 20
EPOCH_MAX = (1 << 32) - 2
GATE = 1 << 32
FENCE = 1 << 33

cdef uint64_t EPOCH_MASK = 0xFFFFFFFF
cdef uint64_t GATE_BIT = 1 << 32
cdef uint64_t FENCE_BIT = 1ULL << 33
cdef uint64_t DOUBT_BIT = 1ULL << 34
cdef uint64_t BEGUN_BIT = 1ULL << 35
cdef Py_ssize_t SLOT_COUNT = 512
cdef Py_ssize_t PAGE_MARKS = 1024

_LIMIT_OFFSET = 128
_CONTROL_MAGIC = b"FDCTRL1\0"
_MAP_MAGIC = b"FDMAP01\0"


class Gated(Exception):
    """The gate is closed: hold the write and try again when it opens."""


class Fenced(Exception):
    """The source is fenced: the write must be refused (EROFS)."""


cdef inline uint64_t *_slot(char *control, Py_ssize_t i) noexcept nogil:
    return <uint64_t *>(control + 4096 + 64 * i)


cdef int enter(char *control, Py_ssize_t hint, Py_ssize_t *slot, uint32_t *epoch) noexcept nogil:
    """Announce a writer, in slot ``hint`` where that is free: OK, GATED or FENCED."""
    # Invariant: after the second load the closer of our epoch sees our slot, or we saw its step.
    cdef uint64_t word, again
    cdef uint64_t *shared = <uint64_t *>(control + 64)
    cdef Py_ssize_t i = hint
    while True:
        word = fd_load(shared)
        if word & FENCE_BIT:
            return FENCED
        if word & GATE_BIT:
            return GATED
        while not fd_claim(_slot(control, i), word):
            i += 1
            if i == SLOT_COUNT:
                i = 0
                sched_yield()
        again = fd_load(shared)
        if again == word:
            slot[0] = i
            epoch[0] = <uint32_t>(word & EPOCH_MASK)
            return OK
        fd_store(_slot(control, i), 0)


cdef void leave(char *control, Py_ssize_t slot) noexcept nogil:
    """End an announcement: what was written under it is marked and in the image."""
    fd_store(_slot(control, slot), 0)


cdef void doubt(char *control) noexcept nogil:
    """Note that an image may lack what was acknowledged: the kernel reports that only once."""
    fd_or(<uint64_t *>(control + 64), DOUBT_BIT)


cdef int held(char *control) noexcept nogil:
    """What would become of a writer now: OK, GATED or FENCED."""
    cdef uint64_t word = fd_load(<uint64_t *>(control + 64))
    if word & FENCE_BIT:
        return FENCED
    return GATED if word & GATE_BIT else OK


cdef bint quiet(const char *control, uint32_t epoch) noexcept nogil:
    """Whether no writer announces ``epoch`` or an older one."""
    cdef Py_ssize_t i
    cdef uint64_t seen
    for i in range(SLOT_COUNT):
        seen = fd_load(_slot(<char *>control, i))
        if seen != 0 and (seen & EPOCH_MASK) <= epoch:
            return False
    return True


cdef int raise_marks(
    const Marks *map, uint32_t epoch, uint64_t offset, uint64_t length
) noexcept nogil:
    """Raise the marks that bytes [offset, offset+length) touch to ``epoch``: 0 or an errno."""
    cdef Py_ssize_t chunk = <Py_ssize_t>(offset // map.chunk_size)
    cdef Py_ssize_t last = <Py_ssize_t>((offset + length - 1) // map.chunk_size)
    cdef Py_ssize_t page = -1
    cdef int failed
    while chunk <= last:
        if chunk // PAGE_MARKS != page:
            page = chunk // PAGE_MARKS
            if fd_load32(&map.summary[page]) == 0:
                # Invariant: pages exist before the first store; no room is an errno, no SIGBUS.
                failed = posix_fallocate(map.fd, map.marks_offset + page * 4096, 4096)
                if failed:
                    return failed
            fd_max32(&map.summary[page], epoch)
        fd_max32(&map.marks[chunk], epoch)
        chunk += 1
    # Invariant: the mark is seen before the data that follows it, also where a processor may show
    # what the kernel stores for a write earlier than an atomic store before it.
    fd_fence()
    return 0


cdef class _Mapping:
    """A shared mapping of a whole file, kept together with a pointer to its first byte."""

    def __cinit__(self, path, bint writable=False):
        self.fd = -1
        self.writable = writable
        self.fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size, mmap.MAP_SHARED, access)
        if writable:
            # Marks are set all over: with readahead around each, a sparse map would be dense in
            # the server's memory. Who only reads scans from end to end, and keeps it.
            self._map.madvise(mmap.MADV_RANDOM)
        PyObject_GetBuffer(self._map, &self._view, PyBUF_WRITABLE if writable else PyBUF_SIMPLE)
        self.base = <char *>self._view.buf

    cpdef close(self):
        """Unmap. Nothing of this object may be in use any more, by no thread."""
        if self.base != NULL:
            self.base = NULL
            PyBuffer_Release(&self._view)
            self._map.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __dealloc__(self):
        if self.base != NULL:
            PyBuffer_Release(&self._view)
        # Also where the file turned out to be none of ours, or empty after a crash.
        if self.fd >= 0:
            os.close(self.fd)

    cdef _check_open(self):
        if self.base == NULL:
            raise ValueError("the mapping is closed")

    def sync(self):
        """Write the mapping to its file and the file to the disk."""
        self._check_open()
        self._map.flush()
        os.fsync(self.fd)


cdef class Control(_Mapping):
    """The control word and the announcements of one mount.

    ``Control(path)`` maps an existing file (made by :meth:`create`) read-only.
    Raises ValueError when the file is not a control file.
    """

    @staticmethod
    def create(path, epoch, limit=EPOCH_MAX):
        """Make the control file at ``path`` (replacing none) with ``epoch`` open, 1 or higher.

        No epoch beyond ``limit`` is opened until that is raised; see fusedisk.epochs.
        """
        if not 1 <= epoch <= limit <= EPOCH_MAX:
            raise ValueError(f"epoch {epoch} is out of range")
        with open(path, "xb") as file:
            head = bytearray(PAGE + SLOTS * 64)
            head[: len(_CONTROL_MAGIC)] = _CONTROL_MAGIC
            head[64:72] = epoch.to_bytes(8, "little")
            head[_LIMIT_OFFSET : _LIMIT_OFFSET + 8] = limit.to_bytes(8, "little")
            file.write(head)
        return Control(path, True)

    def __init__(self, path, writable=False):
        if len(self._map) < PAGE + SLOTS * 64 or self._map[:8] != _CONTROL_MAGIC:
            raise ValueError(f"{path} is not a control file")
        self.word = <uint64_t *>(self.base + 64)
        self._limit = <uint64_t *>(self.base + 128)

    @property
    def epoch(self):
        """The epoch that is open now."""
        self._check_open()
        return fd_load(self.word) & EPOCH_MASK

    @property
    def limit(self):
        """The last epoch that may be opened; settable by whoever made a higher bound durable."""
        self._check_open()
        return fd_load(self._limit)

    @limit.setter
    def limit(self, uint64_t limit):
        self._own()
        fd_store(self._limit, limit)

    @property
    def gated(self):
        """Whether writes are held."""
        self._check_open()
        return bool(fd_load(self.word) & GATE_BIT)

    @property
    def fenced(self):
        """Whether writes are refused for good."""
        self._check_open()
        return bool(fd_load(self.word) & FENCE_BIT)

    @property
    def doubtful(self):
        """Whether the flush of an image has failed, so that no clean mark may be written."""
        self._check_open()
        return bool(fd_load(self.word) & DOUBT_BIT)

    def set_doubt(self):
        """Note that data may be lost which was written: no clean mark, nothing off the record."""
        self._own()
        doubt(self.base)

    def _own(self):
        self._check_open()
        if not self.writable:
            raise ValueError("the mapping is read-only")

    def advance(self):
        """Begin the next epoch; return the one before it, closed once :meth:`quiet` says so."""
        self._own()
        if self.epoch >= EPOCH_MAX:
            raise OverflowError("epochs are used up; mount with a new state directory")
        if self.epoch >= fd_load(self._limit):
            raise OverflowError("no epoch is reserved; see fusedisk.epochs")
        return fd_add(self.word, 1) & EPOCH_MASK

    def quiet(self, epoch):
        """Whether no writer announces ``epoch`` or an older one."""
        self._check_open()
        return quiet(self.base, epoch)

    def set_gate(self, closed):
        """Close or open the gate. Writes in flight end by themselves: see :meth:`quiet`."""
        self._own()
        if closed:
            fd_or(self.word, GATE_BIT)
        else:
            fd_and(self.word, ~(GATE_BIT | BEGUN_BIT))

    def set_fence(self, up):
        """Raise the fence; or lower it, with which no promotion is begun any more."""
        self._own()
        if up:
            fd_or(self.word, FENCE_BIT)
        else:
            # Invariant: in one step, or a gate let go in between would raise the fence again.
            fd_and(self.word, ~(FENCE_BIT | BEGUN_BIT))

    def clear_announcements(self):
        """Withdraw every announcement: those who made them are dead, and so is their I/O."""
        self._own()
        cdef Py_ssize_t i
        for i in range(SLOT_COUNT):
            fd_store(_slot(self.base, i), 0)

    def announce(self):
        """Announce a writer: (slot, epoch). Raises Gated or Fenced."""
        self._own()
        cdef Py_ssize_t slot = 0
        cdef uint32_t epoch = 0
        raise_held(enter(self.base, 0, &slot, &epoch))
        return slot, epoch

    def withdraw(self, Py_ssize_t slot):
        """End an announcement made by :meth:`announce`."""
        self._own()
        if not 0 <= slot < SLOT_COUNT:
            raise ValueError(f"slot {slot} is out of range")
        fd_store(_slot(self.base, slot), 0)


def raise_held(int code):
    """Raise Gated or Fenced where an attempt to announce a writer ended in that."""
    if code == GATED:
        raise Gated
    if code == FENCED:
        raise Fenced


cdef class ChangeMap(_Mapping):
    """The marks of one disk. ``ChangeMap(path)`` maps an existing file read-only.

    Raises ValueError when the file is not a change map or is shorter than its head says.
    """

    @staticmethod
    def create(path, size, chunk_size):
        """Make an empty map for a disk of ``size`` bytes. ENOSPC where the summary has no room."""
        if size <= 0 or size >= 1 << 62:
            raise ValueError(f"disk size {size} is out of range")
        if chunk_size & (chunk_size - 1) or not CHUNK_MIN <= chunk_size <= CHUNK_MAX:
            raise ValueError(f"chunk size {chunk_size} is not a power of two from 4 KiB to 16 MiB")
        marks_offset, total = _layout(size, chunk_size)[2:]
        with open(path, "xb") as file:
            head = _MAP_MAGIC + size.to_bytes(8, "little") + chunk_size.to_bytes(8, "little")
            file.write(head)
            file.truncate(total)
            # Invariant: a store into the summary can never meet a full disk (SIGBUS).
            os.posix_fallocate(file.fileno(), 0, marks_offset)
        return ChangeMap(path, True)

    def __init__(self, path, writable=False):
        head = bytes(self._map[:24])
        self.size = int.from_bytes(head[8:16], "little")
        self.chunk_size = int.from_bytes(head[16:24], "little")
        if (
            head[:8] != _MAP_MAGIC
            or not 0 < self.size < 1 << 62
            or self.chunk_size & (self.chunk_size - 1)
            or not CHUNK_MIN <= self.chunk_size <= CHUNK_MAX
        ):
            raise ValueError(f"{path} is not a change map")
        self.chunks, self._pages, marks_offset, total = _layout(self.size, self.chunk_size)
        if len(self._map) < total:
            raise ValueError(f"{path} is shorter than its head says")
        cdef int64_t offset = marks_offset
        self.map.fd = self.fd
        self.map.chunk_size = self.chunk_size
        self.map.summary = <uint32_t *>(self.base + 4096)
        self.map.marks = <uint32_t *>(self.base + offset)
        self.map.marks_offset = offset

    def _check_range(self, offset, length):
        self._check_open()
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"range {offset}+{length} is outside the disk of {self.size} bytes")

    def mark(self, epoch, offset, length):
        """Raise the marks of all chunks that bytes [offset, offset+length) touch to ``epoch``."""
        self._check_range(offset, length)
        if not self.writable:
            raise ValueError("the mapping is read-only")
        cdef int failed = 0
        if length:
            failed = raise_marks(&self.map, epoch, offset, length)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def last(self, Py_ssize_t chunk):
        """The epoch of the last write to ``chunk``; 0 when it was never written."""
        self._check_open()
        if not 0 <= chunk < self.chunks:
            raise IndexError(chunk)
        # Whoever read the data before looks at the mark after it: see raise_marks.
        fd_fence()
        if fd_load32(&self.map.summary[chunk // PAGE_MARKS]) == 0:
            return 0
        return fd_load32(&self.map.marks[chunk])

    def newer(self, Py_ssize_t first, Py_ssize_t count, uint32_t since):
        """Those of ``count`` chunks from ``first`` on that were written after epoch ``since``."""
        self._check_open()
        if not 0 <= first <= first + count <= self.chunks:
            raise IndexError(first)
        # Whoever read the data before looks at the marks after it: see raise_marks.
        fd_fence()
        return [
            chunk for chunk in range(first, first + count)
            if fd_load32(&self.map.summary[chunk // PAGE_MARKS]) > since
            and fd_load32(&self.map.marks[chunk]) > since
        ]

    def count(self, uint32_t since):
        """How many chunks were written after epoch ``since``."""
        self._check_open()
        cdef Py_ssize_t page, chunk, end, found = 0
        with nogil:
            for page in range(self._pages):
                if fd_load32(&self.map.summary[page]) <= since:
                    continue
                end = min((page + 1) * PAGE_MARKS, self.chunks)
                for chunk in range(page * PAGE_MARKS, end):
                    found += self.map.marks[chunk] > since
        return found

    def runs(self, uint32_t since, Py_ssize_t start=0, Py_ssize_t most=65536):
        """Runs of chunks written after epoch ``since``: at most ``most`` of (first, count).

        The scan starts at chunk ``start``; to go on, call again behind the last run.
        """
        self._check_open()
        if start < 0:
            raise ValueError("start is negative")
        found = []
        cdef Py_ssize_t chunk = start, first = -1, page
        while chunk < self.chunks:
            page = chunk // PAGE_MARKS
            if fd_load32(&self.map.summary[page]) <= since:
                if first >= 0:
                    found.append((first, chunk - first))
                    first = -1
                    if len(found) >= most:
                        return found
                chunk = (page + 1) * PAGE_MARKS
                continue
            if fd_load32(&self.map.marks[chunk]) > since:
                if first < 0:
                    first = chunk
            elif first >= 0:
                found.append((first, chunk - first))
                first = -1
                if len(found) >= most:
                    return found
            chunk += 1
        if first >= 0:
            found.append((first, self.chunks - first))
        return found


def _layout(size, chunk_size):
    """(chunks, pages of marks, offset of the marks, length of the file)."""
    chunks = -(-size // chunk_size)
    pages = -(-chunks // 1024)
    marks_offset = PAGE + -(-pages * 4 // PAGE) * PAGE
    return chunks, pages, marks_offset, marks_offset + pages * PAGE
