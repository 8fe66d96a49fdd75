"""Threads that rest while two are enough."""

from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    RESTING_SLOTS = 16
    # 64 bytes for each slot, so that no two share a line of the processor's cache.
    RESTING_STRIDE = 8

cdef struct Resting:
    # Large writes to this inode in a row, as far as it matters, and those received meanwhile.
    uint32_t in_a_row
    uint32_t received
    uint64_t inode
    # Threads that rest, how many may, and what they are woken by: a futex that counts calls.
    uint32_t asleep
    uint32_t most
    uint32_t calls
    # What the thread of each slot is at: the inode of a large write, 0 for nothing, or else _OTHER.
    uint64_t doing[RESTING_SLOTS * RESTING_STRIDE]

cdef void resting_begin(Resting *resting, uint32_t most) noexcept nogil
cdef void resting_note(
    Resting *resting, Py_ssize_t slot, uint64_t inode, bint large_write
) noexcept nogil
cdef void rest(Resting *resting, Py_ssize_t slot, const int *stopping) noexcept nogil
