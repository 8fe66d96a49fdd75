"""The mounted ``/dev/fuse``, and what its requests are bounded by."""

from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    static inline int fd_exchange(int *p, int v)
    { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static inline int fd_add_int(int *p, int v)
    { return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }
    static inline int fd_load_int(int *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    """
    int fd_exchange(int *p, int v) nogil
    int fd_add_int(int *p, int v) nogil
    int fd_load_int(int *p) nogil

cdef enum:
    MAX_WRITE_BYTES = 1 << 20
    # sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in): the data comes right after.
    HEAD = 80
    MAX_BACKGROUND = 256

cdef struct Device:
    int fd
    # Told of the first reply by a byte; -1 once it was.
    int answered

cdef int64_t device_receive(Device *device, char *head, char *body) noexcept nogil
cdef int64_t device_reply(
    Device *device, const void *head, size_t head_length, const void *body, size_t length
) noexcept nogil
cdef int64_t device_notify(Device *device, const void *notice, size_t length) noexcept nogil
cdef void device_answer(
    Device *device, uint64_t unique, int64_t error, const void *payload, size_t length
) noexcept nogil
cdef char *aligned_memory(size_t length) noexcept nogil
cdef char *resident_memory(size_t length) noexcept nogil
