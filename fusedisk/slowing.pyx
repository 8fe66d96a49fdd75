# cython: boundscheck=False, wraparound=False
"""Slowing a guest: how many bytes of disk a second its writes may make dirty, as a lease.

Three words of the control file, in a cache line of their own (little endian, see changemap.pyx):

offset 192  u64 bytes a second; 0 = the guest is not slowed
offset 200  u64 time of CLOCK_MONOTONIC, in ns, from which on the rate counts no more
offset 208  u64 the same clock: when the next write that costs something may begin

A write costs the chunks that it is the first to touch in the open epoch, whole: what a replica has to
be sent for it. So a guest that writes to the same places again and again is hardly slowed.

Whoever slows a guest renews the lease. When it dies, or stands still, the guest is free again
within the seconds that it had asked for.
"""

from libc.stdint cimport uint32_t, uint64_t

from fusedisk.changemap cimport Control, Marks

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    static uint64_t fd_now(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
    }
    static uint64_t fd_peek(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static uint32_t fd_peek32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static void fd_post(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static int fd_swap(uint64_t *p, uint64_t from, uint64_t to)
    { return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); }
    """
    uint64_t fd_now() nogil
    uint64_t fd_peek(const uint64_t *p) nogil
    uint32_t fd_peek32(const uint32_t *p) nogil
    void fd_post(uint64_t *p, uint64_t v) nogil
    int fd_swap(uint64_t *p, uint64_t old, uint64_t new) nogil

# What was not used for so long is lost: a guest that rested may not make up for all of it.
cdef uint64_t _SAVED_NANOSECONDS = 50 * 1000 * 1000
# However dear a write was, the next one waits no longer: with large chunks a guest is slow, not dead.
cdef uint64_t _WAIT_NANOSECONDS_MAX = 1000 * 1000 * 1000
cdef uint64_t _SECOND = 1000 * 1000 * 1000

RATE_MAX = 1 << 33
"""Beyond it the arithmetic in nanoseconds would overflow; no guest is slowed to that."""


cdef bint slowed(const char *control) noexcept nogil:
    """Whether writes have to ask `may_write`; costs one load."""
    return fd_peek(<const uint64_t *>(control + 192)) != 0


cdef bint may_write(
    char *control, const Marks *map, uint64_t offset, uint64_t length
) noexcept nogil:
    """Whether a write may begin now, which then is paid for; else it has to be held for a while."""
    cdef uint64_t rate = fd_peek(<uint64_t *>(control + 192))
    cdef uint64_t *due_at = <uint64_t *>(control + 208)
    cdef uint64_t now = fd_now(), due, cost, price, after
    if rate == 0:
        return True
    if now >= fd_peek(<uint64_t *>(control + 200)):
        # A renewal that comes at the same moment writes the rate again.
        fd_swap(<uint64_t *>(control + 192), rate, 0)
        return True
    cost = _first_touched(control, map, offset, length)
    if cost == 0:
        return True
    price = min(cost * _SECOND // rate, _WAIT_NANOSECONDS_MAX)
    while True:
        due = fd_peek(due_at)
        # A time further ahead than any write can have put it is none of ours.
        if now < due <= now + _WAIT_NANOSECONDS_MAX:
            return False
        after = price + (now if due > now else max(due, now - _SAVED_NANOSECONDS))
        if fd_swap(due_at, due, after):
            return True


cdef uint64_t _first_touched(
    const char *control, const Marks *map, uint64_t offset, uint64_t length
) noexcept nogil:
    """Bytes of the chunks of a range that were not written in the open epoch yet."""
    cdef uint32_t epoch = <uint32_t>fd_peek(<const uint64_t *>(control + 64))
    cdef uint64_t chunk = offset // map.chunk_size, last, found = 0
    if length == 0:
        return 0
    last = (offset + length - 1) // map.chunk_size
    while chunk <= last:
        # Where the summary is below the epoch the marks are too, and may be unallocated.
        if (
            fd_peek32(&map.summary[chunk // 1024]) < epoch
            or fd_peek32(&map.marks[chunk]) < epoch
        ):
            found += map.chunk_size
        chunk += 1
    return found


cdef uint64_t *_word(Control control, Py_ssize_t offset) except NULL:
    control._check_open()
    return <uint64_t *>(control.base + offset)


def slow_down(Control control not None, uint64_t rate, double seconds):
    """Let writes make ``rate`` bytes a second dirty, until so many seconds from now.

    Where two slow one guest, the last word counts. Raises ValueError for what is no rate.
    """
    if not control.writable:
        raise ValueError("the mapping is read-only")
    if not 0 < rate <= RATE_MAX or not 0 < seconds <= 3600:
        raise ValueError(f"{rate} bytes a second for {seconds} s is out of range")
    # Invariant: the lease is there before the rate, or a writer could take the rate for expired.
    fd_post(_word(control, 200), fd_now() + <uint64_t>(seconds * 1e9))
    fd_post(_word(control, 192), rate)


def let_go(Control control not None):
    """Let the guest write as fast as it can."""
    if not control.writable:
        raise ValueError("the mapping is read-only")
    fd_post(_word(control, 192), 0)


def slowed_to(Control control not None):
    """The rate in force; None while the guest is free."""
    cdef uint64_t rate = fd_peek(_word(control, 192))
    return rate if rate and fd_now() < fd_peek(_word(control, 200)) else None
