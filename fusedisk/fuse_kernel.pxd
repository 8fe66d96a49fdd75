"""The part of the FUSE kernel interface that the data path speaks (kernel: include/uapi/linux/fuse.h)."""

from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from *:
    """
    #include <linux/fuse.h>
    /* Newer than the headers of some distributions that we build on. */
    #define FD_NOTIFY_RESEND 7             /* 7.40: hand out again what was read and not answered */
    #define FD_FOPEN_PARALLEL_DIRECT_WRITES (1 << 6)                                    /* 7.38 */
    #define FD_DIRECT_IO_ALLOW_MMAP2 (1 << 4)      /* 7.39: bit 36, so bit 4 of the second word */
    #define FD_HANDLE_KILLPRIV_V2 (1 << 28)                                             /* 7.33 */
    """
    enum:
        FUSE_READ, FUSE_WRITE, FUSE_FSYNC, FUSE_FALLOCATE, FUSE_LSEEK, FUSE_IOCTL, FUSE_INIT
        FUSE_OPEN, FUSE_INTERRUPT, FUSE_FORGET, FUSE_BATCH_FORGET, FUSE_DESTROY
        FUSE_FSYNC_FDATASYNC
        FUSE_ASYNC_DIO, FUSE_AUTO_INVAL_DATA, FUSE_WRITEBACK_CACHE, FUSE_MAX_PAGES, FUSE_INIT_EXT
        FUSE_ASYNC_READ, FUSE_BIG_WRITES
        FOPEN_DIRECT_IO
        FD_NOTIFY_RESEND, FD_FOPEN_PARALLEL_DIRECT_WRITES, FD_DIRECT_IO_ALLOW_MMAP2
        FD_HANDLE_KILLPRIV_V2

    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid

    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    struct fuse_read_in:
        uint64_t offset
        uint32_t size

    struct fuse_write_in:
        uint64_t offset
        uint32_t size

    struct fuse_write_out:
        uint32_t size

    struct fuse_fsync_in:
        uint32_t fsync_flags

    struct fuse_fallocate_in:
        uint64_t offset
        uint64_t length
        uint32_t mode

    struct fuse_lseek_in:
        uint64_t offset
        uint32_t whence

    struct fuse_lseek_out:
        uint64_t offset

    struct fuse_ioctl_in:
        uint32_t cmd
        uint32_t out_size

    struct fuse_ioctl_out:
        int32_t result

    struct fuse_init_in:
        uint32_t flags
        uint32_t flags2

    struct fuse_init_out:
        uint32_t flags
        uint32_t max_write
        uint32_t flags2
        unsigned short max_background
        unsigned short congestion_threshold
        unsigned short max_pages

    struct fuse_open_out:
        uint32_t open_flags
