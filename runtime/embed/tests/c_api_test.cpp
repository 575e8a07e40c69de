// The C interface: statuses and messages in place of exceptions.
#include <doctest/doctest.h>
#include <ingot.h>

#include <stdexcept>
#include <thread>

#include "folder.hpp"

namespace {

std::string message() { return ingot_session_error(); }

// Opens an ingot and closes it at the end.
struct Opened {
    ingot_session *session = nullptr;

    explicit Opened(const std::string &name) {
        REQUIRE(ingot_session_open(tiny(name).c_str(), nullptr, &session) == INGOT_SESSION_OK);
    }
    ~Opened() { ingot_session_close(session); }
    Opened(const Opened &) = delete;
    Opened &operator=(const Opened &) = delete;
};

struct Told {
    std::vector<ingot::Ids> rows;
    int most = 1000;
};

int collect(void *user, const int64_t *tokens, int64_t prompts) {
    auto &told = *static_cast<Told *>(user);
    told.rows.emplace_back(tokens, tokens + prompts);
    return static_cast<int>(told.rows.size()) >= told.most;
}

}  // namespace

TEST_SUITE_BEGIN("c_api");

TEST_CASE("a folder is refused with a message") {
    auto *session = reinterpret_cast<ingot_session *>(1);
    CHECK(ingot_session_open("/nowhere", nullptr, &session) == INGOT_SESSION_REFUSED);
    CHECK(session == nullptr);
    CHECK(contains(message(), "/nowhere is not an ingot"));
    CHECK(ingot_session_open(nullptr, nullptr, &session) == INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "folder is NULL"));
    CHECK(ingot_session_open("/nowhere", nullptr, nullptr) == INGOT_SESSION_REFUSED);

    const Copy copy("olmoe-ort");
    copy.edit([](nlohmann::json &raw) { raw["validation"]["verdict"] = "failed"; });
    ingot_open_options options = ingot_open_defaults();
    CHECK(ingot_session_open(copy.path().c_str(), &options, &session) == INGOT_SESSION_REFUSED);
    options.allow_failed = 1;
    CHECK(ingot_session_open(copy.path().c_str(), &options, &session) == INGOT_SESSION_OK);
    ingot_session_close(session);
}

TEST_CASE("a library of operators is named") {
    const std::string folder = tiny("mamba2-own").string();
    ingot_session *session = nullptr;
    CHECK(ingot_session_open(folder.c_str(), nullptr, &session) == INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "no library that has them is named"));
    ingot_open_options options = ingot_open_defaults();
    CHECK(options.operators == nullptr);
    const std::string library = folder + "/libingot_ort.so";
    options.operators = library.c_str();
    CHECK(ingot_session_open(folder.c_str(), &options, &session) == INGOT_SESSION_OK);
    ingot_session_close(session);
}

TEST_CASE("each thread has its own message") {
    ingot_session *session = nullptr;
    CHECK(ingot_session_open("/here", nullptr, &session) == INGOT_SESSION_REFUSED);
    std::string other;
    std::thread([&] { other = message(); }).join();
    CHECK(other == "no call has failed");
    CHECK(contains(message(), "/here"));
}

TEST_CASE("NULL is refused, or closed") {
    const int64_t one = 1, *prompts[] = {&one};
    const float *logits = nullptr;
    int64_t shape[3];
    int32_t rank = 0;
    ingot_session_close(nullptr);
    CHECK(ingot_session_vocab_size(nullptr) == 0);
    CHECK(ingot_session_reset(nullptr, 1, 1) == INGOT_SESSION_REFUSED);
    CHECK(ingot_session_step(nullptr, &one, &one, 1, 1, &logits, shape, &rank) == INGOT_SESSION_REFUSED);
    CHECK(ingot_session_generate(nullptr, prompts, &one, 1, nullptr, nullptr, nullptr) ==
          INGOT_SESSION_REFUSED);
    const Opened opened("olmoe-ort");
    CHECK(ingot_session_reset(opened.session, 1, 1) == INGOT_SESSION_OK);
    CHECK(ingot_session_step(opened.session, nullptr, &one, 1, 1, &logits, shape, &rank) ==
          INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "null pointer"));
    CHECK(ingot_session_step(opened.session, &one, &one, INT64_MAX, 2, &logits, shape, &rank) ==
          INGOT_SESSION_REFUSED);
    CHECK(ingot_session_generate(opened.session, nullptr, &one, 1, nullptr, nullptr, nullptr) ==
          INGOT_SESSION_REFUSED);
    CHECK(ingot_session_generate(opened.session, prompts, &one, 0, nullptr, nullptr, nullptr) ==
          INGOT_SESSION_REFUSED);
    const int64_t negative = -1;
    CHECK(ingot_session_generate(opened.session, prompts, &negative, 1, nullptr, nullptr, nullptr) ==
          INGOT_SESSION_REFUSED);
}

