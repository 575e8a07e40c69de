// The C interface: the C++ session behind opaque handles, its exceptions as statuses and messages.
#include <ingot.h>
#include <ingot/session.hpp>

struct ingot_session {
    ingot::Session session;
};

namespace {

// Of a fixed size, so that it holds a message also where there is no memory left.
thread_local char last_error[4096] = "no call has failed";

ingot_session_status fail(ingot_session_status status, const char *message) noexcept {
    std::size_t n = 0;
    for (; n + 1 < sizeof last_error && message[n] != '\0'; ++n) last_error[n] = message[n];
    last_error[n] = '\0';
    return status;
}

// Runs a call and turns what it throws into a status.
template <typename Call>
ingot_session_status guard(Call call) noexcept {
    try {
        call();
        return INGOT_SESSION_OK;
    } catch (const ingot::Error &error) {
        return fail(INGOT_SESSION_REFUSED, error.what());
    } catch (const std::bad_alloc &) {
        return fail(INGOT_SESSION_FAILED, "there is no memory left for this call; give it less.");
    } catch (const std::exception &error) {
        return fail(INGOT_SESSION_FAILED, error.what());
    } catch (...) {
        return fail(INGOT_SESSION_FAILED, "an unknown exception was thrown; report this.");
    }
}

void need(const void *pointer, const char *name) {
    if (pointer == nullptr) throw ingot::Error(std::string(name) + " is NULL; give one.");
}

ingot::GenerateOptions converted(const ingot_generate_options &options) {
    ingot::GenerateOptions result;
    result.max_new_tokens = options.max_new_tokens;
    result.sampling = {options.temperature, options.top_k, options.top_p, options.seed};
    result.prefill_chunk = options.prefill_chunk;
    if (options.stop_ids != nullptr) {
        if (options.stop_id_count < 0) throw ingot::Error("stop_id_count is negative; count them.");
        result.stop_ids.emplace(options.stop_ids, options.stop_ids + options.stop_id_count);
    }
    return result;
}

std::vector<ingot::Ids> collected(const int64_t *const *prompts, const int64_t *lengths,
                                  int64_t count) {
    if (count < 1) throw ingot::Error("count is below 1; give at least one prompt.");
    need(prompts, "prompts");
    need(lengths, "lengths");
    std::vector<ingot::Ids> result;
    for (int64_t n = 0; n < count; ++n) {
        need(prompts[n], "a prompt");
        if (lengths[n] < 0) throw ingot::Error("a prompt's length is negative; count its ids.");
        result.emplace_back(prompts[n], prompts[n] + lengths[n]);
    }
    return result;
}

}  // namespace

extern "C" {

const char *ingot_session_error(void) { return last_error; }

ingot_open_options ingot_open_defaults(void) { return {0, 1, 0, 0, nullptr}; }

ingot_generate_options ingot_generate_defaults(void) {
    return {64, 0.0, 0, 1.0, 0, nullptr, 0, ingot::kPrefillChunk};
}

ingot_session_status ingot_session_open(const char *folder, const ingot_open_options *options,
                                        ingot_session **session) {
    return guard([&] {
        need(session, "session");
        *session = nullptr;
        need(folder, "folder");
        const ingot_open_options given = options != nullptr ? *options : ingot_open_defaults();
        ingot::Options made;
        made.threads = given.threads;
        made.verify = given.verify != 0;
        made.allow_failed = given.allow_failed != 0;
        made.graph_only = given.graph_only != 0;
        if (given.operators != nullptr) made.operators = given.operators;
        *session = new ingot_session{ingot::Session(folder, made)};
    });
}

ingot_session_status ingot_session_fork(const ingot_session *session, ingot_session **forked) {
    return guard([&] {
        need(forked, "forked");
        *forked = nullptr;
        need(session, "session");
        *forked = new ingot_session{session->session.fork()};
    });
}

void ingot_session_close(ingot_session *session) { delete session; }

int64_t ingot_session_vocab_size(const ingot_session *session) {
    return session != nullptr ? session->session.manifest().vocab_size : 0;
}

ingot_session_status ingot_session_reset(ingot_session *session, int64_t batch, int64_t capacity) {
    return guard([&] {
        need(session, "session");
        session->session.reset(batch, capacity);
    });
}

ingot_session_status ingot_session_step(ingot_session *session, const int64_t *ids,
                                        const int64_t *mask, int64_t batch, int64_t tokens,
                                        const float **logits, int64_t shape[3], int32_t *rank) {
    return ingot_session_step_last(session, ids, mask, batch, tokens, 0, logits, shape, rank);
}

ingot_session_status ingot_session_step_last(ingot_session *session, const int64_t *ids,
                                             const int64_t *mask, int64_t batch, int64_t tokens,
                                             int64_t logits_to_keep, const float **logits,
                                             int64_t shape[3], int32_t *rank) {
    return guard([&] {
        need(session, "session");
        need(logits, "logits");
        need(shape, "shape");
        need(rank, "rank");
        // Zero where a factor is no size; the session refuses those by themselves.
        const bool sizes = batch > 0 && tokens > 0 && tokens <= INT64_MAX / batch;
        const auto count = static_cast<std::size_t>(sizes ? batch * tokens : 0);
        const ingot::View view =
            session->session.step({ids, count}, {mask, count}, batch, tokens, logits_to_keep);
        *logits = view.data;
        *rank = static_cast<int32_t>(view.shape.size());
        for (std::size_t n = 0; n < 3; ++n) shape[n] = n < view.shape.size() ? view.shape[n] : 0;
    });
}

ingot_session_status ingot_session_generate(ingot_session *session, const int64_t *const *prompts,
                                            const int64_t *lengths, int64_t count,
                                            const ingot_generate_options *options,
                                            ingot_on_tokens on_tokens, void *user) {
    return guard([&] {
        need(session, "session");
        const ingot_generate_options given =
            options != nullptr ? *options : ingot_generate_defaults();
        std::vector<std::int64_t> told;
        const auto tell = [&](const std::vector<std::optional<std::int64_t>> &tokens) {
            if (on_tokens == nullptr) return true;
            told.clear();
            for (const auto &token : tokens) told.push_back(token.value_or(-1));
            return on_tokens(user, told.data(), static_cast<int64_t>(told.size())) == 0;
        };
        session->session.generate(collected(prompts, lengths, count), converted(given), tell);
    });
}

}  // extern "C"
