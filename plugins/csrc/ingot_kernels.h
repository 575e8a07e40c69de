/* The GPU kernels of Ingot's operators, as a plain C interface.
 *
 * Every call enqueues its kernels on a stream and returns: it neither allocates, nor waits, nor reads
 * a value from the device. It may be captured into a CUDA graph once ingot_prepare() has run in the
 * CUDA context. A thread without a current context gets the primary one of device 0. Pointers are
 * device pointers, aligned to 16 bytes; tensors are dense and row-major.
 * Letters and meanings are those of docs/design.md.
 */
#ifndef INGOT_KERNELS_H
#define INGOT_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define INGOT_KERNELS_VERSION 2

typedef enum ingot_status {
    INGOT_OK = 0,
    INGOT_BAD_ARGUMENT = 1,   /* a size, dtype or pointer that the operator refuses */
    INGOT_NO_DRIVER = 2,      /* libcuda.so.1 is missing or has no device */
    INGOT_NO_KERNEL = 3,      /* no compiled kernel for this device's compute capability */
    INGOT_DRIVER_ERROR = 4    /* the CUDA driver refused a call */
} ingot_status;

typedef enum ingot_dtype { INGOT_FLOAT32 = 0, INGOT_FLOAT16 = 1, INGOT_BFLOAT16 = 2 } ingot_dtype;

typedef enum ingot_activation {
    INGOT_SILU = 0,
    INGOT_GELU = 1,      /* with erf */
    INGOT_GELU_TANH = 2,
    INGOT_RELU = 3,
    INGOT_IDENTITY = 4
} ingot_activation;

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* Version of this interface that the library was built with. */
int ingot_kernels_version(void);

/* What the kernels were compiled by, and the first driver that loads them: one line, such as
 * "triton 3.9.0; 8.0 ptxas 12.9.86 driver R525; 12.0 ptxas 13.4.59 driver R580". Never NULL; needs no
 * driver. */
const char *ingot_kernels_build(void);

/* What the last failed call of this thread met, one sentence; never NULL. */
const char *ingot_last_error(void);

/* Load every kernel into the current CUDA context; later calls do nothing. Called by the operators
 * themselves at need, but not possible while a stream is being captured. */
ingot_status ingot_prepare(void);

/* Use another driver library than libcuda.so.1; before any other call. For tests. */
ingot_status ingot_use_driver(const char *path);

/* ingot::MoeDispatch. x [N,H] and y [N,H], gate_up [E,2I,H] and down [E,H,I] in dtype; router_logits
 * [N,E] float32. N may be 0. */
typedef struct ingot_moe_dispatch_params {
    ingot_dtype dtype;
    ingot_activation activation;
    int32_t normalize;
    int32_t top_k, experts;
    int32_t tokens, hidden, intermediate;
    const void *x;
    const float *router_logits;
    const void *gate_up;
    const void *down;
    void *y;
} ingot_moe_dispatch_params;

/* Bytes of workspace for a call of these sizes or of fewer tokens (or rows), on any device; refused
 * like the call itself. Pointers are not read. */
ingot_status ingot_moe_dispatch_workspace(const ingot_moe_dispatch_params *params, size_t *bytes);

/* Refuses a workspace smaller than this call needs, as do the calls below. */
ingot_status ingot_moe_dispatch(const ingot_moe_dispatch_params *params, void *workspace,
                                size_t workspace_bytes, void *stream);

/* ingot::MoeLinear. x [N,Kin], or [N,K,Kin] with per_choice; expert_ids [N,K] int64; weight
 * [E,O,Kin]; y [N,K,O]. An id outside [0, E) gives a row of zeros. */
typedef struct ingot_moe_linear_params {
    ingot_dtype dtype;
    int32_t per_choice;
    int32_t top_k, experts;
    int32_t tokens, in_features, out_features;
    const void *x;
    const int64_t *expert_ids;
    const void *weight;
    void *y;
} ingot_moe_linear_params;

ingot_status ingot_moe_linear_workspace(const ingot_moe_linear_params *params, size_t *bytes);
ingot_status ingot_moe_linear(const ingot_moe_linear_params *params, void *workspace,
                              size_t workspace_bytes, void *stream);

/* ingot::Mamba2Scan. x [B,T,Hm,Pm], dt [B,T,Hm], b and c [B,T,G,Ns], mask [B,T] and y [B,T,Hm,Pm] in
 * dtype; a, d, dt_bias [Hm] and state, new_state [B,Hm,Pm,Ns] float32. new_state may be state. */
typedef struct ingot_mamba2_scan_params {
    ingot_dtype dtype;
    int32_t batch, tokens, heads, head_size, groups, states;
    float dt_min, dt_max;
    const void *x, *dt;
    const float *a;
    const void *b, *c;
    const float *d, *dt_bias;
    const float *state;
    const void *mask;
    void *y;
    float *new_state;
} ingot_mamba2_scan_params;

ingot_status ingot_mamba2_scan_workspace(const ingot_mamba2_scan_params *params, size_t *bytes);
ingot_status ingot_mamba2_scan(const ingot_mamba2_scan_params *params, void *workspace,
                               size_t workspace_bytes, void *stream);

/* ingot::CausalConv. x [B,T,C] and y [B,T,C], state and new_state [B,C,W-1], weight [C,1,W], bias [C]
 * or NULL, all in dtype. y = activation(conv(state ++ x) + bias); new_state is the last W-1 columns
 * of state ++ x, and may not be state unless T is 1. */
typedef struct ingot_causal_conv_params {
    ingot_dtype dtype;
    ingot_activation activation;
    int32_t batch, tokens, channels, width;
    const void *x, *state, *weight, *bias;
    void *y, *new_state;
} ingot_causal_conv_params;

ingot_status ingot_causal_conv(const ingot_causal_conv_params *params, void *stream);

typedef struct ingot_tuning {
    int32_t tile_rows, tile_columns;  /* of the grouped products in 16 bits; 0: the table's */
    const char *tile_variant;         /* "_" and this end the names of their forms (gate_up, down,
                                         linear); NULL or "": nothing does */
    int32_t chunk;                    /* tokens of a scan's chunk in 16 bits; 0: the table's */
    const char *scan_variant;         /* the same for the 16-bit forms mamba2_states_*, _outputs_* */
    int32_t slice_tokens;             /* most tokens MoeDispatch takes at once; 0: 8192 */
    int64_t scan_bytes;               /* workspace from which a scan is cut; 0: 512 MiB */
} ingot_tuning;

/* Candidates in place of the built-in choices, for benchmarks and tests; NULL goes back. They count
 * for the workspace too. Not while calls are made. */
ingot_status ingot_tune(const ingot_tuning *tuning);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

#endif
