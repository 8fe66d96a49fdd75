"""A disk as the data path uses it: plain fields and functions, no interpreter's lock."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from fusedisk.capture cimport Spills
from fusedisk.activity cimport Activity, ActivityLog
from fusedisk.cached cimport Cached
from fusedisk.changemap cimport ChangeMap, Control, Marks
from fusedisk.mapped cimport Mapping

cdef enum:
    HELD = -100000

cdef struct DiskIO:
    int fd
    bint read_only
    uint32_t index
    uint64_t size
    uint32_t alignment
    uint32_t hole_block
    Mapping *mapping
    Cached cached
    char *control
    Marks marks
    Spills spills
    Activity *activity
    uint64_t first_region
    uint64_t dirty_bytes
    uint64_t flush_bytes
    int writeback

cdef int64_t disk_read(
    DiskIO *disk, char *into, const char **found, uint64_t offset, uint64_t length
) noexcept nogil
cdef void disk_read_done(DiskIO *disk, const char *into, const char *found) noexcept nogil
cdef int64_t disk_write(
    DiskIO *disk, Py_ssize_t slot, const char *data, uint64_t offset, uint64_t length
) noexcept nogil
cdef int64_t disk_zero(
    DiskIO *disk, Py_ssize_t slot, uint64_t offset, uint64_t length
) noexcept nogil
cdef bint disk_on_record(DiskIO *disk, uint64_t offset, uint64_t length) noexcept nogil
cdef int64_t disk_seek(DiskIO *disk, uint64_t offset, int whence) noexcept nogil
cdef int64_t disk_flush(DiskIO *disk, bint data_only) noexcept nogil

cdef class Disk:
    cdef DiskIO io
    cdef Control _control
    cdef ChangeMap _changes
    cdef ActivityLog _activity
