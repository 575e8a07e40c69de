/* C interface to an ingot: open a folder, feed tokens, generate.
 *
 * Every function that can fail returns a status, and ingot_session_error() says what went wrong in one
 * sentence. No C++ exception leaves these functions. One session is for one thread at a time, and refuses
 * a call while it is at work in another; several sessions may run in several threads. Arrays are row-major.
 */
#ifndef INGOT_H
#define INGOT_H

#include <stdint.h>

#include "ingot/api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* An opened ingot and the state of one batch of sequences. */
typedef struct ingot_session ingot_session;

typedef enum ingot_session_status {
    INGOT_SESSION_OK = 0,
    INGOT_SESSION_REFUSED = 1, /* the ingot or the call: see the message */
    INGOT_SESSION_FAILED = 2   /* no memory, or a fault of this library */
} ingot_session_status;

/* Begin from ingot_open_defaults(). */
typedef struct ingot_open_options {
    int32_t threads;      /* of the backend; 0 lets it choose */
    int32_t verify;       /* 1: compare the SHA-256 of every file; 0: sizes only */
    int32_t allow_failed; /* 1: open an ingot whose validation failed */
    int32_t graph_only;   /* 1: run the graph on ONNX Runtime, also where there is an engine */
    /* Of an ingot that runs on Ingot's own kernels, the library that has them: a program that you vouch
     * for, loaded only where it is the one that the ingot was made with. NULL names none. */
    const char *operators;
} ingot_open_options;

/* Begin from ingot_generate_defaults(). */
typedef struct ingot_generate_options {
    int64_t max_new_tokens; /* at most so many for each prompt */
    double temperature;     /* 0 takes the likeliest token (greedy) */
    int64_t top_k;          /* 0 keeps all tokens */
    double top_p;           /* 1 keeps all tokens */
    uint64_t seed;
    const int64_t *stop_ids; /* ids that end a sequence; NULL for the ingot's own */
    int64_t stop_id_count;
    int64_t prefill_chunk; /* tokens of a prompt that are fed at once; 0 for all */
} ingot_generate_options;

/* Told each step's tokens, one for each prompt and -1 where that prompt has ended. Return 0 to go on,
 * anything else to stop. The session refuses calls from it; it may be forked, and closed. */
typedef int (*ingot_on_tokens)(void *user, const int64_t *tokens, int64_t prompts);

/* The message of this thread's last failure; valid until its next one. Never NULL. */
INGOT_API const char *ingot_session_error(void);

INGOT_API ingot_open_options ingot_open_defaults(void);
INGOT_API ingot_generate_options ingot_generate_defaults(void);

/* Opens an ingot folder; options may be NULL. On failure *session is NULL. */
INGOT_API ingot_session_status ingot_session_open(const char *folder, const ingot_open_options *options,
                                                  ingot_session **session);

/* Another session over the same weights, with no state: for another thread. It may be made while the first
 * one is used, and each is closed by itself, in any order. On failure *forked is NULL. */
INGOT_API ingot_session_status ingot_session_fork(const ingot_session *session, ingot_session **forked);

/* Closes a session; NULL is allowed. */
INGOT_API void ingot_session_close(ingot_session *session);

/* Ids are 0 to this, exclusive; 0 for a NULL session. */
INGOT_API int64_t ingot_session_vocab_size(const ingot_session *session);

/* Forgets all state and makes room for `batch` sequences of `capacity` tokens, padding included. */
INGOT_API ingot_session_status ingot_session_reset(ingot_session *session, int64_t batch,
                                                   int64_t capacity);

/* Feeds `tokens` new tokens of every sequence: ids and mask are [batch, tokens], the mask 1 for tokens
 * and 0 for padding: anywhere where all states grow, and before a row's first token where one is recurrent.
 *
 * *logits: the main output, valid until the session's next call: [batch, tokens, vocabulary], or of a
 * classifier [batch, labels]. shape receives *rank sizes, 2 or 3; the third is 0 where there are 2. */
INGOT_API ingot_session_status ingot_session_step(ingot_session *session, const int64_t *ids,
                                                  const int64_t *mask, int64_t batch, int64_t tokens,
                                                  const float **logits, int64_t shape[3],
                                                  int32_t *rank);

/* The same, with the logits of the last `logits_to_keep` columns alone, of which there may be fewer:
 * [batch, min(logits_to_keep, tokens), vocabulary]; 0 for all. Such a call takes far less memory. */
INGOT_API ingot_session_status ingot_session_step_last(ingot_session *session, const int64_t *ids,
                                                       const int64_t *mask, int64_t batch,
                                                       int64_t tokens, int64_t logits_to_keep,
                                                       const float **logits, int64_t shape[3],
                                                       int32_t *rank);

/* Generates for all prompts together and tells on_tokens each step; the state is reset.
 *
 * prompts: `count` pointers to token ids, and lengths: how many each has. options may be NULL. */
INGOT_API ingot_session_status ingot_session_generate(ingot_session *session,
                                                      const int64_t *const *prompts,
                                                      const int64_t *lengths, int64_t count,
                                                      const ingot_generate_options *options,
                                                      ingot_on_tokens on_tokens, void *user);

#ifdef __cplusplus
}
#endif

#endif
