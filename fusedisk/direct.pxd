"""I/O on an image past the page cache."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef uint32_t direct_alignment(int fd) noexcept nogil
cdef int64_t direct_read(
    int fd, uint32_t alignment, char *into, uint64_t length, uint64_t offset
) noexcept nogil
cdef int64_t direct_write(
    int fd, uint32_t alignment, const char *data, uint64_t length, uint64_t offset
) noexcept nogil
cdef void direct_begin() noexcept nogil
cdef void direct_end() noexcept nogil