TEST_CASE("a fork goes on when its session is closed") {
    const ingot::Ids expected = ingot::Session(tiny("mamba2-ort")).generate({{17, 300, 5}})[0];
    ingot_session *first = nullptr, *second = nullptr;
    REQUIRE(ingot_session_open(tiny("mamba2-ort").c_str(), nullptr, &first) == INGOT_SESSION_OK);
    CHECK(ingot_session_fork(first, nullptr) == INGOT_SESSION_REFUSED);
    CHECK(ingot_session_fork(nullptr, &second) == INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "session is NULL"));
    REQUIRE(ingot_session_fork(first, &second) == INGOT_SESSION_OK);
    ingot_session_close(first);
    const ingot::Ids prompt = {17, 300, 5};
    const int64_t *pointer = prompt.data(), length = 3;
    Told told;
    CHECK(ingot_session_generate(second, &pointer, &length, 1, nullptr, collect, &told) ==
          INGOT_SESSION_OK);
    ingot_session_close(second);
    ingot::Ids found;
    for (const ingot::Ids &row : told.rows) found.push_back(row[0]);
    CHECK(found == expected);
}

TEST_CASE("a step gives logits and their shape") {
    const Opened opened("olmoe-ort");
    const int64_t ids[] = {1, 2, 3, 4}, mask[] = {1, 1, 0, 1};
    const float *logits = nullptr;
    int64_t shape[3] = {0, 0, 0};
    int32_t rank = 0;
    CHECK(ingot_session_vocab_size(opened.session) == 512);
    CHECK(ingot_session_reset(opened.session, 2, 2) == INGOT_SESSION_OK);
    CHECK(ingot_session_step(opened.session, ids, mask, 2, 2, &logits, shape, &rank) == INGOT_SESSION_OK);
    CHECK(rank == 3);
    CHECK(ingot::Ids(shape, shape + 3) == ingot::Ids{2, 2, 512});
    CHECK(logits != nullptr);
    CHECK(ingot_session_step(opened.session, ids, mask, 2, 2, &logits, shape, &rank) ==
          INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "capacity of 2"));
    CHECK(ingot_session_reset(opened.session, 2, 2) == INGOT_SESSION_OK);
    CHECK(ingot_session_step_last(opened.session, ids, mask, 2, 2, 1, &logits, shape, &rank) ==
          INGOT_SESSION_OK);
    CHECK(ingot::Ids(shape, shape + 3) == ingot::Ids{2, 1, 512});
    CHECK(ingot_session_step_last(nullptr, ids, mask, 2, 2, 1, &logits, shape, &rank) ==
          INGOT_SESSION_REFUSED);
}

TEST_CASE("generates what the C++ session does") {
    const std::vector<ingot::Ids> prompts = {{17, 300, 5}, {411}};
    ingot::GenerateOptions same;
    same.max_new_tokens = 8;
    const std::vector<ingot::Ids> rows =
        ingot::Session(tiny("olmoe-ort")).generate(prompts, same);

    const Opened opened("olmoe-ort");
    const int64_t *pointers[] = {prompts[0].data(), prompts[1].data()};
    const int64_t lengths[] = {3, 1};
    ingot_generate_options options = ingot_generate_defaults();
    options.max_new_tokens = 8;
    CHECK(options.prefill_chunk == same.prefill_chunk);
    options.prefill_chunk = 2;
    Told told;
    CHECK(ingot_session_generate(opened.session, pointers, lengths, 2, &options, collect, &told) ==
          INGOT_SESSION_OK);
    REQUIRE(told.rows.size() == 8);
    for (std::size_t n = 0; n < 8; ++n) CHECK(told.rows[n] == ingot::Ids{rows[0][n], rows[1][n]});

    // A row that has ended is -1, and a callback may stop.
    options.stop_ids = &rows[0][2];
    options.stop_id_count = 1;
    Told stopped;
    stopped.most = 5;
    CHECK(ingot_session_generate(opened.session, pointers, lengths, 2, &options, collect, &stopped) ==
          INGOT_SESSION_OK);
    REQUIRE(stopped.rows.size() == 5);
    CHECK(stopped.rows[3] == ingot::Ids{-1, rows[1][3]});
}

