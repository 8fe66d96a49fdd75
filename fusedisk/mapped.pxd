"""Reads of a backing image out of the page cache, without a copy of our own."""

from libc.stdint cimport int64_t, uint64_t

cdef struct Mapping:
    char *base
    uint64_t length
    int64_t readers
    int dropping

cdef void mapping_begin(Mapping *mapping, int fd, uint64_t size) noexcept nogil
cdef const char *mapped_now(Mapping *mapping, uint64_t offset, uint64_t length) noexcept nogil
cdef void mapped_done(Mapping *mapping) noexcept nogil
cdef bint mapped_drop(Mapping *mapping, int fd, uint64_t offset, uint64_t length) noexcept nogil
cdef void mapping_forget(Mapping *mapping, int fd) noexcept nogil
cdef void mapping_end(Mapping *mapping) noexcept nogil
