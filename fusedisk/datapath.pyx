# cython: boundscheck=False, wraparound=False
"""The data path: native threads between ``/dev/fuse`` and the backing images.

READ, WRITE, FSYNC, FALLOCATE and LSEEK on a disk are answered here, without the interpreter's lock.
Every other request goes byte for byte over a SOCK_SEQPACKET pair to the pyfuse3 session, and its
replies come back the same way, with what pyfuse3 cannot express put into them.

Nothing that the kernel sends is believed: lengths and ranges are checked before they are used.
"""

import errno
import os
import select
import signal
import socket
import threading

from libc.errno cimport (
    EAGAIN, EBADF, EINTR, EINVAL, EIO, ENODEV, ENOENT, ENOSPC, ENOTTY, EOPNOTSUPP, EROFS,
)
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from fusedisk cimport fuse_kernel as k
from fusedisk.changemap cimport GATED, held
from fusedisk.disk cimport (
    HELD, Disk, DiskIO, disk_flush, disk_on_record, disk_read, disk_read_done, disk_seek, disk_write, disk_zero,
)
from fusedisk.mapped cimport Mapping, mapping_begin, mapping_end, mapping_forget
from fusedisk.parked cimport (
    PARKED_BYTES_MAX, Parked, Parking, any_parked, await_parked, forget_parked, last_parked, park,
    parking_begin, repark, unpark, wake_parking,
)
from fusedisk.slowing cimport may_write, slowed

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/ioctl.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <unistd.h>

    /* Two parts, so that a write's data lands on a page boundary. */
    static int64_t fd_receive(int fd, char *head, size_t head_length, char *body, size_t length)
    {
        struct iovec parts[2] = {{head, head_length}, {body, length}};
        ssize_t n = readv(fd, parts, 2);
        return n < 0 ? -errno : n;
    }
    static int64_t fd_reply(int fd, const void *head, size_t head_length,
                            const void *body, size_t length)
    {
        struct iovec parts[2] = {{(void *)head, head_length}, {(void *)body, length}};
        ssize_t n;
        do { n = writev(fd, parts, length ? 2 : 1); } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    static int64_t fd_packet(int fd, const char *head, size_t head_length,
                             const char *body, size_t length)
    {
        struct iovec parts[2] = {{(void *)head, head_length}, {(void *)body, length}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = length ? 2 : 1};
        ssize_t n;
        do { n = sendmsg(fd, &message, MSG_NOSIGNAL); } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    static int64_t fd_unpacket(int fd, char *into, size_t length)
    {
        ssize_t n;
        do { n = recv(fd, into, length, MSG_TRUNC); } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    static char *fd_aligned(size_t length)
    {
        void *found = NULL;
        return posix_memalign(&found, 4096, length) ? NULL : found;
    }
    static char *fd_pages(size_t length)
    {
        char *found = fd_aligned(length);
        if (found == NULL)
            return NULL;
        /* Invariant: resident, as far as we may. When a thread is killed, the kernel does not
           finish a page fault for it and fails the request that it was copying: an I/O error. */
        memset(found, 0, length);
        (void)!mlock(found, length);
        return found;
    }
    static int fd_exchange(int *p, int v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); }
    static int fd_add_int(int *p, int v) { return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }
    static int fd_load_int(int *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    /* The kernel's struct dioattr of XFS_IOC_DIOINFO: alignments of memory and of file ranges. */
    struct fd_dioattr { uint32_t mem, min_io, max_io; };
    #define FD_XFS_IOC_DIOINFO _IOR('X', 30, struct fd_dioattr)
    """
    int64_t fd_receive(int fd, char *head, size_t head_length, char *body, size_t length) nogil
    int64_t fd_reply(
        int fd, const void *head, size_t head_length, const void *body, size_t length) nogil
    int64_t fd_packet(
        int fd, const char *head, size_t head_length, const char *body, size_t length) nogil
    int64_t fd_unpacket(int fd, char *into, size_t length) nogil
    char *fd_aligned(size_t length) nogil
    char *fd_pages(size_t length) nogil
    void free(void *p) nogil
    int fd_exchange(int *p, int v) nogil
    int fd_add_int(int *p, int v) nogil
    int fd_load_int(int *p) nogil
    struct fd_dioattr:
        uint32_t mem
        uint32_t min_io
        uint32_t max_io
    uint32_t FD_XFS_IOC_DIOINFO
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_ZERO_RANGE
    int sync_file_range(int fd, int64_t offset, int64_t length, unsigned int flags) nogil
    int SYNC_FILE_RANGE_WRITE
    int usleep(unsigned int) nogil
    ssize_t read(int fd, void *into, size_t length) nogil
    ssize_t write(int fd, const void *data, size_t length) nogil

FIRST_DISK = 2
DISKS_MAX = 64
MAX_WRITE = 1 << 20

cdef enum:
    _FIRST_DISK = 2
    _DISKS_MAX = 64
    _MAX_WRITE = 1 << 20
    # sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in): the data comes right after.
    _HEAD = 80
    _OPENS_MAX = 256
    _GATE_POLL_MICROSECONDS = 1000
    _LEASE_POLLS = 20
    _MAX_BACKGROUND = 256
    # A hole of more than that may take long; each smaller one is not worth a change of threads.
    _ZERO_AT_ONCE = 4 << 20

# Invariant: all that the kernel hands out at a time finds room, so that no thread is left with a
# held write in its hands. Left over is room for programs that wait for each write of theirs, which
# the kernel does not count: each thread of theirs has one request.
assert PARKED_BYTES_MAX >= _MAX_BACKGROUND * (_MAX_WRITE + _HEAD)

_INTERRUPT = signal.SIGUSR2
_SESSION_SECONDS_MAX = 10.0


cdef class DataPath:
    """Serves one mount. Each of the loops below is called in a thread of its own.

    ``device`` is the mounted ``/dev/fuse`` descriptor, ``disks`` at most 64 of inode 2 and up.
    ``on_init`` is given the kernel's INIT request before it is relayed. ``check_lease`` is called
    now and then while writes are held; if it returns true they are refused. One byte is written to ``answered`` after the first reply.
    """

    cdef int _device, _relay, _answered, _stopping, _outstanding, _writeback
    cdef int _count
    cdef DiskIO *_disks[_DISKS_MAX]
    cdef Mapping _mappings[_DISKS_MAX]
    cdef uint64_t _opens[_OPENS_MAX]
    cdef uint64_t _init_unique
    cdef Parking _parking, _lasting
    cdef object _keep, _on_init, _check_lease, _relay_socket, _threads, _init_reply, _lock
    cdef readonly object session
    cdef readonly int error

    def __cinit__(self, int device, disks, *, writeback, on_init, check_lease, int answered=-1):
        if not 1 <= len(disks) <= _DISKS_MAX:
            raise ValueError(f"a mount serves 1 to {_DISKS_MAX} disks")
        self._device, self._answered, self._writeback = device, answered, writeback
        self._keep = list(disks)
        cdef Disk disk
        for disk in disks:
            if not disk.io.alignment:
                # Invariant: no pages beside direct writes, since they would keep what is old.
                mapping_begin(&self._mappings[self._count], disk.io.fd, disk.io.size)
                disk.io.mapping = &self._mappings[self._count]
            self._disks[self._count] = &disk.io
            self._count += 1
        self._on_init, self._check_lease = on_init, check_lease
        if parking_begin(&self._parking, False) < 0 or parking_begin(&self._lasting, True) < 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._threads, self._init_reply, self._lock = {}, None, threading.Lock()
        # ``session`` is the end for pyfuse3, which reads and writes it as if it were the device.
        self._relay_socket, self.session = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        for end in (self._relay_socket, self.session):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_WRITE)
        self._relay = self._relay_socket.fileno()

    def __dealloc__(self):
        for i in range(self._count):
            mapping_end(&self._mappings[i])

    # --- requests ------------------------------------------------------------------------------

    def serve(self, Py_ssize_t slot):
        """Answer requests until the mount is gone (true) or stop() was called (false).

        ``slot`` is this thread's own place among the announcements. Raises OSError.
        """
        cdef char head[_HEAD]
        cdef char *body = fd_pages(_MAX_WRITE)
        cdef int64_t n = 0
        if body == NULL:
            raise MemoryError
        with self._lock:
            self._threads[slot] = threading.get_ident()
        try:
            with nogil:
                while not fd_load_int(&self._stopping):
                    n = fd_receive(self._device, head, _HEAD, body, _MAX_WRITE)
                    if n >= 0:
                        self._take(slot, head, body, <size_t>n)
                    elif n != -EINTR and n != -EAGAIN and n != -ENOENT:
                        break
        finally:
            free(body)
            with self._lock:
                del self._threads[slot]
        if n == -ENODEV:
            return True
        if n < 0 and not self._stopping:
            raise OSError(-n, os.strerror(-n))
        return False

    cdef void _take(self, Py_ssize_t slot, char *head, char *body, size_t n) noexcept nogil:
        """Answer a request that has come, or leave it to those who have the time."""
        cdef size_t in_head = min(n, <size_t>_HEAD)
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        if n < sizeof(k.fuse_in_header) or n < 40 or request.len != n:
            return
        if self._lasts(head, n) and park(&self._lasting, head, in_head, body, n - in_head):
            return
        self._dispatch(slot, head, body, n)

    cdef bint _lasts(self, char *head, size_t n) noexcept nogil:
        """Whether it has to wait for a disk: a few of these would keep all others waiting too."""
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        cdef k.fuse_write_in *asked = <k.fuse_write_in *>(head + 40)
        cdef DiskIO *disk
        if request.opcode == k.FUSE_FSYNC:
            return True
        if request.opcode == k.FUSE_FALLOCATE:
            return n >= 72 and (<k.fuse_fallocate_in *>(head + 40)).length > _ZERO_AT_ONCE
        if request.opcode != k.FUSE_WRITE or n < _HEAD:
            return False
        disk = self._disk(request.nodeid)
        return disk != NULL and not disk_on_record(disk, asked.offset, n - _HEAD)

    cdef void _dispatch(self, Py_ssize_t slot, char *head, char *body, size_t n) noexcept nogil:
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        cdef uint32_t opcode = request.opcode
        if opcode == k.FUSE_WRITE or opcode == k.FUSE_FALLOCATE:
            while self._has_to_queue() or not self._change(slot, head, body, n):
                if park(&self._parking, head, min(n, <size_t>_HEAD), body, n - min(n, <size_t>_HEAD)):
                    return
                usleep(_GATE_POLL_MICROSECONDS)
                if fd_load_int(&self._stopping):
                    return
        elif opcode == k.FUSE_READ:
            self._read(request, head, body, n)
        elif opcode == k.FUSE_FSYNC:
            self._flush(request, head, n)
        elif opcode == k.FUSE_LSEEK:
            self._seek(request, head, n)
        elif opcode == k.FUSE_IOCTL:
            self._ioctl(request, head, n)
        elif opcode == k.FUSE_INTERRUPT:
            # Whatever it is about ends by itself soon, or is held as it should be.
            return
        else:
            self._pass_on(request, head, body, n)

    cdef bint _has_to_queue(self) noexcept nogil:
        """Of a slowed guest the requests go on in turn: else a dear one would wait for ever."""
        return slowed(self._disks[0].control) and any_parked(&self._parking)

    cdef DiskIO *_disk(self, uint64_t inode) noexcept nogil:
        if inode < _FIRST_DISK or inode - _FIRST_DISK >= <uint64_t>self._count:
            return NULL
        return self._disks[inode - _FIRST_DISK]

    cdef void _answer(
        self, uint64_t unique, int64_t error, const void *payload, size_t length
    ) noexcept nogil:
        """Reply; ``error`` is 0 or a negative errno."""
        cdef k.fuse_out_header header
        if error < -511 or error > 0:
            error = -EIO
        header.error = <int32_t>error
        header.unique = unique
        if error:
            length = 0
        header.len = <uint32_t>(sizeof(header) + length)
        # The kernel refuses a reply that nobody waits for any more: nothing is lost then.
        fd_reply(self._device, &header, sizeof(header), payload, length)
        self._tell_answered()

    cdef void _tell_answered(self) noexcept nogil:
        cdef int fd
        if self._answered >= 0:
            fd = fd_exchange(&self._answered, -1)
            if fd >= 0:
                write(fd, b"a", 1)

    cdef void _read(
        self, k.fuse_in_header *request, char *head, char *body, size_t n
    ) noexcept nogil:
        cdef k.fuse_read_in *asked = <k.fuse_read_in *>(head + 40)
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef const char *found = NULL
        cdef int64_t result
        if disk == NULL or n < _HEAD or asked.size > _MAX_WRITE:
            self._answer(request.unique, -EBADF if disk == NULL else -EINVAL, NULL, 0)
            return
        result = disk_read(disk, body, &found, asked.offset, asked.size)
        self._answer(request.unique, min(result, 0), found, <size_t>max(result, 0))
        disk_read_done(disk, body, found)

    cdef bint _change(self, Py_ssize_t slot, char *head, char *body, size_t n) noexcept nogil:
        """Answer WRITE or FALLOCATE; false where it has to be held."""
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef k.fuse_write_in *asked = <k.fuse_write_in *>(head + 40)
        cdef k.fuse_write_out done
        cdef int64_t result
        if disk == NULL:
            self._answer(request.unique, -EBADF, NULL, 0)
            return True
        if request.opcode == k.FUSE_FALLOCATE:
            result = self._fallocate(slot, disk, head, n)
            if result != HELD:
                self._answer(request.unique, result, NULL, 0)
            return result != HELD
        if n < _HEAD or asked.size != n - _HEAD or asked.size > _MAX_WRITE:
            self._answer(request.unique, -EINVAL, NULL, 0)
            return True
        if (
            slowed(disk.control) and asked.offset < disk.size
            and not may_write(
                disk.control, &disk.marks, asked.offset,
                min(<uint64_t>asked.size, disk.size - asked.offset),
            )
        ):
            return False
        result = disk_write(disk, slot, body, asked.offset, asked.size)
        if result == HELD:
            return False
        memset(&done, 0, sizeof(done))
        done.size = <uint32_t>max(result, 0)
        self._answer(request.unique, min(result, 0), &done, 8)
        return True

    cdef int64_t _fallocate(
        self, Py_ssize_t slot, DiskIO *disk, char *head, size_t n
    ) noexcept nogil:
        cdef k.fuse_fallocate_in *asked = <k.fuse_fallocate_in *>(head + 40)
        cdef uint64_t offset = asked.offset, length = asked.length
        cdef bint keep
        if n < 72 or length == 0 or offset > (1ULL << 62) or length > (1ULL << 62):
            return -EINVAL
        if (asked.mode & ~<uint32_t>FALLOC_FL_KEEP_SIZE) != <uint32_t>FALLOC_FL_ZERO_RANGE and (
            asked.mode != <uint32_t>(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
        ):
            return -EOPNOTSUPP
        keep = asked.mode & FALLOC_FL_KEEP_SIZE
        if offset + length > disk.size:
            if not keep:
                # The size is fixed: there is no room behind it.
                return -ENOSPC
            if offset >= disk.size:
                return 0
            length = disk.size - offset
        return disk_zero(disk, slot, offset, length)

    cdef void _flush(self, k.fuse_in_header *request, char *head, size_t n) noexcept nogil:
        cdef k.fuse_fsync_in *asked = <k.fuse_fsync_in *>(head + 40)
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef int64_t result = -EBADF if disk == NULL else -EINVAL
        if disk != NULL and n >= 56:
            result = disk_flush(disk, asked.fsync_flags & k.FUSE_FSYNC_FDATASYNC)
        self._answer(request.unique, result, NULL, 0)

    cdef void _seek(self, k.fuse_in_header *request, char *head, size_t n) noexcept nogil:
        cdef k.fuse_lseek_in *asked = <k.fuse_lseek_in *>(head + 40)
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef k.fuse_lseek_out found
        cdef int64_t result = -EBADF if disk == NULL else -EINVAL
        if disk != NULL and n >= 64:
            result = disk_seek(disk, asked.offset, <int>asked.whence)
        found.offset = <uint64_t>max(result, 0)
        self._answer(request.unique, min(result, 0), &found, sizeof(found))

    cdef void _ioctl(self, k.fuse_in_header *request, char *head, size_t n) noexcept nogil:
        """Say which alignment direct I/O needs, as QEMU asks (block/file-posix.c); no other."""
        cdef k.fuse_ioctl_in *asked = <k.fuse_ioctl_in *>(head + 40)
        cdef char reply[16 + 12]
        cdef fd_dioattr needs
        cdef DiskIO *disk = self._disk(request.nodeid)
        if (
            n < 72 or asked.cmd != FD_XFS_IOC_DIOINFO or asked.out_size < sizeof(needs)
            or disk == NULL
        ):
            self._answer(request.unique, -ENOTTY, NULL, 0)
            return
        needs.mem = needs.min_io = max(disk.alignment, <uint32_t>512)
        needs.max_io = 0x7FFFFE00
        memset(reply, 0, 16)
        memcpy(reply + 16, &needs, 12)
        self._answer(request.unique, 0, reply, sizeof(reply))

    # --- requests that last --------------------------------------------------------------------

    def work_off(self, Py_ssize_t slot):
        """Answer what has to wait for a disk; until stop(), after which the rest is handed out again.

        Invariant: a flush begins after it was received, so it covers every write answered before.
        """
        cdef Parked *request
        cdef char *body = fd_aligned(_MAX_WRITE)
        cdef size_t in_head
        if body == NULL:
            raise MemoryError
        try:
            with nogil:
                while not fd_load_int(&self._stopping):
                    await_parked(&self._lasting)
                    request = NULL if fd_load_int(&self._stopping) else unpark(&self._lasting)
                    if request != NULL:
                        in_head = min(request.length, <size_t>_HEAD)
                        memcpy(body, request.bytes + in_head, request.length - in_head)
                        self._dispatch(slot, request.bytes, body, request.length)
                        forget_parked(request)
        finally:
            free(body)
            # The next one's turn to end.
            wake_parking(&self._lasting)

    # --- held requests -------------------------------------------------------------------------

    def release_parked(self, Py_ssize_t slot):
        """Answer held requests once gate, fence or a slowed guest's rate let them; until stop()."""
        cdef Parked *request
        cdef Parked *last
        cdef int polls = 0
        cdef char *body = fd_aligned(_MAX_WRITE)
        cdef size_t rest
        if body == NULL:
            raise MemoryError
        try:
            while not self._stopping:
                with nogil:
                    await_parked(&self._parking)
                    while not fd_load_int(&self._stopping):
                        if held(self._disks[0].control) == GATED:
                            if not any_parked(&self._parking):
                                # Whoever parks the next one wakes us.
                                break
                            if polls % _LEASE_POLLS == 0:
                                # Invariant: only what came before the question is refused. The
                                # answer may have changed by the time that another write comes.
                                last = last_parked(&self._parking)
                                with gil:
                                    if self._check_lease():
                                        self._refuse_parked(last)
                            polls += 1
                            usleep(_GATE_POLL_MICROSECONDS)
                            continue
                        polls = 0
                        request = unpark(&self._parking)
                        if request == NULL:
                            break
                        rest = request.length - min(request.length, <size_t>_HEAD)
                        memcpy(body, request.bytes + request.length - rest, rest)
                        if self._change(slot, request.bytes, body, request.length):
                            forget_parked(request)
                        else:
                            repark(&self._parking, request)
                            usleep(_GATE_POLL_MICROSECONDS)
        finally:
            free(body)
            self._drop_parked()

    cdef _refuse_parked(self, Parked *last):
        """Refuse what is held, up to ``last``: the disk is not one that may be written."""
        cdef Parked *request = NULL
        while request != last:
            # Nobody else takes any out, so ``last`` is among them.
            request = unpark(&self._parking)
            self._answer((<k.fuse_in_header *>request.bytes).unique, -EROFS, NULL, 0)
            forget_parked(request)

    def _drop_parked(self):
        # Unanswered, so the kernel hands them out again to the next server.
        cdef Parked *request
        while (request := unpark(&self._parking)) != NULL:
            forget_parked(request)

    @property
    def parked_bytes(self):
        """Bytes of requests that are held."""
        return self._parking.held_bytes

    # --- everything else -----------------------------------------------------------------------

    cdef void _pass_on(
        self, k.fuse_in_header *request, char *head, char *body, size_t n
    ) noexcept nogil:
        cdef size_t in_head = min(n, <size_t>_HEAD)
        cdef uint32_t opcode = request.opcode
        cdef bint replies = opcode != k.FUSE_FORGET and opcode != k.FUSE_BATCH_FORGET
        if opcode == k.FUSE_INIT:
            with gil:
                if self._init_reply is not None:
                    self._repeat_init(request.unique)
                    return
                self._on_init(head[:in_head] + body[:n - in_head])
            self._init_unique = request.unique
        elif opcode == k.FUSE_OPEN:
            with gil:
                self._note_open(request.unique)
        if replies:
            fd_add_int(&self._outstanding, 1)
        if fd_packet(self._relay, head, in_head, body, n - in_head) < 0 and replies:
            fd_add_int(&self._outstanding, -1)
            self._answer(request.unique, -EIO, NULL, 0)

    cdef _note_open(self, uint64_t unique):
        cdef int i
        for i in range(_OPENS_MAX):
            if self._opens[i] == 0:
                self._opens[i] = unique
                return

    def relay_replies(self):
        """Pass pyfuse3's replies to the kernel until close()."""
        cdef char *reply = fd_pages(_MAX_WRITE + 4096)
        cdef int64_t n
        if reply == NULL:
            raise MemoryError
        try:
            while True:
                with nogil:
                    n = fd_unpacket(self._relay, reply, _MAX_WRITE + 4096)
                if n <= 0:
                    return
                if 16 <= n <= _MAX_WRITE + 4096:
                    self._pass_back(reply, n)
        finally:
            free(reply)

    cdef _pass_back(self, char *reply, int64_t n):
        cdef k.fuse_out_header *header = <k.fuse_out_header *>reply
        cdef k.fuse_open_out *opened = <k.fuse_open_out *>(reply + 16)
        cdef int i
        if header.unique == self._init_unique and header.unique != 0:
            self._adjust_init(reply, n)
        for i in range(_OPENS_MAX):
            if self._opens[i] == header.unique and header.unique != 0:
                self._opens[i] = 0
                if header.error == 0 and n == 32 and opened.open_flags & k.FOPEN_DIRECT_IO:
                    opened.open_flags |= k.FD_FOPEN_PARALLEL_DIRECT_WRITES
        with nogil:
            fd_reply(self._device, reply, n, NULL, 0)
            self._tell_answered()
        if header.unique != 0:
            fd_add_int(&self._outstanding, -1)

    cdef _adjust_init(self, char *reply, int64_t n):
        cdef k.fuse_out_header *header = <k.fuse_out_header *>reply
        cdef k.fuse_init_out *agreed = <k.fuse_init_out *>(reply + 16)
        if header.error or n < 80:
            return
        agreed.max_write = _MAX_WRITE
        agreed.max_pages = _MAX_WRITE // 4096
        agreed.max_background = _MAX_BACKGROUND
        agreed.congestion_threshold = _MAX_BACKGROUND * 3 // 4
        # The kernel's writeback cache would hide acknowledged data from us. Nobody else changes the
        # images, so cached reads need not ask for their attributes again and again. No file here
        # has privileges that a write could have to take away.
        agreed.flags &= ~<uint32_t>(k.FUSE_WRITEBACK_CACHE | k.FUSE_AUTO_INVAL_DATA)
        agreed.flags |= (
            k.FUSE_MAX_PAGES | k.FUSE_ASYNC_DIO | k.FUSE_ASYNC_READ | k.FUSE_BIG_WRITES
            | k.FD_HANDLE_KILLPRIV_V2 | k.FUSE_INIT_EXT
        )
        agreed.flags2 |= k.FD_DIRECT_IO_ALLOW_MMAP2

    # --- a new server on an old mount ----------------------------------------------------------

    def resume(self, bytes request):
        """Go on where a server that is gone stopped; pyfuse3 must be running. Raises OSError.

        The recorded INIT goes to the new session and its reply nowhere, since the kernel has one.
        Then the kernel is told to hand out again what was read and not answered. A mount that is
        gone by now is no error: serve() will say so.
        """
        cdef k.fuse_out_header notify
        cdef bytes reply
        cdef int64_t n
        cdef k.fuse_in_header *asked = <k.fuse_in_header *><char *>request
        if len(request) < 56 or asked.len != len(request) or asked.opcode != k.FUSE_INIT:
            raise OSError(errno.EINVAL, "the recorded INIT request is damaged")
        self._relay_socket.sendall(request)
        if not select.select([self._relay_socket], [], [], _SESSION_SECONDS_MAX)[0]:
            raise OSError(errno.ETIMEDOUT, "the session did not answer the recorded INIT")
        reply = self._relay_socket.recv(4096)
        if len(reply) < 16:
            raise OSError(errno.EPROTO, "the session did not take the recorded INIT")
        self._init_unique = (<k.fuse_in_header *><char *>request).unique
        adjusted = bytearray(reply)
        self._adjust_init(<char *>adjusted, len(adjusted))
        self._init_reply = bytes(adjusted)
        notify.len, notify.error, notify.unique = sizeof(notify), k.FD_NOTIFY_RESEND, 0
        with nogil:
            n = fd_reply(self._device, &notify, sizeof(notify), NULL, 0)
        if n < 0 and n != -ENODEV:
            raise OSError(-n, os.strerror(-n))

    cdef _repeat_init(self, uint64_t unique):
        reply = bytearray(self._init_reply)
        (<k.fuse_out_header *><char *>reply).unique = unique
        os.write(self._device, reply)

    # --- background work and the end -----------------------------------------------------------

    def write_back(self):
        """Start writeback whenever enough was written, so that flushes stay short; until stop()."""
        cdef uint64_t any
        cdef int i
        while not self._stopping:
            with nogil:
                if read(self._writeback, &any, sizeof(any)) > 0:
                    for i in range(self._count):
                        if not self._disks[i].read_only:
                            sync_file_range(self._disks[i].fd, 0, 0, SYNC_FILE_RANGE_WRITE)

    def forget_mapped(self):
        """Free the page tables of the images' mappings; they are made again as they are needed."""
        cdef int i
        with nogil:
            for i in range(self._count):
                mapping_forget(&self._mappings[i], self._disks[i].fd)

    def stop(self):
        """Make the loops end; requests in work are finished. Call again until they have ended."""
        fd_exchange(&self._stopping, 1)
        wake_parking(&self._parking)
        wake_parking(&self._lasting)
        os.eventfd_write(self._writeback, 1)
        with self._lock:
            for ident in self._threads.values():
                # Out of the read of the device. It may come just before the read: hence "again".
                signal.pthread_kill(ident, _INTERRUPT)

    @property
    def relayed(self):
        """Requests that pyfuse3 has not answered yet."""
        return fd_load_int(&self._outstanding)

    def close(self):
        """End relay_replies(); the pyfuse3 session's end of the pair is its own to close."""
        self._relay_socket.shutdown(socket.SHUT_RDWR)
