/* The kernels of Ingot's operators for CPUs: a plain C interface.
 *
 * Activations, states and sums are float32. Weights lie in panels of sixteen rows, as panels.h and
 * plugins/cpu/panels.py have them; nothing is copied or repacked, so they may be a mapped file.
 *
 * A call is computed by whatever threads the caller lends, in pieces that do not depend on how many
 * there are; results are equal to the bit for any number of them.
 *
 * Every call returns 0, or 1 where it refuses its arguments; ingot_cpu_last_error says why, in the
 * thread that called.
 */
#ifndef INGOT_CPU_H
#define INGOT_CPU_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define INGOT_CPU_VERSION 1

#if defined(__GNUC__)
#define INGOT_CPU_API __attribute__((visibility("default")))
#else
#define INGOT_CPU_API
#endif

/* What the numbers of a weight are. */
typedef enum {
    INGOT_CPU_FLOAT32 = 0,
    INGOT_CPU_BFLOAT16 = 1,
    INGOT_CPU_INT8 = 2,
    INGOT_CPU_INT4 = 3
} ingot_cpu_numbers;

/* As ingot_activation of ingot_kernels.h. */
typedef enum {
    INGOT_CPU_SILU = 0,
    INGOT_CPU_GELU = 1,
    INGOT_CPU_GELU_TANH = 2,
    INGOT_CPU_RELU = 3,
    INGOT_CPU_IDENTITY = 4
} ingot_cpu_activation;

/* What a product may round its activations to. */
typedef enum {
    INGOT_CPU_EXACT = 0,
    INGOT_CPU_TO_INT8 = 1,     /* with whole numbers, a block at a time */
    INGOT_CPU_TO_BFLOAT16 = 2, /* with bfloat16 */
} ingot_cpu_rounding;

/* How a weight is stored. */
typedef struct {
    int32_t numbers;     /* of ingot_cpu_numbers */
    int32_t block;       /* whole numbers of a row that share a scale: 32, 64 or 128; else 0 */
    int32_t zero_points; /* whether each block has one; else it is the middle of the range */
} ingot_cpu_format;

/* Threads that a caller lends. run() returns when task(data, 0) ... task(data, count - 1) have, in
 * any order and at once as it likes. */
typedef struct {
    void (*run)(void *self, size_t count, void (*task)(void *data, size_t index), void *data);
    void *self;
} ingot_cpu_threads;

/* One of the weights that x is multiplied by: y = residual + scale * (x W^T + bias) */
typedef struct {
    int64_t out_features;  /* O */
    const void *weight;    /* [O, K] in panels */
    const float *bias;     /* [O], or NULL */
    const float *residual; /* [N, O] apart from y, or NULL: then scale is not read */
    float scale;
    float *y;              /* [N, O] */
} ingot_cpu_linear_output;

/* Linear layers that read the same x */
typedef struct {
    ingot_cpu_format format;   /* of all weights */
    int32_t round_activations; /* of ingot_cpu_rounding */
    int32_t count;             /* of outputs */
    int64_t tokens;            /* N */
    int64_t in_features;       /* K */
    const float *x;            /* [N, K] */
    const ingot_cpu_linear_output *outputs;
} ingot_cpu_linear_params;

/* A gated MLP: y = residual + scale * (activation(x G^T) * (x U^T)) D^T */
typedef struct {
    ingot_cpu_format gate_up_format;
    ingot_cpu_format down_format;
    int32_t round_activations;
    int32_t activation;    /* of ingot_cpu_activation */
    int64_t tokens;        /* N */
    int64_t hidden;        /* H */
    int64_t intermediate;  /* I */
    const float *x;        /* [N, H] */
    const void *gate;      /* [I, H] in panels */
    const void *up;        /* [I, H] in panels */
    const void *down;      /* [H, I] in panels */
    const float *residual; /* [N, H] apart from y, or NULL: then scale is not read */
    float scale;
    float *y;              /* [N, H] */
} ingot_cpu_mlp_params;

/* y[n] = W[ids[n]] */
typedef struct {
    ingot_cpu_format format;
    int64_t tokens;       /* N */
    int64_t in_features;  /* K, the length of a row */
    int64_t out_features; /* O, the number of rows */
    const int64_t *ids;   /* [N], each 0 to O - 1, or -O to -1, which count from the end */
    const void *weight;   /* [O, K] in panels */
    float *y;             /* [N, K] */
} ingot_cpu_embedding_params;

