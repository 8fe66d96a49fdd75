# cython: boundscheck=False, wraparound=False
"""I/O on an image past the page cache: a descriptor with O_DIRECT takes whole blocks only.

What a guest asks for in whole blocks goes to the image as it is. Anything else, which comes from
programs that use the mounted file without O_DIRECT, takes the way over whole blocks around it.

Invariant: while the blocks around a write are read and written back, no other change is under way,
be it a write or a hole being made, so none is taken back by the old bytes beside it.
"""

import errno
import mmap
import os
import threading

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/fs.h>
    #include <pthread.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    #define DI_STATX_DIOALIGN 0x2000U
    #define DI_UNKNOWN 4096

    /* kernel: include/uapi/linux/stat.h, struct statx; since Linux 6.1 */
    struct di_statx { uint32_t mask; char before[148]; uint32_t memory, offset; char after[96]; };

    static uint32_t di_alignment(int fd)
    {
        struct di_statx found;
        int sector = 0, flags = fcntl(fd, F_GETFL);
        memset(&found, 0, sizeof found);
        if (flags < 0 || !(flags & O_DIRECT))
            return 0;
        if (syscall(SYS_statx, fd, "", AT_EMPTY_PATH, DI_STATX_DIOALIGN, &found) == 0
            && found.mask & DI_STATX_DIOALIGN && found.offset)
            return found.offset;
        if (ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0)
            return sector;
        return DI_UNKNOWN;
    }

    static int64_t di_whole(int fd, char *data, uint64_t length, int64_t offset, int write)
    {
        uint64_t done = 0;
        while (done < length) {
            ssize_t n = write ? pwrite(fd, data + done, length - done, offset + done)
                              : pread(fd, data + done, length - done, offset + done);
            if (n < 0) { if (errno == EINTR) continue; return -errno; }
            if (n == 0) return write ? -ENOSPC : -EIO;
            done += n;
        }
        return done;
    }
    static pthread_rwlock_t di_lock = PTHREAD_RWLOCK_INITIALIZER;

    static int di_aligned(const void *data, uint64_t length, uint64_t offset, uint64_t alignment)
    { return !(((uintptr_t)data | length | offset) & (alignment - 1)); }

    static int64_t di_around(int fd, uint64_t alignment, char *data, uint64_t length,
                             uint64_t offset, int write)
    {
        uint64_t start = offset & ~(alignment - 1);
        uint64_t whole = ((offset + length + alignment - 1) & ~(alignment - 1)) - start;
        void *blocks = NULL;
        int64_t done;
        if (posix_memalign(&blocks, 4096, whole)) return -ENOMEM;
        done = di_whole(fd, blocks, whole, start, 0);
        if (done >= 0 && write) {
            memcpy((char *)blocks + (offset - start), data, length);
            done = di_whole(fd, blocks, whole, start, 1);
        } else if (done >= 0)
            memcpy(data, (char *)blocks + (offset - start), length);
        free(blocks);
        return done < 0 ? done : (int64_t)length;
    }
    static int64_t di_read(int fd, uint64_t alignment, char *into, uint64_t length, uint64_t offset)
    {
        if (di_aligned(into, length, offset, alignment))
            return di_whole(fd, into, length, offset, 0);
        return di_around(fd, alignment, into, length, offset, 0);
    }
    static int64_t di_write(int fd, uint64_t alignment, const char *data, uint64_t length,
                            uint64_t offset)
    {
        int64_t done;
        if (di_aligned(data, length, offset, alignment)) {
            pthread_rwlock_rdlock(&di_lock);
            done = di_whole(fd, (char *)data, length, offset, 1);
        } else {
            pthread_rwlock_wrlock(&di_lock);
            done = di_around(fd, alignment, (char *)data, length, offset, 1);
        }
        pthread_rwlock_unlock(&di_lock);
        return done;
    }
    static void di_begin(void) { pthread_rwlock_rdlock(&di_lock); }
    static void di_end(void) { pthread_rwlock_unlock(&di_lock); }
    """
    uint32_t di_alignment(int fd) nogil
    int64_t di_read(int fd, uint64_t alignment, char *into, uint64_t length, uint64_t offset) nogil
    int64_t di_write(
        int fd, uint64_t alignment, const char *data, uint64_t length, uint64_t offset) nogil
    void di_begin() nogil
    void di_end() nogil

_SCRATCH_BYTES = 1 << 20
_PAGE = 4096
_of_thread = threading.local()


cdef uint32_t direct_alignment(int fd) noexcept nogil:
    """Bytes that offsets and lengths must be multiples of; 0 for a descriptor without O_DIRECT."""
    return di_alignment(fd)


cdef int64_t direct_read(
    int fd, uint32_t alignment, char *into, uint64_t length, uint64_t offset
) noexcept nogil:
    """Read a range inside the image; its length, or a negative errno."""
    return di_read(fd, alignment, into, length, offset)


cdef int64_t direct_write(
    int fd, uint32_t alignment, const char *data, uint64_t length, uint64_t offset
) noexcept nogil:
    """Write a range inside the image; its length, or a negative errno."""
    return di_write(fd, alignment, data, length, offset)


cdef void direct_begin() noexcept nogil:
    """Before any other change of an image that is opened with O_DIRECT; direct_end() follows."""
    di_begin()


cdef void direct_end() noexcept nogil:
    """After that change."""
    di_end()


def alignment(int fd):
    """Bytes that I/O must be aligned to; 0 for a descriptor that goes through the page cache."""
    return direct_alignment(fd)


def read_into(int fd, buffer, offset):
    """Fill a writable buffer from a byte of an image, opened with O_DIRECT or without.

    Raises OSError, also where the image ends.
    """
    view = memoryview(buffer)
    if not direct_alignment(fd):
        while view:
            count = os.preadv(fd, [view], offset)
            _more(count, offset)
            view, offset = view[count:], offset + count
        return
    scratch = _scratch()
    while view:
        start = offset // _PAGE * _PAGE
        length = min(-(-(offset + len(view)) // _PAGE) * _PAGE - start, _SCRATCH_BYTES)
        count = os.preadv(fd, [memoryview(scratch)[:length]], start) - (offset - start)
        _more(count, offset)
        count = min(count, len(view))
        view[:count] = memoryview(scratch)[offset - start:offset - start + count]
        view, offset = view[count:], offset + count


cdef _more(count, offset):
    if count <= 0:
        raise OSError(errno.EIO, f"the image ends at byte {offset}, before its size")


cdef _scratch():
    """This thread's own pages, aligned as every device wants them."""
    found = getattr(_of_thread, "scratch", None)
    if found is None:
        found = _of_thread.scratch = mmap.mmap(-1, _SCRATCH_BYTES)
    return found
