"""What the data path calls of the activity log, without the interpreter's lock."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <stdint.h>
    static inline uint8_t act_load(const uint8_t *p)
    { return __atomic_load_n(p, __ATOMIC_RELAXED); }
    """
    uint8_t act_load(const uint8_t *p) nogil

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass

cdef enum:
    # 16 MiB: the largest chunk, so that every chunk lies in one region.
    REGION_SHIFT = 24
    # States of a region. All but COLD have their bit in the file, or are about to.
    COLD = 0
    WANTED = 1
    COOLING = 2
    IDLE = 3
    BUSY = 4

cdef struct Activity:
    int fd
    uint64_t regions
    uint64_t blocks
    uint8_t *states
    # The round in which an IDLE region was last seen BUSY; a checkpoint's own.
    uint32_t *idle_since
    uint32_t rounds
    uint8_t *newest
    uint64_t *sequences
    unsigned char generation[16]
    char *page
    pthread_mutex_t lock

cdef int heat_slowly(Activity *log, uint64_t first, uint64_t last) noexcept nogil


cdef inline int heat(
    Activity *log, uint64_t disk_first, uint64_t offset, uint64_t length
) noexcept nogil:
    """Have the regions of a range on record as in use: 0 or an errno. The caller is announced.

    ``disk_first`` is the disk's first region, ``log`` NULL where no log is kept; ``length`` > 0.
    """
    cdef uint64_t region, last
    if log == NULL:
        return 0
    region = disk_first + (offset >> REGION_SHIFT)
    last = disk_first + ((offset + length - 1) >> REGION_SHIFT)
    while region <= last:
        if act_load(&log.states[region]) != BUSY:
            return heat_slowly(log, region, last)
        region += 1
    return 0


cdef inline bint on_record(
    Activity *log, uint64_t disk_first, uint64_t offset, uint64_t length
) noexcept nogil:
    """Whether `heat` of this range has nothing to write, as it seems; ``length`` > 0."""
    cdef uint64_t region, last
    if log == NULL:
        return True
    region = disk_first + (offset >> REGION_SHIFT)
    last = disk_first + ((offset + length - 1) >> REGION_SHIFT)
    while region <= last:
        if act_load(&log.states[region]) <= WANTED:
            return False
        region += 1
    return True


cdef class ActivityLog:
    cdef Activity log
    cdef object _generation
