# cython: boundscheck=False, wraparound=False
"""What the data path leaves to pyfuse3: requests go to its session byte for byte, replies come back.

Into the replies goes what pyfuse3 cannot express. The session has one end of a SOCK_SEQPACKET pair,
which it reads and writes as if it were the device.
"""

import errno
import os
import select
import socket

from libc.errno cimport EIO, ENODEV
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free

from fusedisk cimport fuse_kernel as k
from fusedisk.device cimport (
    HEAD, MAX_BACKGROUND, MAX_WRITE_BYTES, device_answer, device_notify, device_reply,
    fd_add_int, fd_load_int, resident_memory,
)

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <errno.h>
    #include <stdint.h>
    #include <sys/socket.h>
    #include <sys/uio.h>

    static int64_t rl_packet(int fd, const char *head, size_t head_length,
                             const char *body, size_t length)
    {
        struct iovec parts[2] = {{(void *)head, head_length}, {(void *)body, length}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = length ? 2 : 1};
        ssize_t n;
        do { n = sendmsg(fd, &message, MSG_NOSIGNAL); } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    static int64_t rl_unpacket(int fd, char *into, size_t length)
    {
        ssize_t n;
        do { n = recv(fd, into, length, MSG_TRUNC); } while (n < 0 && errno == EINTR);
        return n < 0 ? -errno : n;
    }
    """
    int64_t rl_packet(
        int fd, const char *head, size_t head_length, const char *body, size_t length) nogil
    int64_t rl_unpacket(int fd, char *into, size_t length) nogil

_SESSION_SECONDS_MAX = 10.0


cdef class Relay:
    """Between a mounted device and the session at the other end of ``session``.

    ``on_init`` is given the kernel's INIT request before it is passed on. One byte is written to
    ``answered`` after the first reply to the device, whoever sends it.
    """

    def __cinit__(self, int device, on_init, int answered=-1):
        self.device.fd, self.device.answered = device, answered
        self._on_init, self._init_reply = on_init, None
        self._socket, self.session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._socket, self.session):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_WRITE_BYTES)
        self._end = self._socket.fileno()

    cdef void pass_on(
        self, k.fuse_in_header *request, char *head, char *body, size_t n
    ) noexcept nogil:
        cdef size_t in_head = min(n, <size_t>HEAD)
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
        if rl_packet(self._end, head, in_head, body, n - in_head) < 0 and replies:
            fd_add_int(&self._outstanding, -1)
            device_answer(&self.device, request.unique, -EIO, NULL, 0)

    cdef _note_open(self, uint64_t unique):
        cdef int i
        for i in range(OPENS_MAX):
            if self._opens[i] == 0:
                self._opens[i] = unique
                return

    def relay_replies(self):
        """Pass pyfuse3's replies to the kernel until close()."""
        cdef char *reply = resident_memory(MAX_WRITE_BYTES + 4096)
        cdef int64_t n
        if reply == NULL:
            raise MemoryError
        try:
            while True:
                with nogil:
                    n = rl_unpacket(self._end, reply, MAX_WRITE_BYTES + 4096)
                if n <= 0:
                    return
                if 16 <= n <= MAX_WRITE_BYTES + 4096:
                    self._pass_back(reply, n)
        finally:
            free(reply)

    cdef _pass_back(self, char *reply, int64_t n):
        cdef k.fuse_out_header *header = <k.fuse_out_header *>reply
        cdef k.fuse_open_out *opened = <k.fuse_open_out *>(reply + 16)
        cdef int i
        if header.unique == self._init_unique and header.unique != 0:
            self._adjust_init(reply, n)
        for i in range(OPENS_MAX):
            if self._opens[i] == header.unique and header.unique != 0:
                self._opens[i] = 0
                if header.error == 0 and n == 32 and opened.open_flags & k.FOPEN_DIRECT_IO:
                    opened.open_flags |= k.FD_FOPEN_PARALLEL_DIRECT_WRITES
        with nogil:
            device_reply(&self.device, reply, n, NULL, 0)
        if header.unique != 0:
            fd_add_int(&self._outstanding, -1)

    cdef _adjust_init(self, char *reply, int64_t n):
        cdef k.fuse_out_header *header = <k.fuse_out_header *>reply
        cdef k.fuse_init_out *agreed = <k.fuse_init_out *>(reply + 16)
        if header.error or n < 80:
            return
        agreed.max_write = MAX_WRITE_BYTES
        agreed.max_pages = MAX_WRITE_BYTES // 4096
        agreed.max_background = MAX_BACKGROUND
        agreed.congestion_threshold = MAX_BACKGROUND * 3 // 4
        # The kernel's writeback cache would hide acknowledged data from us. Nobody else changes the
        # images, so cached reads need not ask for their attributes again and again. No file here
        # has privileges that a write could have to take away.
        agreed.flags &= ~<uint32_t>(k.FUSE_WRITEBACK_CACHE | k.FUSE_AUTO_INVAL_DATA)
        agreed.flags |= (
            k.FUSE_MAX_PAGES | k.FUSE_ASYNC_DIO | k.FUSE_ASYNC_READ | k.FUSE_BIG_WRITES
            | k.FD_HANDLE_KILLPRIV_V2 | k.FUSE_INIT_EXT
        )
        agreed.flags2 |= k.FD_DIRECT_IO_ALLOW_MMAP2

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
        self._socket.sendall(request)
        if not select.select([self._socket], [], [], _SESSION_SECONDS_MAX)[0]:
            raise OSError(errno.ETIMEDOUT, "the session did not answer the recorded INIT")
        reply = self._socket.recv(4096)
        if len(reply) < 16:
            raise OSError(errno.EPROTO, "the session did not take the recorded INIT")
        self._init_unique = (<k.fuse_in_header *><char *>request).unique
        adjusted = bytearray(reply)
        self._adjust_init(<char *>adjusted, len(adjusted))
        self._init_reply = bytes(adjusted)
        notify.len, notify.error, notify.unique = sizeof(notify), k.FD_NOTIFY_RESEND, 0
        with nogil:
            n = device_notify(&self.device, &notify, sizeof(notify))
        if n < 0 and n != -ENODEV:
            raise OSError(-n, os.strerror(-n))

    cdef _repeat_init(self, uint64_t unique):
        reply = bytearray(self._init_reply)
        (<k.fuse_out_header *><char *>reply).unique = unique
        os.write(self.device.fd, reply)

    @property
    def outstanding(self):
        """Requests that the session has not answered yet."""
        return fd_load_int(&self._outstanding)

    def close(self):
        """End relay_replies(); the session's end of the pair is its own to close."""
        self._socket.shutdown(socket.SHUT_RDWR)
