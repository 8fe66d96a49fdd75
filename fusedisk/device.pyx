# cython: boundscheck=False, wraparound=False
"""The mounted ``/dev/fuse``: requests come from it, replies go to it."""

from libc.errno cimport EIO
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport mlock
from posix.stdlib cimport posix_memalign
from posix.unistd cimport write

from fusedisk cimport fuse_kernel as k

cdef extern from *:
    """
    #include <errno.h>
    #include <stdint.h>
    #include <sys/uio.h>

    /* Two parts, so that a write's data lands on a page boundary. */
    static int64_t dv_receive(int fd, char *head, size_t head_length, char *body, size_t length)
    {
        struct iovec parts[2] = {{head, head_length}, {body, length}};
        ssize_t n = readv(fd, parts, 2);
        return n < 0 ? -errno : n;
    }
    static int64_t dv_reply(int fd, const void *head, size_t head_length,
                            const void *body, size_t length)
    {
        struct iovec parts[2] = {{(void *)head, head_length}, {(void *)body, length}};
        ssize_t n;
        do { n = writev(fd, parts, length ? 2 : 1); } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    """
    int64_t dv_receive(int fd, char *head, size_t head_length, char *body, size_t length) nogil
    int64_t dv_reply(
        int fd, const void *head, size_t head_length, const void *body, size_t length) nogil


cdef int64_t device_receive(Device *device, char *head, char *body) noexcept nogil:
    """Wait for a request: HEAD bytes of it to ``head``, up to MAX_WRITE_BYTES to ``body``.

    Its length, or a negative errno.
    """
    return dv_receive(device.fd, head, HEAD, body, MAX_WRITE_BYTES)


cdef int64_t device_reply(
    Device *device, const void *head, size_t head_length, const void *body, size_t length
) noexcept nogil:
    """Send a reply in two parts, the second of which may be empty; a negative errno on failure."""
    cdef int64_t n = dv_reply(device.fd, head, head_length, body, length)
    cdef int fd
    if device.answered >= 0:
        fd = fd_exchange(&device.answered, -1)
        if fd >= 0:
            write(fd, b"a", 1)
    return n


cdef int64_t device_notify(Device *device, const void *notice, size_t length) noexcept nogil:
    """Tell the kernel something that it did not ask; a negative errno on failure.

    Invariant: this is no answer, so nobody is told of one. The keeper restarts a server that
    answers nothing with back-off.
    """
    return dv_reply(device.fd, notice, length, NULL, 0)


cdef void device_answer(
    Device *device, uint64_t unique, int64_t error, const void *payload, size_t length
) noexcept nogil:
    """Answer a request; ``error`` is 0 or a negative errno."""
    cdef k.fuse_out_header header
    if error < -511 or error > 0:
        error = -EIO
    header.error = <int32_t>error
    header.unique = unique
    if error:
        length = 0
    header.len = <uint32_t>(sizeof(header) + length)
    # The kernel refuses a reply that nobody waits for any more: nothing is lost then.
    device_reply(device, &header, sizeof(header), payload, length)


cdef char *aligned_memory(size_t length) noexcept nogil:
    """Memory from the begin of a page, for free(); NULL where there is none."""
    cdef void *found = NULL
    return NULL if posix_memalign(&found, 4096, length) else <char *>found


cdef char *resident_memory(size_t length) noexcept nogil:
    """The same, for what the kernel copies while this process may be killed.

    Invariant: resident, as far as we may. When a thread is killed, the kernel does not finish a
    page fault for it and fails the request that it was copying: an I/O error.
    """
    cdef char *found = aligned_memory(length)
    if found != NULL:
        memset(found, 0, length)
        mlock(found, length)
    return found
