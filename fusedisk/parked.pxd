"""Requests that have to wait."""

from libc.stdint cimport uint64_t

cdef enum:
    PARKED_BYTES_MAX = 512 << 20

cdef struct Parked:
    Parked *next
    size_t length
    char *bytes

cdef struct Parking:
    Parked *first
    Parked *last
    uint64_t held_bytes
    int wake

cdef int parking_begin(Parking *parking, bint shared) noexcept nogil
cdef bint park(
    Parking *parking, const char *head, size_t head_length, const char *body, size_t body_length
) noexcept nogil
cdef Parked *last_parked(Parking *parking) noexcept nogil
cdef Parked *unpark(Parking *parking) noexcept nogil
cdef void repark(Parking *parking, Parked *request) noexcept nogil
cdef bint any_parked(Parking *parking) noexcept nogil
cdef void forget_parked(Parked *request) noexcept nogil
cdef void wake_parking(Parking *parking) noexcept nogil
cdef void await_parked(Parking *parking) noexcept nogil
