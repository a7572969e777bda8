// Reads memory from start to end with some threads, and prints the bytes a second of each pass.
//
//   read_bandwidth THREADS BYTES PASSES
//
// Each thread sums a part of its own, in several places of it at once: what one stream of reads
// leaves of the memory's bandwidth, others take.

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef uint64_t vector __attribute__((vector_size(64)));

enum { PLACES = 4, STEP = 4 };  // STEP vectors of a place in turn: a few cache lines

struct part {
    const vector *data;
    size_t vectors;
    uint64_t sum;
};

static pthread_barrier_t barrier;
static int passes;

static uint64_t read_part(const struct part *part) {
    vector sums[STEP] = {0};
    const size_t stride = part->vectors / PLACES;
    for (size_t i = 0; i < stride; i += STEP)
        for (size_t place = 0; place < PLACES; place++)
            for (size_t j = 0; j < STEP; j++) sums[j] += part->data[place * stride + i + j];
    uint64_t sum = 0;
    for (size_t j = 0; j < STEP; j++)
        for (size_t k = 0; k < sizeof(vector) / sizeof(uint64_t); k++) sum += sums[j][k];
    return sum;
}

static void *run(void *argument) {
    struct part *part = argument;
    for (int pass = 0; pass < passes; pass++) {
        pthread_barrier_wait(&barrier);
        part->sum += read_part(part);
        pthread_barrier_wait(&barrier);
    }
    return NULL;
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const int threads = atoi(argv[1]);
    const size_t unit = sizeof(vector) * STEP * PLACES;
    const size_t bytes = strtoull(argv[2], NULL, 10) / threads / unit * unit;
    passes = atoi(argv[3]);
    struct part *parts = calloc(threads, sizeof *parts);
    pthread_t *handles = calloc(threads, sizeof *handles);
    pthread_barrier_init(&barrier, NULL, threads + 1);
    for (int i = 0; i < threads; i++) {
        void *data =
            mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) return 1;
        madvise(data, bytes, MADV_HUGEPAGE);
        memset(data, i + 1, bytes);
        parts[i].data = data;
        parts[i].vectors = bytes / sizeof(vector);
        pthread_create(&handles[i], NULL, run, &parts[i]);
    }
    for (int pass = 0; pass < passes; pass++) {
        const double start = now();
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
        printf("%.0f\n", threads * bytes / (now() - start));
    }
    uint64_t sum = 0;
    for (int i = 0; i < threads; i++) {
        pthread_join(handles[i], NULL);
        sum += parts[i].sum;
    }
    return sum == 0;  // so that the reading is not left out
}
