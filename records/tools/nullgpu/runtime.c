/* The runtime API (libcudart): the card's properties, memory, copies, streams, events, launches of
 * compiled-in kernels. */
#include "nullgpu.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>

/* ------------------------------------------------------------------------------------- the card */

Card card;
static __thread int current;
static __thread cudaError_t last_error;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

/* The defaults are an H100's, so that a program started by hand under the library sees a card, too.
 */
__attribute__((constructor)) static void read_settings(void) {
    const char *name = getenv("NULLGPU_NAME");
    card = (Card){
        .name = name ? name : "NVIDIA H100 80GB HBM3",
        .count = setting("NULLGPU_COUNT", 1),
        .compute = setting("NULLGPU_COMPUTE", 90),
        .multiprocessors = setting("NULLGPU_MULTIPROCESSORS", 132),
        .threads_per_sm = setting("NULLGPU_THREADS_PER_SM", 2048),
        .shared_per_sm = setting("NULLGPU_SHARED_PER_SM", 233472),
        .shared_per_block = setting("NULLGPU_SHARED_PER_BLOCK", 232448),
        .l2 = setting("NULLGPU_L2", 50 << 20),
        .clock = setting("NULLGPU_CLOCK", 1980000),
        .memory_clock = setting("NULLGPU_MEMORY_CLOCK", 2619000),
        .bus_width = setting("NULLGPU_BUS_WIDTH", 5120),
        .memory = setting("NULLGPU_MEMORY", 84930000000),
    };
}

static cudaError_t fail(cudaError_t error) {
    return last_error = error;
}
int current_device(void) {
    return current;
}

EXPORT cudaError_t cudaGetDeviceCount(int *n) {
    *n = card.count;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int *device) {
    *device = current;
    return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= card.count) return fail(cudaErrorInvalidDevice);
    current = device;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_REPORTED;
    return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDA_VERSION_REPORTED;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) {
    *can = 1;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaPeekAtLastError(void) {
    return last_error;
}
EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        default: return "an error of the stand-in device";
    }
}
EXPORT const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        default: return "cudaErrorUnknown";
    }
}

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", card.name);
    memset(p->uuid.bytes, device + 1, sizeof p->uuid.bytes);
    p->totalGlobalMem = card.memory;
    p->major = card.compute / 10;
    p->minor = card.compute % 10;
    p->multiProcessorCount = card.multiprocessors;
    p->l2CacheSize = card.l2;
    p->memoryBusWidth = card.bus_width;
    p->warpSize = 32;
    p->maxThreadsPerBlock = THREADS_PER_BLOCK;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_PER_BLOCK;
    p->maxThreadsDim[2] = BLOCK_DEPTH;
    p->maxGridSize[0] = INT32_MAX;
    p->maxGridSize[1] = p->maxGridSize[2] = GRID_DEPTH;
    p->maxThreadsPerMultiProcessor = card.threads_per_sm;
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
    p->sharedMemPerBlock = SHARED_STATIC;
    p->sharedMemPerBlockOptin = card.shared_per_block;
    p->sharedMemPerMultiprocessor = card.shared_per_sm;
    p->reservedSharedMemPerBlock = 1024;
    p->totalConstMem = 65536;
    p->memPitch = INT32_MAX;
    p->textureAlignment = 512;
    p->texturePitchAlignment = 32;
    p->pciBusID = device + 1;
    p->asyncEngineCount = 3;
    p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->managedMemory = 1;
    p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
    p->cooperativeLaunch = p->memoryPoolsSupported = 1;
    p->clusterLaunch = card.compute >= 90;
    return cudaSuccess;
}

/* cudaDeviceAttr and CUdevice_attribute have the same numbers. What is not here (multicast, fabric)
 * the card lacks. */
