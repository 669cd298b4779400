/* NVIDIA's libraries: cuBLAS counts matmuls by shape, NCCL collectives by bytes; cuSOLVER only says
 * yes. */
#include "nullgpu.h"

#include <library_types.h>

static int new_handle(void **handle) {
    *handle = calloc(1, 256);
    return 0;
}

/* --------------------------------------------------------------------------------------- cuBLAS */

static const char *name_of_type(int type) {
    switch (type) {
        case CUDA_R_16BF: return "bf16";
        case CUDA_R_16F: return "fp16";
        case CUDA_R_32F: return "fp32";
        case CUDA_R_64F: return "fp64";
        case CUDA_R_8F_E4M3:
        case CUDA_R_8F_E5M2: return "fp8";
        default: return "other";
    }
}
/* C[m, n] += A[m, k] B[k, n], `batch` times. */
static int matmul(long m, long n, long k, long batch, int type) {
    char line[128];
    issue();
    snprintf(line, sizeof line, "matmul %s m=%ld n=%ld k=%ld batch=%ld", name_of_type(type), m, n,
             k, batch);
    count(line, 2.0 * m * n * k * batch);
    return 0;
}

EXPORT int cublasCreate_v2(void **handle) {
    return new_handle(handle);
}
EXPORT int cublasGetMathMode(void *handle, int *mode) {
    *mode = 0;
    return 0;
}
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) {
    *mode = 0;
    return 0;
}
EXPORT int cublasSgemm_v2(void *handle, int ta, int tb, int m, int n, int k) {
    return matmul(m, n, k, 1, CUDA_R_32F);
}
EXPORT int cublasDgemm_v2(void *handle, int ta, int tb, int m, int n, int k) {
    return matmul(m, n, k, 1, CUDA_R_64F);
}
EXPORT int cublasGemmEx(void *handle, int ta, int tb, int m, int n, int k, const void *alpha,
                        const void *a, int type) {
    return matmul(m, n, k, 1, type);
}
EXPORT int cublasGemmStridedBatchedEx(void *handle, int ta, int tb, int m, int n, int k,
                                      const void *alpha, const void *a, int type, int lda,
                                      long long stride_a, const void *b, int type_b, int ldb,
                                      long long stride_b, const void *beta, void *c, int type_c,
                                      int ldc, long long stride_c, int batch) {
    return matmul(m, n, k, batch, type);
}
EXPORT int cublasSgemmStridedBatched(void *handle, int ta, int tb, int m, int n, int k,
                                     const void *alpha, const void *a, int lda, long long stride_a,
                                     const void *b, int ldb, long long stride_b, const void *beta,
                                     void *c, int ldc, long long stride_c, int batch) {
    return matmul(m, n, k, batch, CUDA_R_32F);
}

/* cuBLASLt: a matrix's layout, and a matmul's descriptor. */
typedef struct {
    int type, batch;
    u64 rows, columns;
} Layout;
typedef struct {
    int transpose_a, transpose_b;
} Matmul;
enum { LT_DESCRIPTOR_TRANSPOSE_A = 3, LT_DESCRIPTOR_TRANSPOSE_B = 4, LT_LAYOUT_BATCH = 5 };

EXPORT size_t cublasLtGetVersion(void) {
    return 130100;
}
EXPORT int cublasLtMatmulDescCreate(Matmul **matmul, int compute, int scale) {
    *matmul = calloc(1, sizeof **matmul);
    return 0;
}
EXPORT int cublasLtMatmulDescSetAttribute(Matmul *matmul, int attribute, const void *value,
                                          size_t size) {
    if (attribute == LT_DESCRIPTOR_TRANSPOSE_A) matmul->transpose_a = *(int *)value;
    if (attribute == LT_DESCRIPTOR_TRANSPOSE_B) matmul->transpose_b = *(int *)value;
    return 0;
}
EXPORT int cublasLtMatrixLayoutCreate(Layout **layout, int type, u64 rows, u64 columns,
                                      long long stride) {
    *layout = malloc(sizeof **layout);
    **layout = (Layout){type, 1, rows, columns};
    return 0;
}
EXPORT int cublasLtMatrixLayoutSetAttribute(Layout *layout, int attribute, const void *value,
                                            size_t size) {
    if (attribute == LT_LAYOUT_BATCH) layout->batch = *(int *)value;
    return 0;
}
EXPORT int cublasLtMatmulPreferenceCreate(void **preference) {
    return new_handle(preference);
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, Matmul *matmul, Layout *a, Layout *b,
                                          Layout *c, Layout *d, void *preference, int asked,
                                          void *results, int *found) {
    *found = 1;
    return 0;
}
EXPORT int cublasLtMatmul(void *handle, Matmul *operation, const void *alpha, const void *a,
                          Layout *of_a, const void *b, Layout *of_b, const void *beta,
                          const void *c, Layout *of_c, void *d, Layout *of_d) {
    long k = operation->transpose_a ? of_a->rows : of_a->columns;
    return matmul(of_d->rows, of_d->columns, k, of_d->batch, of_a->type);
}