/* ingot::MoeDispatch; plugins/moe_dispatch.py has the formula. */
typedef struct {
    ingot_cpu_format gate_up_format;
    ingot_cpu_format down_format;
    int32_t round_activations;
    int32_t activation; /* of ingot_cpu_activation */
    int32_t normalize;  /* whether the chosen weights are divided by their sum */
    int32_t top_k;      /* K, 1 to E */
    int64_t tokens;       /* N */
    int64_t hidden;       /* H */
    int64_t intermediate; /* I */
    int64_t experts;      /* E */
    const float *x;             /* [N, H] */
    const float *router_logits; /* [N, E] */
    const void *gate_up;        /* [E] of [2I, H] in panels, gate's rows first */
    const void *down;           /* [E] of [H, I] in panels */
    float *y;                   /* [N, H] */
} ingot_cpu_moe_dispatch_params;

/* ingot::MoeLinear; plugins/moe_linear.py has the formula. */
typedef struct {
    ingot_cpu_format format;
    int32_t round_activations;
    int32_t per_choice;        /* whether x has a row for each choice */
    int32_t top_k;             /* K */
    int64_t tokens;            /* N */
    int64_t in_features;
    int64_t out_features;      /* O */
    int64_t experts;           /* E */
    const float *x;            /* [N, in_features], per choice [N, K, in_features] */
    const int64_t *expert_ids; /* [N, K], each 0 to E - 1 */
    const void *weight;        /* [E] of [O, in_features] in panels */
    float *y;                  /* [N, K, O] */
} ingot_cpu_moe_linear_params;

/* ingot::Mamba2Scan; plugins/mamba2_scan.py has the formula. A position whose mask is 0 adds nothing
 * to the state; a call of such positions alone changes no bit of it. */
typedef struct {
    int64_t batch;        /* B */
    int64_t tokens;       /* T */
    int64_t heads;        /* Hm */
    int64_t head_size;    /* Pm */
    int64_t groups;       /* G, of which Hm is a multiple */
    int64_t states;       /* Ns */
    int64_t x_stride;     /* numbers from a token to the next, at least Hm*Pm */
    int64_t dt_stride;    /* at least Hm */
    int64_t bc_stride;    /* at least G*Ns */
    float dt_min;
    float dt_max;         /* at least dt_min; may be infinite */
    const float *x;       /* [B, T, Hm, Pm] */
    const float *dt;      /* [B, T, Hm] */
    const float *a;       /* [Hm], negative */
    const float *b;       /* [B, T, G, Ns] */
    const float *c;       /* [B, T, G, Ns] */
    const float *d;       /* [Hm] */
    const float *dt_bias; /* [Hm] */
    const float *state;   /* [B, Hm, Pm, Ns] */
    const float *mask;    /* [B, T] */
    float *y;             /* [B, T, Hm, Pm] */
    float *new_state;     /* [B, Hm, Pm, Ns]; may be state itself */
} ingot_cpu_mamba2_scan_params;

/* ingot::CausalConv; plugins/causal_conv.py has the formula. */
typedef struct {
    int32_t activation;  /* of ingot_cpu_activation */
    int64_t batch;       /* B */
    int64_t tokens;      /* T */
    int64_t channels;    /* C */
    int64_t width;       /* W */
    int64_t x_stride;    /* numbers from a token to the next, at least C */
    const float *x;      /* [B, T, C] */
    const float *mask;   /* [B, T], what x is multiplied by; or NULL */
    const float *state;  /* [B, C, W-1] */
    const float *weight; /* [C, 1, W] */
    const float *bias;   /* [C], or NULL */
    float *y;            /* [B, T, C] */
    float *new_state;    /* [B, C, W-1]; may be state itself */
} ingot_cpu_causal_conv_params;

/* A Mamba2 block between its projections, of the projected [gate, xBC, dt] (I = Hm*Pm, C = I + 2*G*Ns):
 *
 *   xBC   = activation(causal convolution of mask * xBC)
 *   y     = ingot::Mamba2Scan of x, dt, B and C
 *   y     = y * silu(gate), then, of each of `norm_groups`, over its root mean square and times norm
 */