int device_attribute(int attribute, int device) {
    switch (attribute) {
        case cudaDevAttrMaxThreadsPerBlock:
        case cudaDevAttrMaxBlockDimX:
        case cudaDevAttrMaxBlockDimY: return THREADS_PER_BLOCK;
        case cudaDevAttrMaxBlockDimZ: return BLOCK_DEPTH;
        case cudaDevAttrMaxGridDimX: return INT32_MAX;
        case cudaDevAttrMaxGridDimY:
        case cudaDevAttrMaxGridDimZ: return GRID_DEPTH;
        case cudaDevAttrMaxSharedMemoryPerBlock: return SHARED_STATIC;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return card.shared_per_block;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return card.shared_per_sm;
        case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
        case cudaDevAttrMaxRegistersPerBlock:
        case cudaDevAttrMaxRegistersPerMultiprocessor: return REGISTERS;
        case cudaDevAttrTotalConstantMemory: return 65536;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrClockRate: return card.clock;
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return card.memory_clock;
        case cudaDevAttrGlobalMemoryBusWidth: return card.bus_width;
        case cudaDevAttrL2CacheSize: return card.l2;
        case cudaDevAttrMultiProcessorCount: return card.multiprocessors;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return card.threads_per_sm;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrComputeCapabilityMajor: return card.compute / 10;
        case cudaDevAttrComputeCapabilityMinor: return card.compute % 10;
        case cudaDevAttrPciBusId: return device + 1;
        case cudaDevAttrAsyncEngineCount: return 3;
        case cudaDevAttrUnifiedAddressing:
        case cudaDevAttrConcurrentKernels:
        case cudaDevAttrCanMapHostMemory:
        case cudaDevAttrCooperativeLaunch:
        case cudaDevAttrStreamPrioritiesSupported:
        case cudaDevAttrManagedMemory:
        case cudaDevAttrMemoryPoolsSupported: return 1;
        default: return 0;
    }
}
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = device_attribute(attribute, device);
    return cudaSuccess;
}

/* --------------------------------------------------------------------------------------- memory */

typedef struct {
    char *at;
    u64 size;
    int type; /* cudaMemoryTypeHost or cudaMemoryTypeDevice */
    int device;
} Piece;

static const u64 CONTEXT = 500ull << 20; /* what CUDA itself takes of a real card, about */
static const u64 LARGE =
    256ull << 20; /* copies on the device from this size on would only touch pages */
static Piece *pieces;
static int n_pieces, room_for_pieces;
static u64 used, most_used; /* bytes of device memory */

static Piece *find(const void *address) {
    for (int i = n_pieces - 1; i >= 0; i--)
        if ((char *)address >= pieces[i].at && (char *)address < pieces[i].at + pieces[i].size)
            return pieces + i;
    return NULL;
}

static void remember(void *at, u64 size, int type) {
    if (n_pieces == room_for_pieces) {
        room_for_pieces = 2 * room_for_pieces + 1024;
        pieces = realloc(pieces, room_for_pieces * sizeof *pieces);
    }
    pieces[n_pieces++] = (Piece){at, size, type, current};
}

EXPORT cudaError_t cudaMalloc(void **address, size_t asked) {
    u64 size = asked ? (asked + 511) & ~511ull : 512;
    cudaError_t error = cudaSuccess;
    pthread_mutex_lock(&lock);
    if (used + size + CONTEXT > card.memory) {
        count_locked("memory refused", size);
        error = cudaErrorMemoryAllocation;
    } else {
        *address = mmap(NULL, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (*address == MAP_FAILED) {
            fprintf(stderr,
                    "nullgpu: this machine refuses %llu bytes of address space (ulimit -v, "
                    "vm.overcommit_memory)\n",
                    size);
            count_locked("address space refused", size);
            error = cudaErrorMemoryAllocation;
        } else {
            remember(*address, size, cudaMemoryTypeDevice);
            used += size;
            if (used > most_used) most_used = used;
            count_locked("memory taken", size);
        }
    }
    pthread_mutex_unlock(&lock);
    return error ? fail(error) : cudaSuccess;
}
EXPORT cudaError_t cudaFree(void *address) {
    pthread_mutex_lock(&lock);
    Piece *found = address ? find(address) : NULL;
    if (found) {
        used -= found->size;
        count_locked("memory given back", found->size);
        munmap(found->at, found->size);
        *found = pieces[--n_pieces];
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t stream) {
    return cudaMalloc(address, size);
}
EXPORT cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
    return cudaFree(address);
}
EXPORT cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    if (posix_memalign(address, 4096, size ? size : 1)) return fail(cudaErrorMemoryAllocation);
    pthread_mutex_lock(&lock);
    remember(*address, size, cudaMemoryTypeHost);
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void *address) {
    pthread_mutex_lock(&lock);
    Piece *found = address ? find(address) : NULL;
    if (found) {
        free(found->at);
        *found = pieces[--n_pieces];
    }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}