/* ------------------------------------------------------------------------------------- cuSOLVER */

/* Sizes of workspaces, for SVD, QR and symmetric eigenproblems. The results are zeros, always
 * "converged". */
typedef int I;
typedef void *P;
typedef long long L;
#define WORKSPACES(T)                                                                              \
    EXPORT I cusolverDn##T##gesvdj_bufferSize(P h, I j, I e, I m, I n, P A, I la, P S, P U, I lu,  \
                                              P V, I lv, I *work, P p) {                           \
        *work = m * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##gesvd_bufferSize(P h, I m, I n, I *work) {                             \
        *work = m * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##gesvdaStridedBatched_bufferSize(P h, I j, I r, I m, I n, P A, I la,    \
                                                            L sa, P S, L ss, P U, I lu, L su, P V, \
                                                            I lv, L sv, I *work, I b) {            \
        *work = m * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##gesvdjBatched_bufferSize(P h, I j, I m, I n, P A, I la, P S, P U,      \
                                                     I lu, P V, I lv, I *work, P p, I b) {         \
        *work = m * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##geqrf_bufferSize(P h, I m, I n, P A, I la, I *work) {                  \
        *work = m * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##orgqr_bufferSize(P h, I m, I n, I k, P A, I la, P tau, I *work) {      \
        *work = m * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##syevd_bufferSize(P h, I j, I u, I n, P A, I la, P W, I *work) {        \
        *work = n * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##syevj_bufferSize(P h, I j, I u, I n, P A, I la, P W, I *work, P p) {   \
        *work = n * n;                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    EXPORT I cusolverDn##T##syevjBatched_bufferSize(P h, I j, I u, I n, P A, I la, P W, I *work,   \
                                                    P p, I b) {                                    \
        *work = n * n;                                                                             \
        return 0;                                                                                  \
    }
WORKSPACES(S)
WORKSPACES(D)

EXPORT I cusolverDnCreate(P *handle) {
    return new_handle(handle);
}
EXPORT I cusolverDnCreateParams(P *parameters) {
    return new_handle(parameters);
}
EXPORT I cusolverDnCreateGesvdjInfo(P *info) {
    return new_handle(info);
}
EXPORT I cusolverDnCreateSyevjInfo(P *info) {
    return new_handle(info);
}
static I workspace(L elements, size_t *device, size_t *host) {
    *device = elements * 8; /* as if doubles */
    *host = 0;
    return 0;
}
EXPORT I cusolverDnXgeqrf_bufferSize(P h, P p, L m, L n, I ta, P A, L la, I tt, P tau, I compute,
                                     size_t *device, size_t *host) {
    return workspace(m * n, device, host);
}
EXPORT I cusolverDnXsyevd_bufferSize(P h, P p, I j, I u, L n, I ta, P A, L la, I tw, P W, I compute,
                                     size_t *device, size_t *host) {
    return workspace(n * n, device, host);
}
EXPORT I cusolverDnXsyevBatched_bufferSize(P h, P p, I j, I u, L n, I ta, P A, L la, I tw, P W,
                                           I compute, size_t *device, size_t *host, L batch) {
    return workspace(n * n * batch, device, host);
}

/* ---------------------------------------------------------------------------------------- cuDNN */

