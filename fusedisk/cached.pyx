# cython: boundscheck=False, wraparound=False
"""Writes to a backing image through the page cache, in the folios that serve its guest best.

What a write costs depends on the folios that it meets (scripts/bench folios). ext4 walks all blocks
of a folio at each write into it: 4 KiB cost 1.6 times as much in folios of 64 KiB as in single
pages, and 4 to 8 times in folios of 1 MiB. And a large write pays for each folio by itself: 1 MiB costs
half as much in folios of 64 KiB as in single pages, and hardly less in larger ones. A write makes
folios of up to its own length where nothing is cached; reads leave single pages (see image.py).
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from fusedisk.mapped cimport mapped_drop
from fusedisk.turns cimport turn_nearly_over, turn_over, turn_take, turns_begin

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <errno.h>
    #include <stdint.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #define CA_PIECE (64 << 10)
    #define CA_AT_ONCE (1 << 30)
    /* Linux 6.5, include/uapi/linux/mman.h; the number is the same on all architectures. */
    #ifndef SYS_cachestat
    #define SYS_cachestat 451
    #endif

    static int64_t ca_pwrite_all(int fd, const char *data, uint64_t length, int64_t offset,
                                 uint64_t most)
    {
        uint64_t done = 0;
        while (done < length) {
            uint64_t piece = most - ((offset + done) & (most - 1));
            if (piece > length - done) piece = length - done;
            ssize_t n = pwrite(fd, data + done, piece, offset + done);
            if (n < 0) { if (errno == EINTR) continue; return -errno; }
            if (n == 0) return -ENOSPC;
            done += n;
        }
        return done;
    }
    /* Pages of a range that are cached, and of these those that the disk does not have yet. Zero
       and zero where the kernel does not say. */
    static void ca_look(int fd, uint64_t offset, uint64_t length, uint64_t *pages, uint64_t *dirty)
    {
        struct { uint64_t offset, length; } range = {offset, length};
        struct { uint64_t cache, dirty, writeback, evicted, recently_evicted; } found;
        *pages = *dirty = 0;
        if (syscall(SYS_cachestat, fd, &range, &found, 0) == 0) {
            *pages = found.cache;
            *dirty = found.dirty + found.writeback;
        }
    }
    static void ca_put(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static uint32_t ca_get(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static int ca_is_file(int fd)
    {
        struct stat found;
        return fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
    }
    """
    uint64_t CA_PIECE
    uint64_t CA_AT_ONCE
    int64_t ca_pwrite_all(
        int fd, const char *data, uint64_t length, int64_t offset, uint64_t most) nogil
    void ca_look(int fd, uint64_t offset, uint64_t length, uint64_t *pages, uint64_t *dirty) nogil
    void ca_put(uint32_t *p, uint32_t v) nogil
    uint32_t ca_get(const uint32_t *p) nogil
    int ca_is_file(int fd) nogil

# Slots for pieces: of 16 GiB that are written to, each may have its own. They are memory only where
# they are used.
cdef uint64_t _SLOTS = 1 << 18


cdef bint cached_begin(Cached *cached, int fd) noexcept nogil:
    """Ready for writes to an image, which stays open; false where there is no memory."""
    cached.fd, cached.one_writer = fd, ca_is_file(fd)
    cached.made = <uint32_t *>calloc(_SLOTS, sizeof(uint32_t))
    turns_begin(&cached.writing)
    return cached.made != NULL


cdef void cached_end(Cached *cached) noexcept nogil:
    """Nobody writes any more."""
    free(cached.made)


cdef inline uint32_t _name(uint64_t piece) noexcept nogil:
    # Never that of an empty slot. Two pieces 128 TiB apart share one, which costs time only.
    return <uint32_t>piece | <uint32_t>0x80000000


cdef void cached_read(Cached *cached, uint64_t offset, uint64_t length) noexcept nogil:
    """What of a range was not cached has been read into single pages."""
    cdef uint64_t piece
    for piece in range(offset // CA_PIECE, (offset + length + CA_PIECE - 1) // CA_PIECE):
        ca_put(&cached.made[piece % _SLOTS], 0)


cdef int64_t cached_write(
    Cached *cached, Mapping *mapping, const char *data, uint64_t offset, uint64_t length
) noexcept nogil:
    """Write all of ``length`` bytes; their count or a negative errno.

    A filesystem lets one writer at a time into a file, and the others spin for as long as that one
    runs. Beside a large write that takes a processor from the guest, so these wait here, asleep.
    """
    cdef int64_t result
    if length <= CA_PIECE or not cached.one_writer:
        return ca_pwrite_all(cached.fd, data, length, offset, CA_PIECE)
    turn_take(&cached.writing)
    result = _write_in_turn(cached, mapping, data, offset, length)
    turn_over(&cached.writing)
    return result


cdef int64_t _write_in_turn(
    Cached *cached, Mapping *mapping, const char *data, uint64_t offset, uint64_t length
) noexcept nogil:
    """Write all, and say so when a quarter is left."""
    cdef uint64_t most = _at_a_time(cached, mapping, offset, length)
    # Between pieces, so that none is written in two parts.
    cdef uint64_t late = (offset + length - length // 4) // CA_PIECE * CA_PIECE
    cdef uint64_t first = late - offset if late > offset else 0
    cdef int64_t result = 0
    if first:
        result = ca_pwrite_all(cached.fd, data, first, offset, most)
    turn_nearly_over(&cached.writing)
    if result >= 0:
        result = ca_pwrite_all(cached.fd, data + first, length - first, offset + first, most)
    return <int64_t>length if result >= 0 else result


cdef bint _made(Cached *cached, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t piece
    for piece in range(first, end):
        if ca_get(&cached.made[piece % _SLOTS]) != _name(piece):
            return False
    return True


cdef uint64_t _at_a_time(
    Cached *cached, Mapping *mapping, uint64_t offset, uint64_t length
) noexcept nogil:
    """How much of a large write to write at a time.

    Clean single pages are worth less than the folios that come in their place: to drop them and to
    make these takes up to 1.6 times as long as to make the pages dirty one by one, once, and each
    later write takes half the time.
    """
    cdef uint64_t pages, dirty, piece
    # Of the pieces at the edges only a part is written, and makes smaller folios.
    cdef uint64_t first = (offset + CA_PIECE - 1) // CA_PIECE, end = (offset + length) // CA_PIECE
    ca_look(cached.fd, offset, length, &pages, &dirty)
    if pages and dirty == 0 and not _made(cached, first, end):
        if mapped_drop(mapping, cached.fd, first * CA_PIECE, (end - first) * CA_PIECE):
            pages = 0
    if pages == 0:
        for piece in range(first, end):
            ca_put(&cached.made[piece % _SLOTS], _name(piece))
    # What is cached keeps its folios.
    return CA_AT_ONCE if pages >= (length + 4095) // 4096 else CA_PIECE