/* For observe.py: the most that was held at once. */
EXPORT u64 nullgpu_peak_memory(void) {
    return most_used;
}
EXPORT cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = card.memory;
    *available = card.memory > used + CONTEXT ? card.memory - used - CONTEXT : 0;
    return cudaSuccess;
}

int describe_address(const void *address, int *device) {
    Piece *found = find(address);
    *device = found ? found->device : -2;
    return found ? found->type : cudaMemoryTypeUnregistered;
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                            const void *address) {
    memset(attributes, 0, sizeof *attributes);
    pthread_mutex_lock(&lock);
    attributes->type = describe_address(address, &attributes->device);
    pthread_mutex_unlock(&lock);
    if (attributes->type != cudaMemoryTypeUnregistered)
        attributes->devicePointer = attributes->hostPointer = (void *)address;
    return cudaSuccess;
}

/* --------------------------------------------------------------------------------------- copies */

const char *name_of_place(const void *address) {
    Piece *found = find(address);
    if (!found) return "pageable";
    return found->type == cudaMemoryTypeHost ? "pinned" : "device";
}

static void copy(void *to, const void *from, size_t size) {
    char line[64];
    pthread_mutex_lock(&lock);
    int from_device = !strcmp(name_of_place(from), "device");
    int to_device = !strcmp(name_of_place(to), "device");
    snprintf(line, sizeof line, "copy %s -> %s", name_of_place(from), name_of_place(to));
    count_locked(line, size);
    pthread_mutex_unlock(&lock);
    if (from_device && !to_device && size <= 16)
        memset(to, 0, size); /* a scalar (.item()) was computed: zero, always */
    else if (!from_device || !to_device || size < LARGE)
        memmove(to, from, size);
}
EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    copy(to, from, size);
    waited("wait for a copy");
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size,
                                   enum cudaMemcpyKind kind, cudaStream_t stream) {
    copy(to, from, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void *to, int b, const void *from, int a, size_t size,
                                       cudaStream_t stream) {
    copy(to, from, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                     size_t width, size_t height, enum cudaMemcpyKind kind,
                                     cudaStream_t stream) {
    for (size_t row = 0; row < height; row++)
        copy((char *)to + row * to_pitch, (char *)from + row * from_pitch, width);
    return cudaSuccess;
}

/* Zeros in whole pages: the pages are given back, to be read as zero, instead of being written. */
static void fill(char *start, int value, size_t size) {
    const uintptr_t page = 4096;
    char *first = (char *)(((uintptr_t)start + page - 1) & ~(page - 1));
    char *last = (char *)((uintptr_t)(start + size) & ~(page - 1));
    if (value || size < (1 << 20)) {
        memset(start, value, size);
        return;
    }
    memset(start, 0, first - start);
    madvise(first, last - first, MADV_DONTNEED);
    memset(last, 0, start + size - last);
}
EXPORT cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
    count("fill device", size);
    fill(address, value, size);
    return cudaSuccess;
}
EXPORT cudaError_t cudaMemset(void *address, int value, size_t size) {
    return cudaMemsetAsync(address, value, size, NULL);
}

/* --------------------------------------------------------------------------- streams and events */

typedef struct {
    char room[64];
} Handle; /* what a handle points to is never looked at */

static cudaError_t new_handle(void **handle) {
    *handle = calloc(1, sizeof(Handle));
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return new_handle((void **)stream);
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return new_handle((void **)stream);
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags,
                                                int priority) {
    return new_handle((void **)stream);
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                         enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
                                            enum cudaStreamCaptureStatus *status, u64 *id,
                                            cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *n) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

typedef struct {
    u64 issued;
} Event; /* kernels that were queued when it was recorded */

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(Event));
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ((Event *)event)->issued = issued();
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                            unsigned flags) {
    return cudaEventRecord(event, stream);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
/* All candidates of an autotuning take the same time: the first one is chosen. */
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = 0.02f;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceSynchronize(void) {
    waited("wait for the device");
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    waited("wait for a stream");
    return cudaSuccess;
}
/* A wait with other kernels queued behind the event leaves the device busy, so it costs nothing. */
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (((Event *)event)->issued == issued()) waited("wait for an event");
    else
        count("late wait for an event", 0);
    return cudaSuccess;
}

