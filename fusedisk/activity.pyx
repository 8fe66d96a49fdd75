# cython: boundscheck=False, wraparound=False
"""The activity log: which regions of the disks have changes that a crash of the host might take.

A region is on record, durably, before its first change, and leaves the record only when the image
and the change map hold all its changes durably (fusedisk.checkpoint). In the manner of DRBD's
activity log, but with bits in place of a list. The file's format is in fusedisk.activityfile.

Who does what: the data path heats regions, announced (fusedisk.changemap); one checkpoint at a
time ages, then drops them. Files are written under one lock, states change by compare-and-swap:

    COLD → WANTED      a writer is about to put the region on record
    WANTED → BUSY      it is on record, durably; the writer may go on
    BUSY → IDLE        age(): nobody has touched it since
    IDLE → COOLING     age(cool=…): the checkpoint that began wants to drop it
    IDLE, COOLING → BUSY   a writer touched it: it is still on record, so without I/O
    COOLING → COLD     drop(): nobody has touched it since, and it is synced
"""

import os

from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from fusedisk.activityfile import BLOCK, HEAD, MAGIC, REGIONS_IN_BLOCK, parse

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <unistd.h>
    #include <pthread.h>

    static int act_swap(uint8_t *p, uint8_t from, uint8_t to)
    {
        return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    /* CRC-32 as in zlib, bit by bit: a block is written once in a long while. */
    static uint32_t act_crc(const unsigned char *p, size_t n)
    {
        uint32_t crc = 0xFFFFFFFFu;
        while (n--) {
            crc ^= *p++;
            for (int k = 0; k < 8; k++) crc = (crc >> 1) ^ (0xEDB88320u & -(crc & 1));
        }
        return ~crc;
    }
    static int act_write(int fd, const char *page, size_t length, int64_t offset)
    {
        size_t done = 0;
        while (done < length) {
            ssize_t n = pwrite(fd, page + done, length - done, offset + done);
            if (n < 0) { if (errno == EINTR) continue; return errno; }
            if (n == 0) return EIO;
            done += n;
        }
        return 0;
    }
    """
    int act_swap(uint8_t *p, uint8_t before, uint8_t after) nogil
    uint32_t act_crc(const unsigned char *p, size_t n) nogil
    int act_write(int fd, const char *page, size_t length, int64_t offset) nogil

cdef extern from "pthread.h" nogil:
    int pthread_mutex_init(pthread_mutex_t *lock, void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *lock)
    int pthread_mutex_lock(pthread_mutex_t *lock)
    int pthread_mutex_unlock(pthread_mutex_t *lock)

REGION = 1 << REGION_SHIFT

cdef enum:
    _BLOCK = 4096
    _HEAD = 48
    _REGIONS_IN_BLOCK = (4096 - 48) * 8
    # Rounds of age(): almost three hours. What is idle for longer is equally old.
    _AGES = 1024

assert (BLOCK, HEAD, REGIONS_IN_BLOCK) == (_BLOCK, _HEAD, _REGIONS_IN_BLOCK)
cdef bytes _MAGIC = MAGIC
cdef char *_magic = _MAGIC


cdef int heat_slowly(Activity *log, uint64_t first, uint64_t last) noexcept nogil:
    """Heat regions first to last, some of which are not BUSY: 0 or an errno."""
    cdef uint64_t region, block
    cdef uint8_t state
    cdef bint wanted = False
    cdef int failed = 0
    for region in range(first, last + 1):
        while True:
            state = act_load(&log.states[region])
            if state == BUSY:
                break
            if state == WANTED or (state == COLD and act_swap(&log.states[region], COLD, WANTED)):
                wanted = True
                break
            if state != COLD and act_swap(&log.states[region], state, BUSY):
                break
    if not wanted:
        return 0
    pthread_mutex_lock(&log.lock)
    for block in range(first // _REGIONS_IN_BLOCK, last // _REGIONS_IN_BLOCK + 1):
        # Whoever had the lock before may have written for all who were waiting.
        if _any_wanted(log, block, first, last):
            failed = _write_block(log, block)
            if failed:
                break
    pthread_mutex_unlock(&log.lock)
    return failed


cdef bint _any_wanted(Activity *log, uint64_t block, uint64_t first, uint64_t last) noexcept nogil:
    cdef uint64_t start = block * _REGIONS_IN_BLOCK
    cdef uint64_t end = min(start + _REGIONS_IN_BLOCK, last + 1)
    cdef uint64_t region
    for region in range(max(start, first), end):
        if act_load(&log.states[region]) == WANTED:
            return True
    return False


cdef int _write_block(Activity *log, uint64_t block) noexcept nogil:
    """Write the record of one block's regions, durably: 0 or an errno. Under the lock.

    Invariant: the copy written durably last is not touched, so a torn write loses nothing.
    """
    cdef uint64_t start = block * _REGIONS_IN_BLOCK, region
    cdef uint64_t end = min(start + _REGIONS_IN_BLOCK, log.regions)
    cdef uint64_t sequence = log.sequences[block] + 1
    cdef unsigned char *page = <unsigned char *>log.page
    cdef unsigned char *bits = page + _HEAD
    cdef uint8_t copy = 1 - log.newest[block]
    cdef uint32_t number = <uint32_t>block, crc
    cdef int failed
    memset(page, 0, _BLOCK)
    memcpy(page, _magic, 8)
    memcpy(page + 8, log.generation, 16)
    memcpy(page + 24, &sequence, 8)
    memcpy(page + 32, &log.regions, 8)
    memcpy(page + 40, &number, 4)
    for region in range(start, end):
        if act_load(&log.states[region]) != COLD:
            bits[(region - start) >> 3] |= 1 << ((region - start) & 7)
    crc = act_crc(page, _BLOCK)
    memcpy(page + 44, &crc, 4)
    failed = act_write(log.fd, log.page, _BLOCK, <int64_t>((2 * block + copy) * _BLOCK))
    if failed:
        return failed
    log.newest[block] = copy
    log.sequences[block] = sequence
    for region in range(start, end):
        # Only what this very block says: others may have begun to want theirs meanwhile.
        if bits[(region - start) >> 3] >> ((region - start) & 7) & 1:
            act_swap(&log.states[region], WANTED, BUSY)
    return 0


cdef inline int _rounds_idle(Activity *log, uint64_t region) noexcept nogil:
    return <int>min(log.rounds - log.idle_since[region], <uint32_t>(_AGES - 1))


cdef class ActivityLog:
    """The log of a mount that is served; ``generation`` is the mount's.

    Raises OSError, or ValueError where the file is not whole and of this generation.
    """

    def __cinit__(self, path, generation):
        cdef uint64_t i
        self.log.fd = -1
        pthread_mutex_init(&self.log.lock, NULL)
        self.log.fd = os.open(path, os.O_RDWR | os.O_DSYNC | os.O_CLOEXEC)
        content = os.pread(self.log.fd, os.fstat(self.log.fd).st_size, 0)
        found = parse(content, generation)
        # Invariant: what counts as written durably is. The server before us may have ended between
        # the page cache and the disk; the same bytes again cannot tear what is on the disk already.
        if os.pwrite(self.log.fd, content, 0) != len(content):
            raise OSError(EIO, os.strerror(EIO))
        self.log.regions, self.log.blocks = found.regions, len(found.sequences)
        self.log.states = <uint8_t *>calloc(self.log.regions, 1)
        self.log.idle_since = <uint32_t *>calloc(self.log.regions, 4)
        self.log.newest = <uint8_t *>calloc(self.log.blocks, 1)
        self.log.sequences = <uint64_t *>calloc(self.log.blocks, 8)
        self.log.page = <char *>calloc(1, _BLOCK)
        if not (
            self.log.states and self.log.idle_since and self.log.newest and self.log.sequences
            and self.log.page
        ):
            raise MemoryError
        self._generation = found.generation
        memcpy(self.log.generation, <char *>self._generation, 16)
        for i in range(self.log.blocks):
            self.log.newest[i], self.log.sequences[i] = found.newest[i], found.sequences[i]
        for region in found.hot:
            self.log.states[region] = BUSY

    def close(self):
        """Close the file; a writer that needs it afterwards meets EBADF."""
        if self.log.fd >= 0:
            os.close(self.log.fd)
            self.log.fd = -1

    def __dealloc__(self):
        if self.log.fd >= 0:
            os.close(self.log.fd)
        free(self.log.states)
        free(self.log.idle_since)
        free(self.log.newest)
        free(self.log.sequences)
        free(self.log.page)
        pthread_mutex_destroy(&self.log.lock)

    @property
    def regions(self):
        """Regions of all disks together."""
        return self.log.regions

    def hot(self):
        """The regions on record, as numbers over all disks."""
        return [i for i in range(self.log.regions) if act_load(&self.log.states[i]) != COLD]

    def heat(self, uint64_t disk_first, uint64_t offset, uint64_t length):
        """What a writer does before it changes a range. Raises OSError."""
        cdef int failed
        if disk_first + ((offset + length - 1) >> REGION_SHIFT) >= self.log.regions or not length:
            raise ValueError(f"range {offset}+{length} is outside the log")
        with nogil:
            failed = heat(&self.log, disk_first, offset, length)
        if failed:
            raise OSError(failed, os.strerror(failed))

    def age(self, uint64_t cool):
        """Note who is busy from now on; begin to drop ``cool`` of those idle before, or all.

        Those that nobody has touched for the longest time go first. Returns how many regions may
        be dropped after a checkpoint.
        """
        cdef uint64_t region, cooling = 0
        cdef uint64_t idle[_AGES]
        cdef uint8_t state
        cdef int age
        memset(idle, 0, sizeof(idle))
        with nogil:
            self.log.rounds += 1
            for region in range(self.log.regions):
                state = act_load(&self.log.states[region])
                if state == IDLE:
                    idle[_rounds_idle(&self.log, region)] += 1
                elif state == COOLING:
                    cooling += 1
                elif state == BUSY and act_swap(&self.log.states[region], BUSY, IDLE):
                    self.log.idle_since[region] = self.log.rounds
            age = _AGES - 1
            while age > 1 and idle[age] < cool:
                cool -= idle[age]
                age -= 1
            for region in range(self.log.regions if cool else 0):
                if act_load(&self.log.states[region]) != IDLE:
                    continue
                if _rounds_idle(&self.log, region) < age:
                    continue
                if _rounds_idle(&self.log, region) == age:
                    if not cool:
                        continue
                    cool -= 1
                cooling += act_swap(&self.log.states[region], IDLE, COOLING)
        return cooling

    def count(self):
        """How many regions are on record."""
        cdef uint64_t region, found = 0
        for region in range(self.log.regions):
            found += act_load(&self.log.states[region]) != COLD
        return found

    def drop(self):
        """Take what is still cooling off the record; return how many regions.

        Invariant: all that was written to them before age(cool=True), and by writers who had been
        announced then, is durable in image and change map. Raises OSError: the record may then
        name too many regions, never too few.
        """
        cdef uint64_t block, region, end, dropped = 0
        cdef bint changed
        cdef int failed = 0
        with nogil:
            pthread_mutex_lock(&self.log.lock)
            for block in range(self.log.blocks):
                changed = False
                end = min((block + 1) * _REGIONS_IN_BLOCK, self.log.regions)
                for region in range(block * _REGIONS_IN_BLOCK, end):
                    if act_swap(&self.log.states[region], COOLING, COLD):
                        changed = True
                        dropped += 1
                if changed:
                    failed = _write_block(&self.log, block)
                    if failed:
                        break
            pthread_mutex_unlock(&self.log.lock)
        if failed:
            raise OSError(failed, os.strerror(failed))
        return dropped
