// One call at a time: what is refused, what a state holds, and that pieces add up to the whole.
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "folder.hpp"

namespace {

using ingot::Ids;
using ingot::Session;

const std::vector<std::string> kAll = {
    "olmoe-ort",    "olmoe-onnx", "jetmoe-ort",  "jetmoe-onnx",    "granite-ort",
    "granite-onnx", "mamba2-ort", "mamba2-onnx", "toy_hybrid-ort", "toy_hybrid-onnx",
    "olmoe-own",    "jetmoe-own", "granite-own", "mamba2-own",     "granitemoehybrid-ort",
    "granitemoehybrid-onnx",      "granitemoehybrid-own"};

Session opened(const std::string &name) { return Session(tiny(name), vouched(tiny(name))); }

Ids some_ids(std::size_t count) {
    Ids result;
    for (std::size_t n = 0; n < count; ++n) result.push_back(static_cast<std::int64_t>(n * 37 % 500));
    return result;
}

// A copy of the last position's logits of every row.
std::vector<float> last_logits(const ingot::View &view) {
    const auto rows = static_cast<std::size_t>(view.shape[0]);
    const auto tokens = static_cast<std::size_t>(view.shape[1]);
    const auto width = static_cast<std::size_t>(view.shape[2]);
    std::vector<float> result;
    for (std::size_t row = 0; row < rows; ++row) {
        const float *begin = view.data + ((row + 1) * tokens - 1) * width;
        result.insert(result.end(), begin, begin + width);
    }
    return result;
}

float farthest(const std::vector<float> &a, const std::vector<float> &b) {
    REQUIRE(a.size() == b.size());
    float result = 0;
    for (std::size_t n = 0; n < a.size(); ++n) result = std::max(result, std::fabs(a[n] - b[n]));
    return result;
}

// Columns `begin` to `end` of [2, T].
Ids columns(const Ids &ids, std::size_t begin, std::size_t end) {
    const std::size_t width = ids.size() / 2;
    Ids result;
    for (std::size_t row = 0; row < 2; ++row) {
        for (std::size_t t = begin; t < end; ++t) result.push_back(ids[row * width + t]);
    }
    return result;
}

}  // namespace

TEST_SUITE_BEGIN("session");

TEST_CASE("calls that the graph would misread") {
    Session session(tiny("olmoe-ort"));
    const Ids two = {1, 2}, ones = {1, 1};
    const auto message = [&](const Ids &ids, const Ids &mask, std::int64_t batch,
                             std::int64_t tokens) {
        return refusal([&] { session.step(ids, mask, batch, tokens); });
    };
    CHECK(contains(message(two, ones, 1, 2), "2 tokens after 0 do not fit the session's capacity of 0"));
    session.reset(1, 3);
    CHECK(contains(message(two, ones, 2, 1), "both must be [1, tokens]"));
    CHECK(contains(message(two, ones, 1, 1), "2 ids and 2 mask values were given for [1, 1]"));
    CHECK(contains(message(two, {1}, 1, 2), "2 ids and 1 mask values"));
    CHECK(contains(message(two, ones, 1, 0), "holds no tokens"));
    CHECK(contains(message(two, ones, 1, -1), "holds no tokens"));
    CHECK(contains(message(two, {1, 2}, 1, 2), "only 1 (token) and 0 (padding)"));
    CHECK(contains(message({1, 512}, ones, 1, 2), "token id 512 is outside the vocabulary of 512"));
    CHECK(contains(message({-1, 1}, ones, 1, 2), "token id -1 is outside the vocabulary"));
    CHECK(contains(refusal([&] { session.step({nullptr, 2}, {nullptr, 2}, 1, 2); }), "null pointer"));
    // A refused call leaves the state as it was.
    CHECK(session.step(two, ones, 1, 2).shape == Ids{1, 2, 512});
    CHECK(contains(message(two, ones, 1, 2), "2 tokens after 2 do not fit the session's capacity of 3"));
    CHECK(session.step({two.data(), 1}, {ones.data(), 1}, 1, 1).shape == Ids{1, 1, 512});
}

