"""Preserving chunks for open captures, as the data path does it before it marks and writes."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fusedisk.changemap cimport Marks

cdef enum:
    CAPTURES_MAX = 8

cdef struct Spills:
    int fds[CAPTURES_MAX]

cdef bint captures_open(const char *control) noexcept nogil
cdef void preserve(
    char *control, const Spills *spills, uint32_t disk, const Marks *map, int image,
    uint64_t size, uint32_t epoch, uint64_t offset, uint64_t length,
) noexcept nogil
