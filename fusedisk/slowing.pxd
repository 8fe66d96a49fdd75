"""How fast a guest may make chunks dirty, as the data path asks."""

from libc.stdint cimport uint64_t

from fusedisk.changemap cimport Marks

cdef bint slowed(const char *control) noexcept nogil
cdef bint may_write(
    char *control, const Marks *map, uint64_t offset, uint64_t length
) noexcept nogil
