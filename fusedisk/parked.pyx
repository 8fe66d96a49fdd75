"""Queues of requests that have to wait: not the threads that serve are parked.

One is of requests held at the closed gate, or of a slowed guest; one of those that take a disk's
time (fusedisk.datapath). So reads go on however many wait. What a queue holds is bounded; beyond that a
thread keeps its request in its hands and waits, which slows the guest's other requests but loses
nothing.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

cdef extern from *:
    """
    #include <pthread.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <unistd.h>

    static pthread_mutex_t fd_parking = PTHREAD_MUTEX_INITIALIZER;
    static void fd_parking_lock(void) { pthread_mutex_lock(&fd_parking); }
    static void fd_parking_unlock(void) { pthread_mutex_unlock(&fd_parking); }
    static int fd_eventfd(int each) { return eventfd(0, EFD_CLOEXEC | (each ? EFD_SEMAPHORE : 0)); }
    static void fd_signal(int fd)
    { uint64_t one = 1; ssize_t done = write(fd, &one, sizeof one); (void)done; }
    static void fd_await(int fd)
    { uint64_t any; ssize_t done = read(fd, &any, sizeof any); (void)done; }
    """
    void fd_parking_lock() nogil
    void fd_parking_unlock() nogil
    int fd_eventfd(int each) nogil
    void fd_signal(int fd) nogil
    void fd_await(int fd) nogil


cdef int parking_begin(Parking *parking, bint shared) noexcept nogil:
    """Make an empty queue; -1 where there is no descriptor left.

    Of a ``shared`` one each request, and each call to wake, wakes one of the threads that wait.
    """
    parking.first = parking.last = NULL
    parking.held_bytes = 0
    parking.wake = fd_eventfd(shared)
    return parking.wake


cdef bint park(
    Parking *parking, const char *head, size_t head_length, const char *body, size_t body_length
) noexcept nogil:
    """Copy a request into the queue; false where it is full."""
    cdef size_t length = head_length + body_length
    cdef Parked *request = NULL
    fd_parking_lock()
    if parking.held_bytes + length <= <uint64_t>PARKED_BYTES_MAX:
        request = <Parked *>malloc(sizeof(Parked) + length)
    if request != NULL:
        request.length = length
        request.bytes = <char *>(request + 1)
        memcpy(request.bytes, head, head_length)
        if body_length:
            memcpy(request.bytes + head_length, body, body_length)
        request.next = NULL
        if parking.last != NULL:
            parking.last.next = request
        else:
            parking.first = request
        parking.last = request
        parking.held_bytes += length
    fd_parking_unlock()
    if request == NULL:
        return False
    fd_signal(parking.wake)
    return True


cdef Parked *last_parked(Parking *parking) noexcept nogil:
    """The newest request, to compare with what is taken out; NULL where there is none."""
    fd_parking_lock()
    cdef Parked *request = parking.last
    fd_parking_unlock()
    return request


cdef Parked *unpark(Parking *parking) noexcept nogil:
    """Take the oldest request out, which then is the caller's; NULL where there is none."""
    fd_parking_lock()
    cdef Parked *request = parking.first
    if request != NULL:
        parking.first = request.next
        if parking.first == NULL:
            parking.last = NULL
        parking.held_bytes -= request.length
    fd_parking_unlock()
    return request


cdef void repark(Parking *parking, Parked *request) noexcept nogil:
    """Put the request just taken out back in front."""
    fd_parking_lock()
    request.next = parking.first
    parking.first = request
    if parking.last == NULL:
        parking.last = request
    parking.held_bytes += request.length
    fd_parking_unlock()


cdef bint any_parked(Parking *parking) noexcept nogil:
    """Whether requests are held; one that the releaser has in its hands does not count."""
    fd_parking_lock()
    cdef bint found = parking.first != NULL
    fd_parking_unlock()
    return found


cdef void forget_parked(Parked *request) noexcept nogil:
    """Free a request taken out."""
    free(request)


cdef void wake_parking(Parking *parking) noexcept nogil:
    """Wake whoever waits in await_parked."""
    fd_signal(parking.wake)


cdef void await_parked(Parking *parking) noexcept nogil:
    """Sleep until a request was parked, or woken."""
    fd_await(parking.wake)
