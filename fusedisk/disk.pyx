# cython: boundscheck=False, wraparound=False
"""One disk: reads, writes, zeroes, seeks and flushes on its backing image, marked before each change.

The functions return a count (or an offset), a negative errno, or HELD while the gate is closed.
Invariant: whoever changes the image is announced, and the chunks are marked, before the change; so
whoever closes that epoch afterwards sees the marks and the data.
"""

import errno
import os

from libc.errno cimport EIO, EINTR, EINVAL, ENODATA, ENOSPC, ENXIO, EOPNOTSUPP, EROFS
from libc.stdint cimport int64_t, uint32_t, uint64_t

from fusedisk.activity cimport REGION_SHIFT, ActivityLog, heat, on_record
from fusedisk.cached cimport cached_begin, cached_end, cached_read, cached_write
from fusedisk.capture cimport CAPTURES_MAX, captures_open, preserve
from fusedisk.changemap cimport (
    FENCED, GATED, ChangeMap, Control, doubt, enter, held, leave, raise_marks,
)
from fusedisk.direct cimport (
    direct_alignment, direct_begin, direct_end, direct_read, direct_write,
)
from fusedisk.mapped cimport mapped_done, mapped_now

from fusedisk.changemap import Fenced, Gated

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <linux/fs.h>
    #include <stdint.h>
    #include <sys/ioctl.h>
    #include <unistd.h>

    static int64_t fd_pread_all(int fd, char *into, uint64_t length, int64_t offset)
    {
        uint64_t done = 0;
        while (done < length) {
            ssize_t n = pread(fd, into + done, length - done, offset + done);
            if (n < 0) { if (errno == EINTR) continue; return -errno; }
            /* The image is shorter than at mount time: an error, never invented zeros. */
            if (n == 0) return -EIO;
            done += n;
        }
        return done;
    }
    static int fd_punch(int fd, int64_t offset, int64_t length)
    {
        int failed;
        do {
            failed = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
        } while (failed && errno == EINTR);
        return failed ? -errno : 0;
    }
    /* What holes begin and end at: a device's logical blocks. A file takes any byte. */
    static uint32_t fd_hole_block(int fd)
    {
        int block = 0;
        return ioctl(fd, BLKSSZGET, &block) == 0 && block > 0 ? block : 1;
    }
    static const char fd_zeros[4096] __attribute__((aligned(4096)));
    static int64_t fd_seek(int fd, int64_t offset, int whence)
    {
        /* The shared file offset moves, which nobody uses: all I/O here names its own. */
        int64_t found = lseek(fd, offset, whence);
        return found < 0 ? -errno : found;
    }
    static int fd_flush(int fd, int data_only)
    {
        return (data_only ? fdatasync(fd) : fsync(fd)) ? -errno : 0;
    }
    static uint64_t fd_count(uint64_t *sum, uint64_t add)
    { return __atomic_add_fetch(sum, add, __ATOMIC_RELAXED); }
    static void fd_put(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
    static uint64_t fd_get(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    static void fd_wake(int fd)
    { uint64_t one = 1; ssize_t done = write(fd, &one, sizeof one); (void)done; }
    """
    int64_t fd_pread_all(int fd, char *into, uint64_t length, int64_t offset) nogil
    int fd_punch(int fd, int64_t offset, int64_t length) nogil
    uint32_t fd_hole_block(int fd) nogil
    const char *fd_zeros
    int64_t fd_seek(int fd, int64_t offset, int whence) nogil
    int fd_flush(int fd, int data_only) nogil
    uint64_t fd_count(uint64_t *sum, uint64_t add) nogil
    void fd_put(uint64_t *p, uint64_t v) nogil
    uint64_t fd_get(const uint64_t *p) nogil
    void fd_wake(int fd) nogil
    int SEEK_DATA
    int SEEK_HOLE

# Writeback is started in steps, so that the next flush finds little left to write. A guest that
# does not flush gains nothing by it, and pages that are written again would reach the disk each
# time: so it goes on for twice the bytes that were between the last two flushes. What lies beyond
# that, or comes before any flush, is left to the kernel's own writeback.
cdef uint64_t _STEP_BYTES_MIN = 8 << 20
cdef uint64_t _STEP_BYTES_MAX = 256 << 20
# Under one announcement: some milliseconds of work for a filesystem.
cdef int64_t _ZERO_BYTES_MAX = 64 << 20


cdef uint64_t _ZEROS = 4096


cdef inline void _count_dirty(DiskIO *disk, uint64_t length) noexcept nogil:
    cdef uint64_t expected = fd_get(&disk.flush_bytes)
    cdef uint64_t step = min(max(expected // 4, _STEP_BYTES_MIN), _STEP_BYTES_MAX)
    cdef uint64_t dirty = fd_count(&disk.dirty_bytes, length)
    if dirty // step != (dirty - length) // step and dirty <= 2 * expected and disk.writeback >= 0:
        fd_wake(disk.writeback)


cdef inline void _note_flush(DiskIO *disk) noexcept nogil:
    """Learn how much lies between flushes; a small one after a large one does not end that."""
    fd_put(&disk.flush_bytes, max(fd_get(&disk.dirty_bytes), fd_get(&disk.flush_bytes) // 2))
    fd_put(&disk.dirty_bytes, 0)


cdef inline int64_t _refusal(int result) noexcept nogil:
    return HELD if result == GATED else -EROFS


cdef int64_t disk_read(
    DiskIO *disk, char *into, const char **found, uint64_t offset, uint64_t length
) noexcept nogil:
    """Read up to ``length`` bytes, fewer at the end of the disk; ``found`` says where they are.

    That is ``into``, which has room for ``length`` bytes and begins a page, or the page cache.
    After the answer comes disk_read_done().
    """
    cdef const char *mapped
    found[0] = into
    if offset >= disk.size:
        return 0
    length = min(length, disk.size - offset)
    if disk.alignment:
        return direct_read(disk.fd, disk.alignment, into, length, offset)
    mapped = mapped_now(disk.mapping, offset, length)
    if mapped != NULL:
        found[0] = mapped
        return length
    cached_read(&disk.cached, offset, length)
    return fd_pread_all(disk.fd, into, length, offset)


cdef void disk_read_done(DiskIO *disk, const char *into, const char *found) noexcept nogil:
    """What disk_read() found was copied."""
    if found != into:
        mapped_done(disk.mapping)


cdef inline int64_t _mark(
    DiskIO *disk, uint32_t epoch, uint64_t offset, uint64_t length
) noexcept nogil:
    """What comes before every change, under an announcement: copies for captures, then marks."""
    if captures_open(disk.control):
        preserve(
            disk.control, &disk.spills, disk.index, &disk.marks, disk.fd, disk.size, epoch, offset,
            length,
        )
    return -raise_marks(&disk.marks, epoch, offset, length)


cdef int64_t disk_write(
    DiskIO *disk, Py_ssize_t slot, const char *data, uint64_t offset, uint64_t length
) noexcept nogil:
    """Mark, then write; fewer bytes at the end of the disk, ENOSPC beyond it."""
    cdef uint32_t epoch = 0
    cdef int64_t result
    if disk.read_only:
        return -EROFS
    if length == 0:
        return 0
    if offset >= disk.size:
        return -ENOSPC
    length = min(length, disk.size - offset)
    result = enter(disk.control, slot, &slot, &epoch)
    if result:
        return _refusal(<int>result)
    # Invariant: the region is on record before its data changes, within the announcement.
    result = -heat(disk.activity, disk.first_region, offset, length)
    if result == 0:
        result = _mark(disk, epoch, offset, length)
    if result == 0 and disk.alignment:
        result = direct_write(disk.fd, disk.alignment, data, length, offset)
    elif result == 0:
        result = cached_write(&disk.cached, disk.mapping, data, offset, length)
    leave(disk.control, slot)
    if result > 0 and not disk.alignment:
        _count_dirty(disk, length)
    return result


cdef int64_t _write_zeros(DiskIO *disk, uint64_t at, uint64_t end) noexcept nogil:
    cdef int64_t done = 0
    while at < end and done >= 0:
        if disk.alignment:
            done = direct_write(disk.fd, disk.alignment, fd_zeros, min(end - at, _ZEROS), at)
        else:
            done = cached_write(&disk.cached, disk.mapping, fd_zeros, at, min(end - at, _ZEROS))
        at += <uint64_t>max(done, 0)
    return min(done, 0)


cdef bint disk_on_record(DiskIO *disk, uint64_t offset, uint64_t length) noexcept nogil:
    """Whether a change of this range need not wait for the activity log, as it seems."""
    if disk.read_only or length == 0 or offset >= disk.size:
        return True
    return on_record(disk.activity, disk.first_region, offset, min(length, disk.size - offset))


cdef inline int64_t _make_hole(DiskIO *disk, int64_t offset, int64_t length) noexcept nogil:
    cdef int64_t result
    if not disk.alignment:
        return fd_punch(disk.fd, offset, length)
    direct_begin()
    result = fd_punch(disk.fd, offset, length)
    direct_end()
    return result


cdef int64_t _punch(DiskIO *disk, uint64_t at, uint64_t end) noexcept nogil:
    """Make a hole of a marked range; at its edges parts of a device's blocks become zeros."""
    cdef uint64_t block = disk.hole_block
    cdef uint64_t first = (at + block - 1) // block * block
    cdef uint64_t last = end // block * block
    cdef int64_t result
    if first >= last:
        return _write_zeros(disk, at, end)
    result = _make_hole(disk, first, last - first)
    if result == 0:
        result = _write_zeros(disk, at, first)
    if result == 0:
        result = _write_zeros(disk, last, end)
    return result


cdef int64_t disk_zero(
    DiskIO *disk, Py_ssize_t slot, uint64_t offset, uint64_t length
) noexcept nogil:
    """Make holes of the data in a range, which lies inside the disk.

    Only what holds data is marked and punched: a range that is a hole already costs no mark, and
    a write that lands in it meanwhile counts as the later one. After HELD in the middle the whole
    is done again, which ends the same: the kernel lets no write at the disk before it is answered.
    """
    cdef uint64_t at = offset
    cdef int64_t result = 0
    if disk.read_only:
        return -EROFS
    while at < offset + length and result == 0:
        result = _zero_piece(disk, slot, &at, offset + length)
    return result


cdef int64_t _zero_piece(
    DiskIO *disk, Py_ssize_t slot, uint64_t *at, uint64_t end
) noexcept nogil:
    """Make a hole of the next data before ``end``, up to a bound; ``at`` is where to go on.

    Invariant: an announcement ends soon, whatever the guest asks for. Until then no epoch closes:
    a cutover's gate and the writers who meet a capture wait for it.
    """
    cdef uint32_t epoch = 0
    cdef int64_t data, hole, result
    result = enter(disk.control, slot, &slot, &epoch)
    if result:
        return _refusal(<int>result)
    data = fd_seek(disk.fd, at[0], SEEK_DATA)
    hole = end
    if data >= 0:
        hole = fd_seek(disk.fd, data, SEEK_HOLE)
    elif data == -ENXIO:
        data = end
    if data < 0 or hole < 0:
        # No map of the holes: everything may be data.
        data, hole = at[0], end
    hole = min(hole, <int64_t>end, data + _ZERO_BYTES_MAX)
    if hole > data:
        result = -heat(disk.activity, disk.first_region, data, hole - data)
        if result == 0:
            result = _mark(disk, epoch, data, hole - data)
        if result == 0:
            result = _punch(disk, data, hole)
    leave(disk.control, slot)
    at[0] = max(data, hole)
    return result


cdef int64_t disk_seek(DiskIO *disk, uint64_t offset, int whence) noexcept nogil:
    """SEEK_DATA or SEEK_HOLE of the backing image, within the disk's size."""
    cdef int64_t found
    if whence != SEEK_DATA and whence != SEEK_HOLE:
        return -EINVAL
    if offset >= disk.size:
        return -ENXIO
    found = fd_seek(disk.fd, offset, whence)
    if found == -EINVAL:
        # A backing without a map of its holes: all of it is data, with a hole at the end.
        return offset if whence == SEEK_DATA else disk.size
    if found > <int64_t>disk.size:
        return disk.size if whence == SEEK_HOLE else -ENXIO
    return found


cdef int64_t disk_flush(DiskIO *disk, bint data_only) noexcept nogil:
    """Make every completed write durable."""
    cdef int64_t result
    if disk.read_only:
        return 0
    _note_flush(disk)
    result = fd_flush(disk.fd, data_only)
    if result:
        doubt(disk.control)
    return result


cdef class Disk:
    """A backing image (descriptor and size in bytes) with its change map, ready for requests.

    The methods are the data path's functions with Python's types and exceptions: OSError, Gated
    or Fenced. ``writeback`` is an eventfd that is written to when writeback should begin, or -1.
    ``index`` is the disk's place in the mount, ``spills`` come from fusedisk.capture.open_spills.
    In ``activity``, where one is kept, the disk's regions start at ``first_region``.
    """

    def __cinit__(
        self, Control control not None, ChangeMap changes not None, int fd, *,
        bint read_only=False, int writeback=-1, uint32_t index=0, spills=(),
        ActivityLog activity=None, uint64_t first_region=0,
    ):
        if not read_only and not (control.writable and changes.writable):
            raise ValueError("the mapping is read-only")
        if activity is not None and (
            first_region + ((changes.size - 1) >> REGION_SHIFT) >= activity.log.regions
        ):
            raise ValueError("the activity log is too short for the disk")
        if not cached_begin(&self.io.cached, fd):
            raise MemoryError
        self._control, self._changes, self._activity = control, changes, activity
        self.io.fd, self.io.size = fd, changes.size
        self.io.read_only = read_only
        self.io.alignment = direct_alignment(fd)
        self.io.hole_block = fd_hole_block(fd)
        self.io.control = control.base
        self.io.marks = changes.map
        self.io.activity = NULL if activity is None else &activity.log
        self.io.first_region = first_region
        self.io.writeback = writeback
        self.io.index = index
        for i in range(CAPTURES_MAX):
            self.io.spills.fds[i] = spills[i] if spills else -1

    def __dealloc__(self):
        cached_end(&self.io.cached)

    @property
    def fd(self):
        """Descriptor of the backing image."""
        return self.io.fd

    @property
    def size(self):
        """Bytes."""
        return self.io.size

    def write(self, const unsigned char[::1] data, uint64_t offset):
        """Write; return how many bytes the disk took."""
        cdef uint64_t length = data.shape[0]
        cdef int64_t result = 0
        if length:
            with nogil:
                result = disk_write(&self.io, 0, <const char *>&data[0], offset, length)
        return self._checked(result)

    def zero(self, uint64_t offset, uint64_t length):
        """Make a range, cut off at the end of the disk, a hole."""
        cdef int64_t result = 0
        if offset < self.io.size and length:
            length = min(length, self.io.size - offset)
            with nogil:
                result = disk_zero(&self.io, 0, offset, length)
        self._checked(result)

    def _checked(self, int64_t result):
        if result == HELD:
            raise Gated
        if result == -EROFS and held(self.io.control) == FENCED:
            raise Fenced
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result
