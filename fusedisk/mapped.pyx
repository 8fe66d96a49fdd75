# cython: boundscheck=False, wraparound=False
"""Reads of a backing image out of the page cache, without a copy of our own.

The image is mapped read-only, and the kernel copies a READ's reply straight from the mapped pages.
Only pages that are there are used: whatever fails (an I/O error, an image cut short) shows when a
page is touched, and the caller then reads in the ordinary way, which has an errno for it.

Invariant: a page is touched by ourselves before its address is given to the kernel. A fault that
the kernel takes on our behalf while we are being killed fails the request that it copies, and the
guest would see an I/O error; one that we take in user mode leaves the request to the next server.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport abort

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <pthread.h>
    #include <setjmp.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/mman.h>

    #define MP_PAGE 4096UL

    static __thread sigjmp_buf mp_back;
    static __thread volatile sig_atomic_t mp_armed;

    static void mp_sigbus(int number, siginfo_t *info, void *context)
    {
        (void)info; (void)context;
        if (mp_armed) {
            mp_armed = 0;
            siglongjmp(mp_back, 1);
        }
        /* Not ours: it happens again on return, and kills. */
        signal(number, SIG_DFL);
    }
    static void mp_contain(void)
    {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = mp_sigbus;
        /* SA_NODEFER: the jump out of the handler leaves the signal's mask as it is. */
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGBUS, &action, NULL);
    }
    static char *mp_map(int fd, uint64_t length, char *over)
    {
        char *base = mmap(over, length, PROT_READ, MAP_SHARED | (over ? MAP_FIXED : 0), fd, 0);
        if (base == MAP_FAILED)
            return NULL;
        /* A fault reads its page alone, as a small read(2) does: guests read ahead by themselves. */
        madvise(base, length, MADV_RANDOM);
        return base;
    }
    static int mp_touch(const char *first, const char *end)
    {
        if (sigsetjmp(mp_back, 0))
            return 0;
        mp_armed = 1;
        for (const volatile char *page = first; page < end; page += MP_PAGE)
            (void)*page;
        mp_armed = 0;
        return 1;
    }
    /* Whether no page of the range has to come from the disk: many at once are read(2)'s to fetch. */
    static int mp_cached(const char *first, const char *end)
    {
        unsigned char pages[(1 << 20) / MP_PAGE + 1];
        size_t count = (end - first + MP_PAGE - 1) / MP_PAGE;
        if (count == 1)
            return 1;
        if (count > sizeof pages || mincore((void *)first, end - first, pages))
            return 0;
        for (size_t i = 0; i < count; i++)
            if (!(pages[i] & 1))
                return 0;
        return 1;
    }
    static const char *mp_page(const char *at)
    {
        return (const char *)((uintptr_t)at & ~(MP_PAGE - 1));
    }
    static const char *mp_use(const char *base, uint64_t offset, uint64_t length)
    {
        const char *start = base + offset, *end = start + length, *first = mp_page(start);
        return mp_cached(first, end) && mp_touch(first, end) ? start : NULL;
    }
    /* Readers and whoever drops pages each say so first and look at the other then, with a full
       barrier between: at least one of the two sees the other and steps back. */
    static int mp_enter(int64_t *readers, const int *dropping)
    {
        __atomic_add_fetch(readers, 1, __ATOMIC_SEQ_CST);
        return !__atomic_load_n(dropping, __ATOMIC_SEQ_CST);
    }
    static void mp_leave(int64_t *readers) { __atomic_sub_fetch(readers, 1, __ATOMIC_RELEASE); }
    static int mp_drop(char *base, int fd, uint64_t offset, uint64_t length,
                        const int64_t *readers, int *dropping)
    {
        char *first = base + ((offset + MP_PAGE - 1) & ~(MP_PAGE - 1));
        char *end = (char *)mp_page(base + offset + length);
        __atomic_store_n(dropping, 1, __ATOMIC_SEQ_CST);
        int alone = !__atomic_load_n(readers, __ATOMIC_SEQ_CST) && first < end;
        if (alone) {
            madvise(first, end - first, MADV_DONTNEED);
            posix_fadvise(fd, first - base, end - first, POSIX_FADV_DONTNEED);
        }
        __atomic_store_n(dropping, 0, __ATOMIC_RELEASE);
        return alone;
    }
    """
    void mp_contain() nogil
    char *mp_map(int fd, uint64_t length, char *over) nogil
    const char *mp_use(const char *base, uint64_t offset, uint64_t length) nogil
    int mp_enter(int64_t *readers, const int *dropping) nogil
    void mp_leave(int64_t *readers) nogil
    int mp_drop(
        char *base, int fd, uint64_t offset, uint64_t length, const int64_t *readers, int *dropping
    ) nogil
    int munmap(void *base, size_t length) nogil


cdef void mapping_begin(Mapping *mapping, int fd, uint64_t size) noexcept nogil:
    """Map an image; where that is not possible, mapped_now() never has anything."""
    mp_contain()
    mapping.base, mapping.length = mp_map(fd, size, NULL), size
    mapping.readers, mapping.dropping = 0, 0


cdef const char *mapped_now(Mapping *mapping, uint64_t offset, uint64_t length) noexcept nogil:
    """Where a range, which lies inside the image, can be read at once; NULL where read(2) has to.

    Whoever got an address gives it back by mapped_done().
    """
    cdef const char *found = NULL
    if mapping == NULL or mapping.base == NULL or length == 0:
        return NULL
    if mp_enter(&mapping.readers, &mapping.dropping):
        found = mp_use(mapping.base, offset, length)
    if found == NULL:
        mp_leave(&mapping.readers)
    return found


cdef void mapped_done(Mapping *mapping) noexcept nogil:
    """The kernel has copied what mapped_now() found."""
    mp_leave(&mapping.readers)


cdef bint mapped_drop(Mapping *mapping, int fd, uint64_t offset, uint64_t length) noexcept nogil:
    """Take a range's pages out of the page cache but for dirty ones; false where all stay.

    For one caller at a time. Invariant: none that somebody reads from goes, for the reason above.
    """
    if mapping == NULL or mapping.base == NULL:
        return False
    return mp_drop(mapping.base, fd, offset, length, &mapping.readers, &mapping.dropping)


cdef void mapping_forget(Mapping *mapping, int fd) noexcept nogil:
    """Give the page tables back. The pages stay cached, and whoever reads goes on.

    Invariant: the addresses stay mapped to the same bytes throughout (mmap(2), MAP_FIXED); where
    the kernel cannot do that, nothing is left to read from, and the next server takes over.
    """
    if mapping.base != NULL and mp_map(fd, mapping.length, mapping.base) == NULL:
        abort()


cdef void mapping_end(Mapping *mapping) noexcept nogil:
    """Unmap; nobody may read any more."""
    if mapping.base != NULL:
        munmap(mapping.base, mapping.length)
        mapping.base = NULL
