/* A disk that takes its time: fsync and fdatasync sleep for as many microseconds as the shared file CHAOS_FSYNC says.
 *
 * The file holds one int64 and is read at every call, so a test changes it while the server runs.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile long long *sleep_us;

__attribute__((constructor)) static void look(void) {
    const char *path = getenv("CHAOS_FSYNC");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof *sleep_us, PROT_READ, MAP_SHARED, file, 0);
    if (found != MAP_FAILED) sleep_us = found;
    close(file);
}

static void sleep_as_told(void) {
    long long us = sleep_us ? *sleep_us : 0;
    struct timespec left = {us / 1000000, us % 1000000 * 1000};
    while (us > 0 && nanosleep(&left, &left) != 0) continue;
}

int fsync(int file) {
    sleep_as_told();
    return (int)syscall(SYS_fsync, file);
}

int fdatasync(int file) {
    sleep_as_told();
    return (int)syscall(SYS_fdatasync, file);
}