/* The version decides on attention: from 9.15 on, PyTorch prefers cuDNN's own on sm_90, of which
 * nothing could be seen. */
enum { CUDNN_VERSION_REPORTED = 91000 };

EXPORT int cudnnCreate(void **handle) {
    return new_handle(handle);
}
EXPORT size_t cudnnGetVersion(void) {
    return CUDNN_VERSION_REPORTED;
}
EXPORT size_t cudnnGetCudartVersion(void) {
    return CUDA_VERSION_REPORTED;
}
EXPORT const char *cudnnGetErrorString(int error) {
    return "refused by the stand-in device";
}
EXPORT void cudnnGetLastErrorString(char *text, size_t size) {
    if (size) *text = 0;
}

/* ----------------------------------------------------------------------------------------- NCCL */

/* One process among peers that do not exist: collectives are counted and return at once. */
typedef struct {
    int rank, size;
} Communicator;
typedef struct {
    char bytes[128];
} UniqueId;

static int new_communicator(Communicator **communicator, int rank, int size) {
    *communicator = malloc(sizeof **communicator);
    **communicator = (Communicator){rank, size};
    return 0;
}
EXPORT int ncclGetVersion(int *version) {
    *version = 22907;
    return 0;
}
EXPORT int ncclGetUniqueId(UniqueId *id) {
    memset(id, 7, sizeof *id);
    return 0;
}
EXPORT int ncclCommInitRank(Communicator **communicator, int size, UniqueId id, int rank) {
    return new_communicator(communicator, rank, size);
}
EXPORT int ncclCommInitRankConfig(Communicator **communicator, int size, UniqueId id, int rank,
                                  void *config) {
    return new_communicator(communicator, rank, size);
}
EXPORT int ncclCommInitRankScalable(Communicator **communicator, int size, int rank, int n,
                                    UniqueId *ids, void *config) {
    return new_communicator(communicator, rank, size);
}
EXPORT int ncclCommGetAsyncError(Communicator *communicator, int *error) {
    *error = 0;
    return 0;
}
EXPORT int ncclCommCount(Communicator *communicator, int *size) {
    *size = communicator->size;
    return 0;
}
EXPORT int ncclCommUserRank(Communicator *communicator, int *rank) {
    *rank = communicator->rank;
    return 0;
}
EXPORT const char *ncclGetErrorString(int error) {
    return "refused by the stand-in device";
}
EXPORT const char *ncclGetLastError(Communicator *communicator) {
    return "";
}

static size_t bytes_of(size_t n, int type) {
    static const int width[] = {1, 1, 4, 4, 8, 8,
                                2, 4, 8, 2, 1, 1}; /* in the order of ncclDataType_t */
    return n * (type >= 0 && type < 12 ? width[type] : 1);
}
static int collective(const char *name, size_t bytes) {
    char line[64];
    snprintf(line, sizeof line, "collective %s", name);
    count(line, bytes);
    return 0;
}
EXPORT int ncclAllReduce(const void *from, void *to, size_t n, int type, int operation,
                         Communicator *c, void *stream) {
    return collective("all_reduce", bytes_of(n, type));
}
EXPORT int ncclReduce(const void *from, void *to, size_t n, int type, int operation, int root,
                      Communicator *c, void *stream) {
    return collective("reduce", bytes_of(n, type));
}
EXPORT int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, Communicator *c,
                         void *stream) {
    return collective("broadcast", bytes_of(n, type));
}
EXPORT int ncclAllGather(const void *from, void *to, size_t n, int type, Communicator *c,
                         void *stream) {
    return collective("all_gather", bytes_of(n, type) * c->size);
}
EXPORT int ncclReduceScatter(const void *from, void *to, size_t n, int type, int operation,
                             Communicator *c, void *stream) {
    return collective("reduce_scatter", bytes_of(n, type) * c->size);
}
EXPORT int ncclSend(const void *from, size_t n, int type, int peer, Communicator *c, void *stream) {
    return collective("send", bytes_of(n, type));
}
EXPORT int ncclRecv(void *to, size_t n, int type, int peer, Communicator *c, void *stream) {
    return collective("receive", bytes_of(n, type));
}
