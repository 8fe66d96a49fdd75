# cython: boundscheck=False, wraparound=False
"""The gate of a cutover: closed until a time, and let go by the server when that has come.

In the control file (little endian, see changemap.pyx):

offset 64   control word, with bit 32 gate, bit 33 fence, bit 35 begun: PROMOTE may have been sent
offset 256  u64 time of CLOCK_MONOTONIC, in ns, from which on the server may let the gate go;
            0 = never: a mount that stands by, or a sender that is older than this word

The sender renews the time while it lives; one that stands still, or waits for a disk, is found by it.
Whether a promotion is begun and whether writes go on is decided by one word in one atomic step, so
that no clock has to be trusted, and a sender may wake up as late as it likes:

sender   *committing* durable -> gate closed? then set begun, else take back -> PROMOTE
server   time over -> begun? then fence instead of gate, else open

Invariants: begun is set only while the gate is closed. From then on the gate gives way to nothing but
the fence, until whoever knows that the target did not promote has taken the record and begun back.
"""

from libc.stdint cimport uint64_t

from fusedisk.changemap cimport Control

cdef extern from *:
    """
    #include <stdint.h>
    #include <time.h>

    static uint64_t fd_now(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
    }
    static uint64_t fd_look(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static void fd_post(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static int fd_swap(uint64_t *p, uint64_t from, uint64_t to)
    { return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); }
    """
    uint64_t fd_now() nogil
    uint64_t fd_look(const uint64_t *p) nogil
    void fd_post(uint64_t *p, uint64_t v) nogil
    int fd_swap(uint64_t *p, uint64_t old, uint64_t new) nogil

cdef uint64_t _GATE = 1ULL << 32
cdef uint64_t _FENCE = 1ULL << 33
cdef uint64_t _BEGUN = 1ULL << 35


cdef uint64_t *_until(Control control) except NULL:
    control._check_open()
    if not control.writable:
        raise ValueError("the mapping is read-only")
    return <uint64_t *>(control.base + 256)


def keep_closed(Control control not None, double seconds):
    """Let the gate stay closed until so many seconds from now."""
    if not 0 < seconds <= 86400:
        raise ValueError(f"a gate cannot stay closed for {seconds} s")
    fd_post(_until(control), fd_now() + <uint64_t>(seconds * 1e9))


def close_gate(Control control not None, double seconds):
    """Hold writes from now on, until so many seconds from now; the caller has the lease."""
    cdef uint64_t word
    # Invariant: the time is there before the gate, or it could be let go by an older time.
    keep_closed(control, seconds)
    while True:
        word = fd_look(control.word)
        if fd_swap(control.word, word, (word | _GATE) & ~_BEGUN):
            return


def begin_promotion(Control control not None):
    """Make the gate one that opens only behind the fence; False where it was let go already."""
    cdef uint64_t word
    _until(control)
    while True:
        word = fd_look(control.word)
        if word & (_GATE | _FENCE) != _GATE:
            return False
        if fd_swap(control.word, word, word | _BEGUN):
            return True


def let_go_if_due(Control control not None):
    """Open a gate whose time is over, or fence where a promotion is begun; whether that was done."""
    cdef uint64_t *until = _until(control)
    cdef uint64_t word, time, after
    while True:
        word = fd_look(control.word)
        time = fd_look(until)
        if not word & _GATE or time == 0 or fd_now() < time:
            return False
        after = word & ~(_GATE | _BEGUN)
        if fd_swap(control.word, word, after | _FENCE if word & _BEGUN else after):
            return True


def forget_time(Control control not None):
    """After the gate was opened: the next one may be closed by a sender that sets no time."""
    fd_post(_until(control), 0)