typedef struct {
    int32_t activation;       /* of ingot_cpu_activation, of the convolution */
    int64_t batch;            /* B */
    int64_t tokens;           /* T */
    int64_t heads;            /* Hm */
    int64_t head_size;        /* Pm */
    int64_t groups;           /* G, of which Hm is a multiple */
    int64_t states;           /* Ns */
    int64_t width;            /* W */
    int64_t norm_groups;      /* of which I is a multiple; 0 where nothing is normed */
    float epsilon;            /* of the norm */
    float dt_min;
    float dt_max;             /* at least dt_min; may be infinite */
    const float *projected;   /* [B, T, I + C + Hm] */
    const float *mask;        /* [B, T] */
    const float *conv_state;  /* [B, C, W-1] */
    const float *state;       /* [B, Hm, Pm, Ns] */
    const float *conv_weight; /* [C, 1, W] */
    const float *conv_bias;   /* [C], or NULL */
    const float *a;           /* [Hm], negative */
    const float *d;           /* [Hm] */
    const float *dt_bias;     /* [Hm] */
    const float *norm;        /* [I], or NULL where nothing is normed */
    float *y;                 /* [B, T, I] */
    float *new_conv_state;    /* [B, C, W-1]; may be conv_state itself */
    float *new_state;         /* [B, Hm, Pm, Ns]; may be state itself */
} ingot_cpu_mamba2_mixer_params;

/* Attention of new tokens over a cache of keys and values and over each other:
 *
 *   keys   = past keys, then the new ones, rotated;   values = past values, then the new ones
 *   y[t]   = softmax over the keys that t may see of (scale * rotated query[t] . key) times values
 *
 * Rotated are the first R numbers of a head, in pairs of i and i + R/2: (a, b) becomes
 * (a cos - b sin, b cos + a sin). A token that may see no key is not a number. */
typedef struct {
    int64_t batch;           /* B */
    int64_t tokens;          /* T, the new ones */
    int64_t heads;           /* Hq, of queries; a multiple of Hk */
    int64_t key_heads;       /* Hk, of keys and values */
    int64_t head_size;       /* D */
    int64_t past;            /* P, tokens before these */
    int64_t past_capacity;   /* for which the caches before have room, at least P */
    int64_t capacity;        /* for which the caches have room, at least P + T */
    int64_t rotated;         /* R, 0 to D, even */
    float scale;
    const float *query;      /* [B, T, Hq, D] */
    const float *key;        /* [B, T, Hk, D] */
    const float *value;      /* [B, T, Hk, D] */
    const float *cos;        /* [B, T, R/2], as is sin */
    const float *sin;
    const uint8_t *visible;  /* [B, T, P + T], not 0 where a token may see a key */
    const float *past_key;   /* [B, Hk, past_capacity, D] */
    const float *past_value;
    float *present_key;      /* [B, Hk, capacity, D]; may be past_key itself, and is then appended to */
    float *present_value;
    float *y;                /* [B, T, Hq, D] */
} ingot_cpu_attention_params;

INGOT_CPU_API int ingot_cpu_version(void);

/* Why the last call of this thread was refused; empty where none was. */
INGOT_CPU_API const char *ingot_cpu_last_error(void);

/* The instruction sets that this library was built for and this processor has, the best first, with
 * commas between; "reference" is the last, plain loops in float64. */
INGOT_CPU_API const char *ingot_cpu_targets(void);

/* The one that is used: the best, or what the environment's INGOT_CPU names. */
INGOT_CPU_API const char *ingot_cpu_target(void);

/* Use another of them from now on. No other call may run meanwhile. */
INGOT_CPU_API int ingot_cpu_use(const char *target);

/* Bytes of a weight [out_features, in_features] in panels; 0 of a format that there is not. */
INGOT_CPU_API size_t ingot_cpu_weight_bytes(const ingot_cpu_format *format, int64_t out_features,
                                            int64_t in_features);

INGOT_CPU_API int ingot_cpu_linear(const ingot_cpu_linear_params *params,
                                   const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_mlp(const ingot_cpu_mlp_params *params, const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_embedding(const ingot_cpu_embedding_params *params,
                                      const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_moe_dispatch(const ingot_cpu_moe_dispatch_params *params,
                                         const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_moe_linear(const ingot_cpu_moe_linear_params *params,
                                       const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_mamba2_scan(const ingot_cpu_mamba2_scan_params *params,
                                        const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_causal_conv(const ingot_cpu_causal_conv_params *params,
                                        const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_mamba2_mixer(const ingot_cpu_mamba2_mixer_params *params,
                                         const ingot_cpu_threads *threads);
INGOT_CPU_API int ingot_cpu_attention(const ingot_cpu_attention_params *params,
                                      const ingot_cpu_threads *threads);

#ifdef __cplusplus
}
#endif

#endif
