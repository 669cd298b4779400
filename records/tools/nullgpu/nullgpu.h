/* A CUDA device that computes nothing.
 *
 * One library stands in for libcuda, libcudart, cuBLAS, cuSOLVER, cuDNN and NCCL, and the CUDA
 * build of PyTorch runs on it unchanged: Dynamo, Inductor, Triton with ptxas, the caching
 * allocator, streams, pinned copies, NCCL's process group. "Device" memory is address space of the
 * host that nobody touches unless something is copied into it. Launches are checked against the
 * limits of the card, counted, and do nothing. So whatever kernels write reads as zero, and every
 * error is the program's own: an invalid launch, a kernel that does not load, memory that does not
 * fit.
 *
 *   counts.c     what was asked of the device, counted by name
 *   runtime.c    the runtime API: memory, copies, streams, the launches of PyTorch's own kernels
 *   driver.c     the driver API: Triton's kernels, loaded from their cubins
 *   libraries.c  cuBLAS, cuSOLVER, cuDNN, NCCL
 *
 * Every other function that PyTorch's libraries want gets an empty body that returns 0
 * (environment.py makes those). The card is described by environment variables NULLGPU_*, set by
 * preflight.py from the table in cards.py. */
#ifndef NULLGPU_H
#define NULLGPU_H

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The headers rename these to versioned symbols; PyTorch's libraries want both. */
#undef cudaGetDeviceProperties
#undef cudaEventElapsedTime
#undef cudaStreamGetCaptureInfo

#define EXPORT __attribute__((visibility("default")))

typedef unsigned long long u64;

/* Properties of the card, from the environment. */
typedef struct {
    const char *name;
    int count;   /* cards */
    int compute; /* compute capability: 90 for 9.0 */
    int multiprocessors;
    int threads_per_sm;
    int shared_per_sm;       /* bytes */
    int shared_per_block;    /* bytes, the most that a kernel may ask for */
    int l2;                  /* bytes */
    int clock, memory_clock; /* kHz */
    int bus_width;           /* bits */
    u64 memory;              /* bytes */
} Card;
extern Card card;

enum {
    THREADS_PER_BLOCK = 1024,
    BLOCK_DEPTH = 64,
    GRID_DEPTH = 65535,
    REGISTERS = 65536,
    SHARED_STATIC = 49152
};
enum { CUDA_VERSION_REPORTED = 13000 };

/* counts.c */
extern pthread_mutex_t lock;                        /* of all tables of the stand-in */
void count_locked(const char *name, double amount); /* the caller holds the lock */
void count(const char *name, double amount);
void issue(void);              /* one more kernel is queued on the device */
u64 issued(void);              /* kernels so far */
void waited(const char *what); /* the host waits for the device here */

/* runtime.c */
const char *name_of_place(
    const void *address); /* "pageable", "pinned" or "device"; the caller holds the lock */
int describe_address(const void *address,
                     int *device); /* a cudaMemoryType; the caller holds the lock */
int device_attribute(int attribute, int device);
int current_device(void);
cudaError_t check_launch(const char *kernel, dim3 grid, dim3 block, size_t shared, double elements);

#endif
