/* load DEVICE PROCESSES SECONDS: writes, reads back, trims and flushes, each process in its own part
 * of the device, and ends with an error at the first I/O error or wrong byte. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, BLOCKS_MAX = 4096 };

static void check(int fine, const char *what)
{
    if (!fine) {
        perror(what);
        printf("load error: %s\n", what);
        fflush(stdout);
        _exit(1);
    }
}

static void work(const char *device, int number, int processes, int seconds)
{
    static uint32_t written[BLOCKS_MAX]; /* 0: zeros, else what the block is filled with */
    uint64_t size, part;
    uint32_t *buffer;
    unsigned chance = 12345 + number;
    int fd = open(device, O_RDWR | O_DIRECT);
    check(fd >= 0 && ioctl(fd, BLKGETSIZE64, &size) == 0, "open");
    check(posix_memalign((void **)&buffer, BLOCK, BLOCK) == 0, "memory");
    part = size / processes / BLOCK;
    if (part > BLOCKS_MAX)
        part = BLOCKS_MAX;
    uint64_t first = size / processes * number / BLOCK * BLOCK;
    time_t end = time(NULL) + seconds;
    for (uint32_t round = 1; time(NULL) < end; round++) {
        uint32_t block = rand_r(&chance) % part;
        off_t at = first + (off_t)block * BLOCK;
        switch (rand_r(&chance) % 8) {
        case 0:
            check(fsync(fd) == 0, "flush");
            break;
        case 1: {
            uint64_t range[2] = {at, BLOCK};
            /* What is discarded reads as zeros too: the server makes a hole of it. */
            check(ioctl(fd, rand_r(&chance) % 2 ? BLKZEROOUT : BLKDISCARD, range) == 0, "zero");
            written[block] = 0;
            break;
        }
        case 2: case 3: case 4:
            check(pread(fd, buffer, BLOCK, at) == BLOCK, "read");
            for (int i = 0; i < BLOCK / 4; i++)
                check(buffer[i] == written[block], "another content");
            break;
        default:
            for (int i = 0; i < BLOCK / 4; i++)
                buffer[i] = round;
            check(pwrite(fd, buffer, BLOCK, at) == BLOCK, "write");
            written[block] = round;
        }
    }
    for (uint32_t block = 0; block < part; block++) {
        check(pread(fd, buffer, BLOCK, first + (off_t)block * BLOCK) == BLOCK, "read at the end");
        if (written[block])
            check(buffer[0] == written[block] && buffer[BLOCK / 4 - 1] == written[block],
                  "another content at the end");
    }
    check(fsync(fd) == 0, "flush at the end");
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: load DEVICE PROCESSES SECONDS\n");
        return 2;
    }
    int processes = atoi(argv[2]), failed = 0, status;
    for (int number = 0; number < processes; number++)
        if (fork() == 0)
            work(argv[1], number, processes, atoi(argv[3]));
    while (wait(&status) > 0)
        failed |= status != 0;
    printf(failed ? "load ended badly\n" : "load ended well\n");
    return failed;
}
