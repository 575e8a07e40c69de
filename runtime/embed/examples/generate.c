/* ingot_generate_c INGOT [--operators FILE] ID [ID ...]: 16 greedy tokens after one prompt, from C. */
#include <ingot.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int print(void *user, const int64_t *tokens, int64_t prompts) {
    (void)user;
    (void)prompts;
    printf("%" PRId64 " ", tokens[0]);
    return fflush(stdout);
}

int main(int count, char **words) {
    ingot_open_options opened = ingot_open_defaults();
    int first = 2;
    if (count > 3 && strcmp(words[2], "--operators") == 0) {
        opened.operators = words[3];
        first = 4;
    }
    if (count <= first) {
        fprintf(stderr, "usage: ingot_generate_c INGOT [--operators FILE] ID [ID ...]\n");
        return 2;
    }
    const int64_t length = count - first;
    int64_t *prompt = malloc((size_t)length * sizeof *prompt);
    if (prompt == NULL) return 1;
    for (int64_t n = 0; n < length; ++n) {
        char *end = NULL;
        const char *word = words[n + first];
        prompt[n] = strtoll(word, &end, 10);
        if (end == word || *end != '\0') {
            fprintf(stderr, "error: '%s' is no token id; give whole numbers.\n", word);
            free(prompt);
            return 2;
        }
    }

    ingot_session *session = NULL;
    ingot_session_status status = ingot_session_open(words[1], &opened, &session);
    if (status == INGOT_SESSION_OK) {
        ingot_generate_options options = ingot_generate_defaults();
        options.max_new_tokens = 16;
        const int64_t *const prompts[] = {prompt};
        status = ingot_session_generate(session, prompts, &length, 1, &options, print, NULL);
    }
    if (status == INGOT_SESSION_OK) {
        printf("\n");
    } else {
        fprintf(stderr, "error: %s\n", ingot_session_error());
    }
    ingot_session_close(session);
    free(prompt);
    return status == INGOT_SESSION_OK ? 0 : 2;
}
