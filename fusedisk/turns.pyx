# cython: boundscheck=False, wraparound=False
"""Taking turns at something, with the next one awake when the one before is done.

To wake a thread on another processor takes some ten microseconds, more in a virtual machine, and
with an ordinary lock nobody works meanwhile. Here whoever has the turn says when it is nearly over.
One of those that sleep is woken then, and looks until it is.

Invariant (no wake-up is lost): who goes to sleep counts itself first and then looks at ``taken``;
who ends a turn clears ``taken`` first and then looks at the count. Of the two at least one sees the
other, since all of these are sequentially consistent. Who stopped looking looks once more, too.
"""

from libc.stdint cimport uint32_t
from libc.string cimport memset

cdef extern from *:
    """
    #define _GNU_SOURCE
    #include <linux/futex.h>
    #include <stdint.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static uint32_t tn_get(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
    static void tn_put(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
    static void tn_add(uint32_t *p, int32_t v) { __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST); }
    static int tn_take(uint32_t *p)
    {
        uint32_t zero = 0;
        return __atomic_compare_exchange_n(p, &zero, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static void tn_sleep(uint32_t *p, uint32_t seen)
    { syscall(SYS_futex, p, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0); }
    static void tn_wake_one(uint32_t *p)
    { syscall(SYS_futex, p, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0); }
    static void tn_pause(void)
    {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ volatile("yield");
    #endif
    }
    """
    uint32_t tn_get(const uint32_t *p) nogil
    void tn_put(uint32_t *p, uint32_t v) nogil
    void tn_add(uint32_t *p, int v) nogil
    bint tn_take(uint32_t *p) nogil
    void tn_sleep(uint32_t *p, uint32_t seen) nogil
    void tn_wake_one(uint32_t *p) nogil
    void tn_pause() nogil

# Some 100 us, a few times what is left when a turn is nearly over: beyond it whoever has the turn
# was itself put to sleep, and to look on would only keep a processor from it.
cdef uint32_t _LOOKS = 4000


cdef void turns_begin(Turns *turns) noexcept nogil:
    """It is nobody's turn."""
    memset(turns, 0, sizeof(Turns))


cdef void turn_take(Turns *turns) noexcept nogil:
    """Wait until it is nobody's turn, and take it."""
    cdef uint32_t calls
    while True:
        calls = tn_get(&turns.calls)
        if tn_take(&turns.taken) or tn_get(&turns.nearly_over) and _look(turns):
            return
        tn_add(&turns.asleep, 1)
        if tn_get(&turns.taken):
            tn_sleep(&turns.calls, calls)
        tn_add(&turns.asleep, -1)


cdef bint _look(Turns *turns) noexcept nogil:
    cdef uint32_t looks = 0
    cdef bint taken = False
    tn_add(&turns.looking, 1)
    while not taken and looks < _LOOKS:
        # To look changes nothing, and leaves the word where whoever has the turn writes it.
        if tn_get(&turns.taken) == 0:
            taken = tn_take(&turns.taken)
        else:
            tn_pause()
        looks += 1
    tn_add(&turns.looking, -1)
    return taken


cdef void _call(Turns *turns) noexcept nogil:
    """Wake one, where nobody looks anyway."""
    if tn_get(&turns.asleep) and not tn_get(&turns.looking):
        tn_add(&turns.calls, 1)
        tn_wake_one(&turns.calls)


cdef void turn_nearly_over(Turns *turns) noexcept nogil:
    """Let the next one wake up; for whoever has the turn."""
    tn_put(&turns.nearly_over, 1)
    _call(turns)


cdef void turn_over(Turns *turns) noexcept nogil:
    """The next one's turn."""
    tn_put(&turns.nearly_over, 0)
    tn_put(&turns.taken, 0)
    _call(turns)
