# cython: boundscheck=False, wraparound=False
"""Threads that rest while two are enough.

A file has one writer at a time. Of the threads that serve one disk's large writes, one is in the
file and one receives what comes next; the data of any other would only wait in its buffer, and leave
the processor's cache until its turn comes. The kernel wakes whoever has waited for a request longest,
so all buffers would be used one after the other. With two threads on two processors large writes were
about a sixth faster than with four (docs/benchmarks.md).

Invariant (nobody waits for who rests): any other request, or a large write to another disk, ends the
rest of all, and two threads at least are at the device or in the row, or nobody rests. Whoever rests
sees within two periods that nothing was received meanwhile, and all go back to the device: those in
the row may be stuck.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <linux/futex.h>
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    static uint32_t rs_get(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static void rs_put(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static uint32_t rs_add(uint32_t *p, int32_t v)
    { return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }
    static uint64_t rs_inode(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static void rs_put_inode(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static void rs_sleep(uint32_t *p, uint32_t seen, long nanoseconds)
    {
        struct timespec period = {0, nanoseconds};
        syscall(SYS_futex, p, FUTEX_WAIT_PRIVATE, seen, &period, NULL, 0);
    }
    static void rs_wake_all(uint32_t *p)
    { syscall(SYS_futex, p, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0); }
    static int rs_stopping(const int *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    """
    uint32_t rs_get(const uint32_t *p) nogil
    void rs_put(uint32_t *p, uint32_t v) nogil
    uint32_t rs_add(uint32_t *p, int v) nogil
    uint64_t rs_inode(const uint64_t *p) nogil
    void rs_put_inode(uint64_t *p, uint64_t v) nogil
    void rs_sleep(uint32_t *p, uint32_t seen, long nanoseconds) nogil
    void rs_wake_all(uint32_t *p) nogil
    bint rs_stopping(const int *p) nogil

cdef enum:
    # A guest that writes so many in a row goes on with it.
    _IN_A_ROW = 16
    # Some ten large writes: a request waits for one that rests at most twice as long.
    _PERIOD_NANOSECONDS = 2000000

# No inode is that.
cdef uint64_t _OTHER = <uint64_t>-1


cdef void resting_begin(Resting *resting, uint32_t most) noexcept nogil:
    """Nobody rests, and at most so many will at a time."""
    memset(resting, 0, sizeof(Resting))
    resting.most = most


cdef void resting_note(
    Resting *resting, Py_ssize_t slot, uint64_t inode, bint large_write
) noexcept nogil:
    """The thread of a slot, one of RESTING_SLOTS, has received a request.

    Of others than large writes this is a store and a load, most of the time.
    """
    rs_put_inode(&resting.doing[slot * RESTING_STRIDE], inode if large_write else _OTHER)
    if large_write and rs_inode(&resting.inode) == inode:
        rs_add(&resting.received, 1)
        if rs_get(&resting.in_a_row) < _IN_A_ROW:
            rs_add(&resting.in_a_row, 1)
    elif large_write or rs_get(&resting.in_a_row):
        rs_put_inode(&resting.inode, inode)
        rs_put(&resting.in_a_row, 0)
        if rs_get(&resting.asleep):
            rs_add(&resting.calls, 1)
            rs_wake_all(&resting.calls)


cdef uint32_t _elsewhere(Resting *resting) noexcept nogil:
    """How many threads are at something that does not belong to the row, and may last."""
    cdef uint64_t doing
    cdef uint32_t count = 0
    cdef Py_ssize_t slot
    for slot in range(RESTING_SLOTS):
        doing = rs_inode(&resting.doing[slot * RESTING_STRIDE])
        count += doing != 0 and doing != rs_inode(&resting.inode)
    return count


cdef void rest(Resting *resting, Py_ssize_t slot, const int *stopping) noexcept nogil:
    """Before the thread of a slot waits for a request: return when it is needed for it."""
    rs_put_inode(&resting.doing[slot * RESTING_STRIDE], 0)
    if rs_get(&resting.in_a_row) < _IN_A_ROW:
        return
    if rs_add(&resting.asleep, 1) + _elsewhere(resting) <= resting.most:
        _rest(resting, stopping)
    rs_add(&resting.asleep, -1)


cdef void _rest(Resting *resting, const int *stopping) noexcept nogil:
    cdef uint32_t calls = rs_get(&resting.calls), received
    # In this order: whoever ends the row calls after that, so no call is missed.
    while not rs_stopping(stopping) and rs_get(&resting.in_a_row) >= _IN_A_ROW:
        received = rs_get(&resting.received)
        rs_sleep(&resting.calls, calls, _PERIOD_NANOSECONDS)
        if rs_get(&resting.calls) != calls:
            return
        if rs_get(&resting.received) == received:
            # Either those at work are stuck, or nothing comes: all wait at the device, and nobody
            # rests again before there was another row.
            rs_put(&resting.in_a_row, 0)
            return
