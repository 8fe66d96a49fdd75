"""Taking turns at something, with the next one awake when the one before is done."""

from libc.stdint cimport uint32_t

cdef struct Turns:
    uint32_t taken
    uint32_t nearly_over
    # Threads that sleep, and what they are woken by: a futex that counts calls.
    uint32_t asleep
    uint32_t calls
    # Threads that look without end whether the turn is over.
    uint32_t looking

cdef void turns_begin(Turns *turns) noexcept nogil
cdef void turn_take(Turns *turns) noexcept nogil
cdef void turn_nearly_over(Turns *turns) noexcept nogil
cdef void turn_over(Turns *turns) noexcept nogil
