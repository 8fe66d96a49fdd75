/* A FUSE server without a disk behind it: the limit that FUSE itself sets on this machine.
 *
 * null_server DEVICE BYTES THREADS [IMAGE]: DEVICE is the descriptor of a mount on a regular file. Reads are answered
 * with what the buffer holds, writes are swallowed; requests are read and answered as in fusedisk. With
 * IMAGE both go to that file, one write at a time, and nothing else is done: the limit with an image.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define HEAD 80
#define MAX_WRITE (1 << 20)
#define PARALLEL_DIRECT_WRITES (1 << 6)

static int device;
static unsigned long long bytes;
static int image = -1;
static pthread_mutex_t writing = PTHREAD_ADAPTIVE_MUTEX_INITIALIZER_NP;

static void answer(const struct fuse_in_header *request, int error, const void *payload, size_t length)
{
    struct fuse_out_header header = {sizeof header + (error ? 0 : length), error, request->unique};
    struct iovec parts[2] = {{&header, sizeof header}, {(void *)payload, length}};
    ssize_t done = writev(device, parts, error || !length ? 1 : 2);
    (void)done;
}

/* Bytes moved, or a negative errno. */
static long long move(int opcode, char *body, size_t length, off_t at)
{
    ssize_t done = length;
    if (image >= 0 && opcode == FUSE_READ)
        done = pread(image, body, length, at);
    if (image >= 0 && opcode == FUSE_WRITE) {
        pthread_mutex_lock(&writing);
        done = pwrite(image, body, length, at);
        pthread_mutex_unlock(&writing);
    }
    return done < 0 ? -errno : done;
}

static void fill(struct fuse_attr *attributes)
{
    memset(attributes, 0, sizeof *attributes);
    attributes->ino = FUSE_ROOT_ID;
    attributes->size = bytes;
    attributes->blocks = bytes / 512;
    attributes->mode = S_IFREG | 0600;
    attributes->nlink = 1;
    attributes->blksize = 4096;
    attributes->uid = getuid();
    attributes->gid = getgid();
}

static void init(const struct fuse_in_header *request, const struct fuse_init_in *asked)
{
    struct fuse_init_out agreed = {.major = FUSE_KERNEL_VERSION, .minor = FUSE_KERNEL_MINOR_VERSION};
    agreed.max_readahead = asked->max_readahead;
    agreed.flags = asked->flags & (FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_MAX_PAGES | FUSE_ASYNC_DIO);
    agreed.max_write = MAX_WRITE;
    agreed.max_pages = MAX_WRITE / 4096;
    agreed.max_background = 256;
    agreed.congestion_threshold = 192;
    agreed.time_gran = 1;
    answer(request, 0, &agreed, sizeof agreed);
}

static void serve_one(const char *head, char *body, size_t n)
{
    const struct fuse_in_header *request = (const struct fuse_in_header *)head;
    if (n < sizeof *request)
        return;
    switch (request->opcode) {
    case FUSE_READ: {
        const struct fuse_read_in *asked = (const struct fuse_read_in *)(request + 1);
        unsigned long long left = asked->offset < bytes ? bytes - asked->offset : 0;
        long long done = move(FUSE_READ, body, asked->size < left ? asked->size : left, asked->offset);
        answer(request, done < 0 ? done : 0, body, done);
        return;
    }
    case FUSE_WRITE: {
        const struct fuse_write_in *asked = (const struct fuse_write_in *)(request + 1);
        long long written = move(FUSE_WRITE, body, asked->size, asked->offset);
        struct fuse_write_out done = {written, 0};
        answer(request, written < 0 ? written : 0, &done, sizeof done);
        return;
    }
    case FUSE_INIT:
        init(request, (const struct fuse_init_in *)(request + 1));
        return;
    case FUSE_GETATTR: {
        struct fuse_attr_out out = {.attr_valid = 3600};
        fill(&out.attr);
        answer(request, 0, &out, sizeof out);
        return;
    }
    case FUSE_OPEN: {
        struct fuse_open_out out = {.fh = 1, .open_flags = FOPEN_DIRECT_IO | PARALLEL_DIRECT_WRITES};
        answer(request, 0, &out, sizeof out);
        return;
    }
    case FUSE_STATFS: {
        struct fuse_statfs_out out = {.st = {.bsize = 4096, .frsize = 4096, .namelen = 255}};
        answer(request, 0, &out, sizeof out);
        return;
    }
    case FUSE_FSYNC:
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_SETATTR:
    case FUSE_ACCESS:
        if (request->opcode == FUSE_SETATTR)
            answer(request, -EPERM, NULL, 0);
        else
            answer(request, 0, NULL, 0);
        return;
    case FUSE_FORGET:
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
        return;
    default:
        answer(request, -ENOSYS, NULL, 0);
    }
}

static void *serve(void *nothing)
{
    char *body, head[HEAD];
    if (posix_memalign((void **)&body, 4096, MAX_WRITE))
        abort();
    memset(body, 0, MAX_WRITE);
    for (;;) {
        struct iovec parts[2] = {{head, sizeof head}, {body, MAX_WRITE}};
        ssize_t n = readv(device, parts, 2);
        if (n >= 0)
            serve_one(head, body, n);
        else if (errno != EINTR && errno != EAGAIN && errno != ENOENT)
            return nothing;
    }
}

int main(int count, char **words)
{
    pthread_t other;
    if (count != 4 && (count != 5 || (image = open(words[4], O_RDWR)) < 0))
        return 2;
    device = atoi(words[1]);
    bytes = strtoull(words[2], NULL, 10);
    for (int i = 1; i < atoi(words[3]); i++)
        pthread_create(&other, NULL, serve, NULL);
    serve(NULL);
    return 0;
}