TEST_CASE("sizes that no memory holds") {
    Session session(tiny("olmoe-ort"));
    CHECK(contains(refusal([&] { session.reset(0, 1); }), "a batch of at least 1"));
    CHECK(contains(refusal([&] { session.reset(1, -1); }), "a capacity of at least 0"));
    const Ids one = {1};
    for (const std::int64_t size : {INT64_MAX, std::int64_t{1} << 32, std::int64_t{2147483648}}) {
        CHECK(contains(refusal([&] { session.reset(1, size); }), "below 2^31 each"));
        CHECK(contains(refusal([&] { session.reset(size, 1); }), "below 2^31 each"));
    }
    for (const auto &[batch, capacity] :
         {std::pair(1, 2147483647), {2147483647, 1}, {2147483647, 2147483647}}) {
        CHECK(contains(refusal([&, b = batch, c = capacity] { session.reset(b, c); }),
                       "there is no memory for "));
        CHECK(contains(refusal([&] { session.step(one, one, 1, 1); }), "call reset first"));
    }
    CHECK(contains(refusal([&] { session.reset(0, 1); }), "a batch of at least 1"));
    CHECK(contains(refusal([&] { session.state(); }), "call reset first"));
    CHECK(contains(refusal([&] { session.step(one, one, 1, 1); }), "call reset first"));
    session.reset(1, 1);
    session.step(one, one, 1, 1);
}

TEST_CASE("tokens fed in pieces give the logits of all at once") {
    for (const std::string &name : kAll) {
        CAPTURE(name);
        Session session = opened(name);
        // Two rows, the second padded by three on the left.
        Ids ids = some_ids(20), mask(20, 1);
        std::fill(mask.begin() + 10, mask.begin() + 13, 0);
        session.reset(2, 16);
        const std::vector<float> whole = last_logits(session.step(ids, mask, 2, 10));
        const std::vector<ingot::StateCopy> states = session.state();

        session.reset(2, 16);
        session.step(columns(ids, 0, 4), columns(mask, 0, 4), 2, 4);
        session.step(columns(ids, 4, 5), columns(mask, 4, 5), 2, 1);
        const ingot::View view = session.step(columns(ids, 5, 10), columns(mask, 5, 10), 2, 5);
        CHECK(view.shape == Ids{2, 5, session.manifest().vocab_size});
        CHECK(farthest(last_logits(view), whole) < 1e-4F);
        const std::vector<ingot::StateCopy> pieces = session.state();
        REQUIRE(pieces.size() == states.size());
        REQUIRE(pieces.size() == session.manifest().states.size());
        for (std::size_t n = 0; n < states.size(); ++n) {
            CAPTURE(states[n].name);
            CHECK(pieces[n].shape == states[n].shape);
            const auto &axis = session.manifest().states[n].axis;
            if (axis) CHECK(states[n].shape[*axis] == 10);
            // Padded positions of a cache are masked, and hold whatever their call computed there.
            if (!axis) CHECK(farthest(pieces[n].values, states[n].values) < 1e-4F);
        }
    }
}

TEST_CASE("the last logits alone are the last of all") {
    for (const std::string &name : kAll) {
        CAPTURE(name);
        const Copy before(name);
        before.edit(all_logits);
        for (const std::filesystem::path &folder : {tiny(name), before.path()}) {
            Session session(folder, vouched(folder));
            Ids ids = some_ids(20), mask(20, 1);
            std::fill(mask.begin() + 10, mask.begin() + 13, 0);
            for (const std::int64_t kept : {1, 3, 9}) {
                CAPTURE(kept);
                // A prompt of six tokens and a turn of four, which is fed token by token over
                // shared buffers.
                std::vector<std::vector<float>> all, last;
                for (const bool asked : {false, true}) {
                    session.reset(2, 10);
                    for (const auto &[begin, end] : {std::pair(0, 6), {6, 10}}) {
                        const std::int64_t tokens = end - begin, rows = std::min(kept, tokens);
                        const ingot::View view =
                            session.step(columns(ids, begin, end), columns(mask, begin, end), 2,
                                         tokens, asked ? kept : 0);
                        const std::int64_t given = asked ? rows : tokens;
                        REQUIRE(view.shape == Ids{2, given, session.manifest().vocab_size});
                        const auto width = view.shape[2];
                        auto &found = asked ? last : all;
                        found.emplace_back();
                        for (std::int64_t row = 0; row < 2; ++row) {
                            const float *ends = view.data + (row + 1) * given * width;
                            found.back().insert(found.back().end(), ends - rows * width, ends);
                        }
                    }
                }
                for (std::size_t n = 0; n < all.size(); ++n) CHECK(farthest(all[n], last[n]) < 1e-5F);
            }
            session.reset(1, 1);
            const Ids one = {1};
            CHECK(contains(refusal([&] { session.step(one, one, 1, 1, -1); }), "logits_to_keep is -1"));
            session.step(one, one, 1, 1, 1);
        }
    }
}

