"""What the data path calls of the change map, without the interpreter's lock."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    OK = 0
    GATED = -1
    FENCED = -2

cdef int enter(char *control, Py_ssize_t hint, Py_ssize_t *slot, uint32_t *epoch) noexcept nogil
cdef void leave(char *control, Py_ssize_t slot) noexcept nogil
cdef bint quiet(const char *control, uint32_t epoch) noexcept nogil
cdef int held(char *control) noexcept nogil
cdef void doubt(char *control) noexcept nogil

cdef struct Marks:
    int fd
    uint64_t chunk_size
    uint32_t *summary
    uint32_t *marks
    int64_t marks_offset

cdef int raise_marks(
    const Marks *map, uint32_t epoch, uint64_t offset, uint64_t length
) noexcept nogil

cdef class _Mapping:
    cdef object _map
    cdef Py_buffer _view
    cdef char *base
    cdef readonly bint writable
    cdef readonly int fd
    cpdef close(self)
    cdef _check_open(self)

cdef class Control(_Mapping):
    cdef uint64_t *word
    cdef uint64_t *_limit

cdef class ChangeMap(_Mapping):
    cdef readonly uint64_t size
    cdef readonly uint64_t chunk_size
    cdef readonly Py_ssize_t chunks
    cdef Marks map
    cdef Py_ssize_t _pages
