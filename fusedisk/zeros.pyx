# cython: boundscheck=False, wraparound=False
"""Where a buffer is zeros, block by block, found without the interpreter's lock."""

from libc.stdlib cimport free, malloc
from libc.string cimport memcmp


cdef inline bint _is_zero(const unsigned char *block, size_t length) noexcept nogil:
    # Most blocks differ from zero in their first byte; what equals itself one further is all alike.
    return block[0] == 0 and memcmp(block, block + 1, length - 1) == 0


def zero_runs(const unsigned char[::1] data, Py_ssize_t block):
    """(start, end, is zero) of each run of blocks that are zeros, or are not, in order.

    The last block may be short.
    """
    cdef Py_ssize_t length = data.shape[0], at = 0, count = 0, most, index
    cdef Py_ssize_t *ends
    cdef bint kind = False, first, zero
    if block < 1:
        raise ValueError("a block has at least one byte")
    if length == 0:
        return []
    most = (length - 1) // block + 1
    ends = <Py_ssize_t *>malloc(most * sizeof(Py_ssize_t))
    if ends == NULL:
        raise MemoryError
    try:
        with nogil:
            first = kind = _is_zero(&data[0], min(block, length))
            at = block
            while at < length:
                zero = _is_zero(&data[at], min(block, length - at))
                if zero != kind:
                    ends[count] = at
                    count += 1
                    kind = zero
                at += block
            ends[count] = length
        runs = []
        at, kind = 0, first
        for index in range(count + 1):
            runs.append((at, ends[index], bool(kind)))
            at, kind = ends[index], not kind
        return runs
    finally:
        free(ends)
