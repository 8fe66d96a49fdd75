# cython: boundscheck=False, wraparound=False
"""The data path: native threads between ``/dev/fuse`` and the backing images.

READ, WRITE, FSYNC, FALLOCATE and LSEEK on a disk are answered here, without the interpreter's lock.
Every other request goes to the pyfuse3 session (fusedisk.relay).

Nothing that the kernel sends is believed: lengths and ranges are checked before they are used.
"""

import errno
import os
import signal
import threading

from libc.errno cimport (
    EAGAIN, EBADF, EINTR, EINVAL, EIO, ENODEV, ENOENT, ENOSPC, ENOTTY, EOPNOTSUPP, EROFS,
)
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from fusedisk cimport fuse_kernel as k
from fusedisk.changemap cimport GATED, held
from fusedisk.device cimport (
    HEAD, MAX_BACKGROUND, MAX_WRITE_BYTES, Device, aligned_memory, device_answer,
    device_receive, fd_exchange, fd_load_int, resident_memory,
)
from fusedisk.disk cimport (
    HELD, Disk, DiskIO, disk_flush, disk_on_record, disk_read, disk_read_done, disk_seek,
    disk_write, disk_zero,
)
from fusedisk.mapped cimport Mapping, mapping_begin, mapping_end, mapping_forget
from fusedisk.parked cimport (
    PARKED_BYTES_MAX, Parked, Parking, any_parked, await_parked, forget_parked, last_parked, park,
    parking_begin, repark, unpark, wake_parking,
)
from fusedisk.relay cimport Relay
from fusedisk.resting cimport RESTING_SLOTS, Resting, rest, resting_begin, resting_note
from fusedisk.slowing cimport may_write, slowed

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <unistd.h>

    /* The kernel's struct dioattr of XFS_IOC_DIOINFO: alignments of memory and of file ranges. */
    struct fd_dioattr { uint32_t mem, min_io, max_io; };
    #define FD_XFS_IOC_DIOINFO _IOR('X', 30, struct fd_dioattr)
    """
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

FIRST_DISK = 2
DISKS_MAX = 64
MAX_WRITE = MAX_WRITE_BYTES

cdef enum:
    _FIRST_DISK = 2
    _DISKS_MAX = 64
    _GATE_POLL_MICROSECONDS = 1000
    _LEASE_POLLS = 20
    # Of writes longer than this the filesystem takes long enough that others wait for their turn.
    _LARGE = 128 << 10
    # A hole of more than that may take long; each smaller one is not worth a change of threads.
    _ZERO_AT_ONCE = 4 << 20

# Invariant: all that the kernel hands out at a time finds room, so that no thread is left with a
# held write in its hands. Left over is room for programs that wait for each write of theirs, which
# the kernel does not count: each thread of theirs has one request.
assert PARKED_BYTES_MAX >= MAX_BACKGROUND * (MAX_WRITE_BYTES + HEAD)

_INTERRUPT = signal.SIGUSR2


cdef class DataPath:
    """Serves one mount. Each of the loops below is called in a thread of its own.

    ``relay`` has the mounted device, ``disks`` are at most 64 of inode 2 and up. ``check_lease`` is
    called now and then while writes are held; if it returns true they are refused. So many threads as
    ``may_rest`` rest while the rest of them suffices.
    """

    cdef int _stopping, _writeback, _count
    cdef DiskIO *_disks[_DISKS_MAX]
    cdef Mapping _mappings[_DISKS_MAX]
    cdef Parking _parking, _lasting
    cdef Resting _resting
    cdef object _keep, _check_lease, _threads, _lock
    cdef Relay _relay
    cdef Device *_device
    cdef readonly int error

    def __cinit__(self, Relay relay not None, disks, *, writeback, check_lease, may_rest):
        if not 1 <= len(disks) <= _DISKS_MAX:
            raise ValueError(f"a mount serves 1 to {_DISKS_MAX} disks")
        self._relay, self._device, self._writeback = relay, &relay.device, writeback
        self._keep = list(disks)
        cdef Disk disk
        for disk in disks:
            if not disk.io.alignment:
                # Invariant: no pages beside direct writes, since they would keep what is old.
                mapping_begin(&self._mappings[self._count], disk.io.fd, disk.io.size)
                disk.io.mapping = &self._mappings[self._count]
            self._disks[self._count] = &disk.io
            self._count += 1
        self._check_lease = check_lease
        if parking_begin(&self._parking, False) < 0 or parking_begin(&self._lasting, True) < 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._threads, self._lock = {}, threading.Lock()
        resting_begin(&self._resting, may_rest)

    def __dealloc__(self):
        for i in range(self._count):
            mapping_end(&self._mappings[i])

    # --- requests ------------------------------------------------------------------------------

    def serve(self, Py_ssize_t slot):
        """Answer requests until the mount is gone (true) or stop() was called (false).

        ``slot`` is this thread's own place among the announcements. Raises OSError.
        """
        cdef char head[HEAD]
        cdef char *body = resident_memory(MAX_WRITE_BYTES)
        cdef int64_t n = 0
        if body == NULL:
            raise MemoryError
        if not 0 <= slot < RESTING_SLOTS:
            raise ValueError(f"a mount is served by at most {RESTING_SLOTS} threads")
        with self._lock:
            self._threads[slot] = threading.get_ident()
        try:
            with nogil:
                while not fd_load_int(&self._stopping):
                    rest(&self._resting, slot, &self._stopping)
                    n = device_receive(self._device, head, body)
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
        cdef size_t in_head = min(n, <size_t>HEAD)
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        if n < sizeof(k.fuse_in_header) or n < 40 or request.len != n:
            return
        resting_note(&self._resting, slot, request.nodeid, self._in_turn(request, n))
        if self._lasts(head, n) and park(&self._lasting, head, in_head, body, n - in_head):
            return
        self._dispatch(slot, head, body, n)

    cdef bint _in_turn(self, k.fuse_in_header *request, size_t n) noexcept nogil:
        """Whether it is a large write to a disk that takes one of these at a time."""
        cdef DiskIO *disk
        if request.opcode != k.FUSE_WRITE or n <= _LARGE:
            return False
        disk = self._disk(request.nodeid)
        return disk != NULL and not disk.alignment and disk.cached.one_writer

    cdef bint _lasts(self, char *head, size_t n) noexcept nogil:
        """Whether it has to wait for a disk: a few of these would keep all others waiting too."""
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        cdef k.fuse_write_in *asked = <k.fuse_write_in *>(head + 40)
        cdef DiskIO *disk
        if request.opcode == k.FUSE_FSYNC:
            return True
        if request.opcode == k.FUSE_FALLOCATE:
            return n >= 72 and (<k.fuse_fallocate_in *>(head + 40)).length > _ZERO_AT_ONCE
        if request.opcode != k.FUSE_WRITE or n < HEAD:
            return False
        disk = self._disk(request.nodeid)
        return disk != NULL and not disk_on_record(disk, asked.offset, n - HEAD)

    cdef void _dispatch(self, Py_ssize_t slot, char *head, char *body, size_t n) noexcept nogil:
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        cdef uint32_t opcode = request.opcode
        if opcode == k.FUSE_WRITE or opcode == k.FUSE_FALLOCATE:
            while self._has_to_queue() or not self._change(slot, head, body, n):
                if park(&self._parking, head, min(n, <size_t>HEAD), body, n - min(n, <size_t>HEAD)):
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
            self._relay.pass_on(request, head, body, n)

    cdef bint _has_to_queue(self) noexcept nogil:
        """Of a slowed guest the requests go on in turn: else a dear one would wait for ever."""
        return slowed(self._disks[0].control) and any_parked(&self._parking)

    cdef DiskIO *_disk(self, uint64_t inode) noexcept nogil:
        if inode < _FIRST_DISK or inode - _FIRST_DISK >= <uint64_t>self._count:
            return NULL
        return self._disks[inode - _FIRST_DISK]

    cdef void _read(
        self, k.fuse_in_header *request, char *head, char *body, size_t n
    ) noexcept nogil:
        cdef k.fuse_read_in *asked = <k.fuse_read_in *>(head + 40)
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef const char *found = NULL
        cdef int64_t result
        if disk == NULL or n < HEAD or asked.size > MAX_WRITE_BYTES:
            device_answer(self._device, request.unique, -EBADF if disk == NULL else -EINVAL, NULL, 0)
            return
        result = disk_read(disk, body, &found, asked.offset, asked.size)
        device_answer(self._device, request.unique, min(result, 0), found, <size_t>max(result, 0))
        disk_read_done(disk, body, found)

    cdef bint _change(self, Py_ssize_t slot, char *head, char *body, size_t n) noexcept nogil:
        """Answer WRITE or FALLOCATE; false where it has to be held."""
        cdef k.fuse_in_header *request = <k.fuse_in_header *>head
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef k.fuse_write_in *asked = <k.fuse_write_in *>(head + 40)
        cdef k.fuse_write_out done
        cdef int64_t result
        if disk == NULL:
            device_answer(self._device, request.unique, -EBADF, NULL, 0)
            return True
        if request.opcode == k.FUSE_FALLOCATE:
            result = self._fallocate(slot, disk, head, n)
            if result != HELD:
                device_answer(self._device, request.unique, result, NULL, 0)
            return result != HELD
        if n < HEAD or asked.size != n - HEAD or asked.size > MAX_WRITE_BYTES:
            device_answer(self._device, request.unique, -EINVAL, NULL, 0)
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
        device_answer(self._device, request.unique, min(result, 0), &done, 8)
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
        device_answer(self._device, request.unique, result, NULL, 0)

    cdef void _seek(self, k.fuse_in_header *request, char *head, size_t n) noexcept nogil:
        cdef k.fuse_lseek_in *asked = <k.fuse_lseek_in *>(head + 40)
        cdef DiskIO *disk = self._disk(request.nodeid)
        cdef k.fuse_lseek_out found
        cdef int64_t result = -EBADF if disk == NULL else -EINVAL
        if disk != NULL and n >= 64:
            result = disk_seek(disk, asked.offset, <int>asked.whence)
        found.offset = <uint64_t>max(result, 0)
        device_answer(self._device, request.unique, min(result, 0), &found, sizeof(found))

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
            device_answer(self._device, request.unique, -ENOTTY, NULL, 0)
            return
        needs.mem = needs.min_io = max(disk.alignment, <uint32_t>512)
        needs.max_io = 0x7FFFFE00
        memset(reply, 0, 16)
        memcpy(reply + 16, &needs, 12)
        device_answer(self._device, request.unique, 0, reply, sizeof(reply))

    # --- requests that last --------------------------------------------------------------------

    def work_off(self, Py_ssize_t slot):
        """Answer what has to wait for a disk; until stop(), after which the rest is handed out again.

        Invariant: a flush begins after it was received, so it covers every write answered before.
        """
        cdef Parked *request
        cdef char *body = aligned_memory(MAX_WRITE_BYTES)
        cdef size_t in_head
        if body == NULL:
            raise MemoryError
        try:
            with nogil:
                while not fd_load_int(&self._stopping):
                    await_parked(&self._lasting)
                    request = NULL if fd_load_int(&self._stopping) else unpark(&self._lasting)
                    if request != NULL:
                        in_head = min(request.length, <size_t>HEAD)
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
        cdef char *body = aligned_memory(MAX_WRITE_BYTES)
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
                        rest = request.length - min(request.length, <size_t>HEAD)
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
            device_answer(self._device, (<k.fuse_in_header *>request.bytes).unique, -EROFS, NULL, 0)
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