TEST_CASE("a padded row computes what it computes alone") {
    for (const std::string &name : kAll) {
        CAPTURE(name);
        Session session = opened(name);
        const Ids ids = {5, 6, 7, 8, 0, 0, 9, 11}, mask = {1, 1, 1, 1, 0, 0, 1, 1};
        session.reset(2, 8);
        std::vector<float> both = last_logits(session.step(ids, mask, 2, 4));
        both.erase(both.begin(), both.begin() + session.manifest().vocab_size);
        session.reset(1, 8);
        const Ids alone = {9, 11}, ones = {1, 1};
        CHECK(farthest(last_logits(session.step(alone, ones, 1, 2)), both) < 1e-4F);
    }
}

TEST_CASE("padding behind a row's first token, where a state is recurrent") {
    const Ids six = {5, 6, 7, 8, 9, 11};
    for (const std::string &name : kAll) {
        CAPTURE(name);
        Session session = opened(name);
        const bool recurrent = name.rfind("mamba2", 0) == 0 || name.rfind("toy_hybrid", 0) == 0 ||
                               name.rfind("granitemoehybrid", 0) == 0;
        const auto message = [&](const Ids &mask) {
            return refusal([&] { session.step(six, mask, 2, 3); });
        };
        // On the right, between tokens, and in either row.
        for (const Ids &mask :
             {Ids{1, 1, 1, 1, 1, 0}, {1, 1, 1, 1, 0, 0}, {1, 1, 1, 0, 1, 0}, {1, 0, 1, 1, 1, 1}}) {
            session.reset(2, 9);
            const std::string found = message(mask);
            CHECK(contains(found, "padding behind the first token of row") == recurrent);
            CHECK(contains(found, mask[1] == 0 ? "of row 0;" : "of row 1;") == recurrent);
            if (!recurrent) continue;
            // Nothing has run, so the session goes on.
            CHECK(message({1, 1, 1, 1, 1, 1}).empty());
        }
        // On the left at first, then of a row that has begun; a row without a token has not.
        session.reset(2, 12);
        CHECK(message({0, 1, 1, 0, 0, 0}).empty());
        CHECK(message({1, 1, 1, 0, 0, 1}).empty());
        CHECK(contains(message({1, 1, 1, 0, 1, 1}), "of row 1;") == recurrent);
        if (recurrent) CHECK(contains(message({0, 0, 0, 1, 1, 1}), "of row 0;"));
        CHECK(message({1, 1, 1, 1, 1, 1}).empty());
        session.reset(2, 3);
        CHECK(message({0, 0, 1, 1, 1, 1}).empty());
    }
}

TEST_CASE("padding before the first token, over two calls, changes nothing") {
    for (const std::string &name : kAll) {
        CAPTURE(name);
        Session session = opened(name);
        session.reset(1, 9);
        const Ids zeros = {0, 0, 0}, ids = {0, 9, 11}, mask = {0, 1, 1}, ones = {1, 1};
        session.step(zeros, zeros, 1, 3);
        const std::vector<float> late = last_logits(session.step(ids, mask, 1, 3));
        session.reset(1, 9);
        CHECK(farthest(last_logits(session.step({ids.data() + 1, 2}, ones, 1, 2)), late) < 1e-4F);
    }
}

TEST_CASE("a session that was moved from is refused") {
    Session first(tiny("mamba2-ort"));
    const Session second(std::move(first));
    CHECK(contains(refusal([&] { first.reset(1, 3); }), "moved from"));
    CHECK(contains(refusal([&] { first.state(); }), "moved from"));
    CHECK(contains(refusal([&] { first.manifest(); }), "moved from"));
    CHECK(contains(refusal([&] { first.fork(); }), "moved from"));
    CHECK(contains(refusal([&] { first.generate({{1}}); }), "moved from"));
}

