"""What the data path leaves to pyfuse3."""

from libc.stdint cimport int64_t, uint64_t

from fusedisk cimport fuse_kernel as k
from fusedisk.device cimport Device

cdef enum:
    OPENS_MAX = 256

cdef class Relay:
    cdef Device device
    cdef int _end, _outstanding
    cdef uint64_t _opens[OPENS_MAX]
    cdef uint64_t _init_unique
    cdef object _on_init, _socket, _init_reply
    cdef readonly object session

    cdef void pass_on(
        self, k.fuse_in_header *request, char *head, char *body, size_t n
    ) noexcept nogil
    cdef _note_open(self, uint64_t unique)
    cdef _pass_back(self, char *reply, int64_t n)
    cdef _adjust_init(self, char *reply, int64_t n)
    cdef _repeat_init(self, uint64_t unique)