/* ------------------------------------------------------------------------------------- launches */

typedef struct {
    const void *host; /* the function that stands for the kernel on the host */
    const char *name; /* mangled */
} Kernel;

static Kernel *kernels;
static int n_kernels, room_for_kernels, n_sorted;
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed; /* of kernel<<<...>>>(...) */

EXPORT void **__cudaRegisterFatBinary(void *image) {
    static void *handle[4];
    return handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **handle) {}
EXPORT void __cudaUnregisterFatBinary(void **handle) {}
EXPORT char __cudaInitModule(void **handle) {
    return 0;
}
EXPORT void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int a,
                              size_t b, int c, int d) {}
EXPORT void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name,
                                   int limit, void *a, void *b, void *c, void *d, int *e) {
    if (n_kernels == room_for_kernels) {
        room_for_kernels = 2 * room_for_kernels + 4096;
        kernels = realloc(kernels, room_for_kernels * sizeof *kernels);
    }
    kernels[n_kernels++] = (Kernel){host, name};
}

static int by_host(const void *left, const void *right) {
    uintptr_t a = (uintptr_t)((Kernel *)left)->host;
    uintptr_t b = (uintptr_t)((Kernel *)right)->host;
    return a < b ? -1 : a > b;
}
static const char *name_of(const void *host) {
    pthread_mutex_lock(&lock);
    if (n_sorted != n_kernels) {
        qsort(kernels, n_kernels, sizeof *kernels, by_host);
        n_sorted = n_kernels;
    }
    Kernel key = {host, NULL};
    Kernel *found = bsearch(&key, kernels, n_kernels, sizeof *kernels, by_host);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "unknown";
}

/* Counts a launch, or refuses it as the card would. elements: what an element-wise kernel works on,
 * -1: not known. */
cudaError_t check_launch(const char *kernel, dim3 grid, dim3 block, size_t shared,
                         double elements) {
    char line[4096];
    u64 threads = (u64)block.x * block.y * block.z;
    u64 blocks = (u64)grid.x * grid.y * grid.z;
    int refused = !blocks || grid.x > INT32_MAX || grid.y > GRID_DEPTH || grid.z > GRID_DEPTH ||
                  !threads || threads > THREADS_PER_BLOCK || block.z > BLOCK_DEPTH ||
                  shared > (size_t)card.shared_per_block;
    if (refused) {
        snprintf(line, sizeof line, "refused launch %s grid %u,%u,%u block %u,%u,%u shared %zu",
                 kernel, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
        fprintf(stderr, "nullgpu: %s\n", line);
        count(line, 0);
        return fail(cudaErrorInvalidConfiguration);
    }
    issue();
    snprintf(line, sizeof line, "kernel %s grid %u,%u,%u%s", kernel, grid.x, grid.y, grid.z,
             elements < 0 ? "" : " elements");
    count(line, elements < 0 ? blocks : elements);
    return cudaSuccess;
}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared,
                                              void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(void **)stream = pushed.stream;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream) {
    const char *name = name_of(host);
    /* All of PyTorch's element-wise kernels have the number of elements, an int, as their first
     * parameter. */
    int elementwise = strstr(name, "elementwise_kernel") && arguments && arguments[0];
    return check_launch(name, grid, block, shared, elementwise ? *(int *)arguments[0] : -1);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                                      size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *launch, const void *host,
                                       void **arguments) {
    return cudaLaunchKernel(host, launch->gridDim, launch->blockDim, arguments,
                            launch->dynamicSmemBytes, launch->stream);
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *host) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = THREADS_PER_BLOCK;
    attributes->maxDynamicSharedSizeBytes = SHARED_STATIC;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = card.compute;
    return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *host, int threads, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char room[1 << 20];
    *address = room;
    return cudaSuccess;
}

static u64 nothing(void) {
    return 0;
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                    unsigned version, u64 flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) *function = nothing;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