TEST_CASE("two threads on one session: one is refused, and neither answers wrong") {
    const std::vector<Ids> prompts = {{5, 6}, {411, 3, 9}};
    Session session(tiny("granite-ort"));
    std::vector<Ids> expected;
    for (const Ids &prompt : prompts) expected.push_back(session.generate({prompt})[0]);
    std::atomic<int> answered{0}, busy{0}, others{0};
    std::vector<std::thread> threads;
    for (std::size_t n = 0; n < 4; ++n) {
        threads.emplace_back([&, n] {
            for (int turn = 0; turn < 20; ++turn) {
                try {
                    const Ids found = session.generate({prompts[n % 2]})[0];
                    ++(found == expected[n % 2] ? answered : others);
                } catch (const ingot::Error &error) {
                    ++(contains(error.what(), "busy with another call") ? busy : others);
                    std::this_thread::yield();
                }
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK(others == 0);
    CHECK(answered > 0);
    CHECK(busy > 0);
    CHECK(session.generate({prompts[0]})[0] == expected[0]);
}

TEST_CASE("reset forgets, and a session moves") {
    Session first(tiny("mamba2-ort"));
    const Ids ids = {3, 4, 5}, ones = {1, 1, 1};
    first.reset(1, 3);
    const std::vector<float> before = last_logits(first.step(ids, ones, 1, 3));
    Session second(std::move(first));
    second.reset(1, 3);
    CHECK(farthest(last_logits(second.step(ids, ones, 1, 3)), before) == 0.0F);
}

TEST_CASE("sessions of several threads do not meet") {
    const Ids expected = Session(tiny("olmoe-ort")).generate({{5, 6}})[0];
    std::vector<Ids> found(4);
    std::vector<std::thread> threads;
    for (Ids &row : found) {
        threads.emplace_back([&row] { row = Session(tiny("olmoe-ort")).generate({{5, 6}})[0]; });
    }
    for (std::thread &thread : threads) thread.join();
    for (const Ids &row : found) CHECK(row == expected);
}

TEST_CASE("states in shared buffers and others are cut each in its own way") {
    const Copy mixed("olmoe-ort");
    // The first layer's key and value; the rest stay in buffers of the session's capacity.
    mixed.edit([](nlohmann::json &raw) {
        for (const std::size_t n : {0U, 1U}) raw["states"][n]["shared"] = false;
    });
    std::vector<std::vector<ingot::StateCopy>> found;
    for (const auto &folder : {tiny("olmoe-ort"), mixed.path()}) {
        Session session(folder);
        session.reset(1, 16);
        const Ids ids = some_ids(6), ones(6, 1);
        session.step({ids.data(), 5}, {ones.data(), 5}, 1, 5);
        session.step({ids.data() + 5, 1}, {ones.data(), 1}, 1, 1);
        found.push_back(session.state());
    }
    REQUIRE(found[0].size() == found[1].size());
    for (std::size_t n = 0; n < found[0].size(); ++n) {
        CAPTURE(found[0][n].name);
        REQUIRE(found[1][n].shape == found[0][n].shape);
        CHECK(farthest(found[1][n].values, found[0][n].values) < 1e-6F);
    }
}

TEST_CASE("forks share the weights and nothing else") {
    for (const std::string &name : kAll) {
        CAPTURE(name);
        const std::vector<Ids> prompts = {{5, 6}, {411}, {9, 8, 207}, {300}};
        std::vector<Ids> expected;
        Session alone = opened(name);
        for (const Ids &prompt : prompts) expected.push_back(alone.generate({prompt})[0]);

        std::vector<Session> forks;
        {
            Session first = opened(name);
            first.reset(1, 3);
            const Ids ids = {3, 4, 5}, ones = {1, 1, 1};
            first.step(ids, ones, 1, 3);
            for (std::size_t n = 0; n < prompts.size(); ++n) forks.push_back(first.fork());
            for (const ingot::StateCopy &copy : forks[0].state()) {
                for (const float value : copy.values) CHECK(value == 0.0F);
            }
            CHECK(contains(refusal([&] { forks[0].step({ids.data(), 1}, {ones.data(), 1}, 1, 1); }),
                           "do not fit the session's capacity of 0"));
            // They go on without the session they were made of.
        }
        std::vector<Ids> found(prompts.size());
        std::vector<std::thread> threads;
        for (std::size_t n = 0; n < prompts.size(); ++n) {
            threads.emplace_back([&, n] { found[n] = forks[n].generate({prompts[n]})[0]; });
        }
        for (std::thread &thread : threads) thread.join();
        CHECK(found == expected);
    }
}

TEST_CASE("an ingot without state takes each call for itself") {
    Session session(tiny("jetmoe-classify"));
    const auto labels = static_cast<std::int64_t>(session.manifest().labels.size());
    session.reset(2, 3);
    const Ids ids = some_ids(6), ones(6, 1);
    for (int n = 0; n < 3; ++n) CHECK(session.step(ids, ones, 2, 3).shape == Ids{2, labels});
    CHECK(contains(refusal([&] { session.step(ids, ones, 2, 3, 1); }),
                   "exported for the task 'classify', which has no logits of each token"));
    CHECK(session.state().empty());
}

TEST_CASE("features are of the hidden size") {
    Session session(tiny("olmoe-features"));
    session.reset(1, 3);
    const Ids ids = some_ids(3), ones(3, 1);
    const ingot::View view = session.step(ids, ones, 1, 3);
    REQUIRE(view.shape.size() == 3);
    CHECK(view.shape[2] == session.manifest().outputs[0].shape[2].size);
}

TEST_SUITE_END();