TEST_CASE("padding that a recurrent state would take for tokens") {
    const Opened opened("mamba2-ort");
    const int64_t ids[] = {1, 2, 3, 4}, right[] = {1, 1, 1, 0}, left[] = {1, 1, 0, 1};
    const float *logits = nullptr;
    int64_t shape[3] = {0, 0, 0};
    int32_t rank = 0;
    const auto step = [&](const int64_t *mask) {
        return ingot_session_step(opened.session, ids, mask, 2, 2, &logits, shape, &rank);
    };
    CHECK(ingot_session_reset(opened.session, 2, 4) == INGOT_SESSION_OK);
    CHECK(step(right) == INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "padding behind the first token of row 1"));
    CHECK(step(left) == INGOT_SESSION_OK);
    CHECK(step(left) == INGOT_SESSION_REFUSED);
}

TEST_CASE("sizes and prompts that are none") {
    const Opened opened("mamba2-ort");
    for (const int64_t size : {int64_t{0}, int64_t{-1}, INT64_MIN, INT64_MAX, int64_t{1} << 40}) {
        CHECK(ingot_session_reset(opened.session, size, 4) == INGOT_SESSION_REFUSED);
        CHECK(contains(message(), "a batch of at least 1"));
        if (size != 0) CHECK(ingot_session_reset(opened.session, 1, size) == INGOT_SESSION_REFUSED);
    }
    const int64_t one = 1, *prompts[] = {&one};
    const float *logits = nullptr;
    int64_t shape[3];
    int32_t rank = 0;
    CHECK(ingot_session_step(opened.session, &one, &one, 1, 1, &logits, shape, &rank) ==
          INGOT_SESSION_REFUSED);
    CHECK(contains(message(), "call reset first"));
    for (const int64_t id : {int64_t{-1}, int64_t{512}, INT64_MAX}) {
        prompts[0] = &id;
        CHECK(ingot_session_generate(opened.session, prompts, &one, 1, nullptr, nullptr, nullptr) ==
              INGOT_SESSION_REFUSED);
        CHECK(contains(message(), "outside the vocabulary"));
    }
}

TEST_CASE("a callback's calls of its own session") {
    ingot_session *session = nullptr;
    REQUIRE(ingot_session_open(tiny("olmoe-ort").c_str(), nullptr, &session) == INGOT_SESSION_OK);
    const auto again = [](void *user, const int64_t *, int64_t) -> int {
        auto *own = static_cast<ingot_session *>(user);
        const int64_t one = 1, *prompts[] = {&one};
        CHECK(ingot_session_generate(own, prompts, &one, 1, nullptr, nullptr, nullptr) ==
              INGOT_SESSION_REFUSED);
        CHECK(contains(message(), "busy with another call"));
        CHECK(ingot_session_reset(own, 1, 1) == INGOT_SESSION_REFUSED);
        CHECK(ingot_session_vocab_size(own) == 512);
        return 1;
    };
    const auto close = [](void *user, const int64_t *, int64_t) -> int {
        ingot_session_close(static_cast<ingot_session *>(user));
        return 1;
    };
    const int64_t one = 1, *prompts[] = {&one};
    CHECK(ingot_session_generate(session, prompts, &one, 1, nullptr, again, session) ==
          INGOT_SESSION_OK);
    CHECK(ingot_session_generate(session, prompts, &one, 1, nullptr, close, session) ==
          INGOT_SESSION_OK);
}

TEST_CASE("an exception of the callback does not cross") {
    const Opened opened("olmoe-ort");
    const int64_t one = 1, *prompts[] = {&one};
    const auto thrower = [](void *, const int64_t *, int64_t) -> int {
        throw std::runtime_error("from the callback");
    };
    CHECK(ingot_session_generate(opened.session, prompts, &one, 1, nullptr, thrower, nullptr) ==
          INGOT_SESSION_FAILED);
    CHECK(contains(message(), "from the callback"));
}

TEST_SUITE_END();
