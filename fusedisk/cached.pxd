"""Writes to a backing image through the page cache."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fusedisk.mapped cimport Mapping
from fusedisk.turns cimport Turns

cdef struct Cached:
    int fd
    # Of a file: a large write has a turn of its own.
    bint one_writer
    Turns writing
    # Of pieces of the image: the last one that a large write made a folio for, in its slot.
    uint32_t *made

cdef bint cached_begin(Cached *cached, int fd) noexcept nogil
cdef int64_t cached_write(
    Cached *cached, Mapping *mapping, const char *data, uint64_t offset, uint64_t length
) noexcept nogil
cdef void cached_read(Cached *cached, uint64_t offset, uint64_t length) noexcept nogil
cdef void cached_end(Cached *cached) noexcept nogil
