/* The driver API (libcuda): Triton's kernels, loaded from the cubins that ptxas made, and launched.
 */
#include "nullgpu.h"

#include <elf.h>

typedef struct {
    char *name;
    int registers; /* per thread */
    int local;     /* bytes of local memory per thread: spilled registers, mostly */
    int shared;    /* bytes that the kernel has asked for */
} Function;

enum { ELF_MACHINE_CUDA = 190, ABI_OF_CUDA_13 = 8 };
enum { INFO_WITH_SIZE = 4, INFO_REGISTERS = 0x2f, INFO_STACK = 0x12 }; /* of section .nv.info */

EXPORT CUresult cuInit(unsigned flags) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION_REPORTED;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int *n) {
    *n = card.count;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int index) {
    *device = index;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = device_attribute(attribute, device);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
static CUcontext context_of(int device) {
    return (CUcontext)(uintptr_t)(device + 1);
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = context_of(device);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = context_of(current_device());
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = current_device();
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}
/* Triton's launchers, compiled when they are needed, want these. */
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "refused by the stand-in device";
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = "CUDA_ERROR";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                                      CUdeviceptr address) {
    int device;
    pthread_mutex_lock(&lock);
    int type = describe_address((void *)address, &device);
    pthread_mutex_unlock(&lock);
    int known = type != cudaMemoryTypeUnregistered;
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = address; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = known ? device : 0; break;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *(unsigned *)value =
                type == cudaMemoryTypeDevice ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
            break;
        default: *(int *)value = 0;
    }
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* -------------------------------------------------------------------------------------- modules */

/* A module is a copy of its cubin, an ELF file. */
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    const Elf64_Ehdr *header = image;
    if (memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_machine != ELF_MACHINE_CUDA) {
        fprintf(stderr, "nullgpu: not a cubin\n");
        count("refused cubin", 0);
        return CUDA_ERROR_INVALID_IMAGE;
    }
    int newer = header->e_ident[EI_ABIVERSION] >= ABI_OF_CUDA_13;
    int architecture = header->e_flags >> (newer ? 8 : 0) & 0xff;
    if (architecture != card.compute) {
        fprintf(stderr, "nullgpu: a cubin for sm_%d on a card of sm_%d\n", architecture,
                card.compute);
        count("refused cubin", 0);
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    }
    u64 size = header->e_shoff + (u64)header->e_shnum * header->e_shentsize;
    char *copy = malloc(size);
    memcpy(copy, image, size);
    *module = (CUmodule)copy;
    count("cubin", size);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n,
                                   CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *image = malloc(size + sizeof(Elf64_Ehdr));
    CUresult result = CUDA_ERROR_INVALID_IMAGE;
    if (fread(image, 1, size, file) == (size_t)size && size >= (long)sizeof(Elf64_Ehdr))
        result = cuModuleLoadData(module, image);
    free(image);
    fclose(file);
    return result;
}

/* Registers and stack of the kernel, from the records of .nv.info: format, attribute, size, then
 * symbol and value. */
static void read_info(Function *function, const unsigned char *record, const unsigned char *end) {
    while (record + 4 <= end) {
        unsigned size = record[0] == INFO_WITH_SIZE ? record[2] | record[3] << 8 : 0;
        int value = size >= 8 ? *(int *)(record + 8) : 0;
        if (record[1] == INFO_REGISTERS && value > function->registers) function->registers = value;
        if (record[1] == INFO_STACK && value > function->local) function->local = value;
        record += 4 + size;
    }
}
EXPORT CUresult cuModuleGetFunction(CUfunction *result, CUmodule module, const char *name) {
    char *image = (char *)module;
    char wanted[4096];
    Elf64_Ehdr *header = (Elf64_Ehdr *)image;
    Elf64_Shdr *sections = (Elf64_Shdr *)(image + header->e_shoff);
    char *names = image + sections[header->e_shstrndx].sh_offset;
    Function *function = calloc(1, sizeof *function);
    int found = 0;
    function->name = strdup(name);
    snprintf(wanted, sizeof wanted, ".text.%s", name);
    for (int i = 0; i < header->e_shnum; i++) {
        unsigned char *start = (unsigned char *)image + sections[i].sh_offset;
        if (!strcmp(names + sections[i].sh_name, wanted)) found = 1;
        if (!strcmp(names + sections[i].sh_name, ".nv.info"))
            read_info(function, start, start + sections[i].sh_size);
    }
    if (!found) {
        fprintf(stderr, "nullgpu: no kernel %s in its cubin\n", name);
        return CUDA_ERROR_NOT_FOUND;
    }
    *result = (CUfunction)function;
    return CUDA_SUCCESS;
}

/* ------------------------------------------------------------------------------------ functions */

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction handle) {
    Function *function = (Function *)handle;
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->local; break;
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = THREADS_PER_BLOCK; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    Function *function = (Function *)handle;
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value > card.shared_per_block) {
        fprintf(stderr, "nullgpu: %s wants %d bytes of shared memory, the card has %d\n",
                function->name, value, card.shared_per_block);
        return CUDA_ERROR_INVALID_VALUE;
    }
    function->shared = value;
    return CUDA_SUCCESS;
}

static CUresult refuse_launch(Function *function, const char *why) {
    char line[4096];
    snprintf(line, sizeof line, "refused launch %s: %s", function->name, why);
    fprintf(stderr, "nullgpu: %s\n", line);
    count(line, 0);
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
}
EXPORT CUresult cuLaunchKernel(CUfunction handle, unsigned gx, unsigned gy, unsigned gz,
                               unsigned bx, unsigned by, unsigned bz, unsigned shared,
                               CUstream stream, void **arguments, void **extra) {
    Function *function = (Function *)handle;
    dim3 grid = {gx, gy, gz};
    dim3 block = {bx, by, bz};
    if (shared > SHARED_STATIC && (int)shared > function->shared)
        return refuse_launch(function, "too much shared memory");
    if ((u64)function->registers * bx * by * bz > REGISTERS)
        return refuse_launch(function, "too many registers");
    if (function->local) {
        char line[4096];
        snprintf(line, sizeof line, "spill %s", function->name);
        count(line, function->local);
    }
    return check_launch(function->name, grid, block, shared, -1) ? CUDA_ERROR_INVALID_VALUE
                                                                 : CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction handle, void **arguments,
                                 void **extra) {
    return cuLaunchKernel(handle, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                          c->blockDimZ, c->sharedMemBytes, c->hStream, arguments, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction handle, unsigned gx, unsigned gy, unsigned gz,
                                          unsigned bx, unsigned by, unsigned bz, unsigned shared,
                                          CUstream stream, void **arguments) {
    return cuLaunchKernel(handle, gx, gy, gz, bx, by, bz, shared, stream, arguments, NULL);
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction handle,
                                                            int threads, size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction handle,
                                             const CUlaunchConfig *launch) {
    *clusters = card.multiprocessors / 2;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *properties,
                                              CUmemAllocationGranularity_flags flags) {
    *bytes = 2 << 20;
    return CUDA_SUCCESS;
}
