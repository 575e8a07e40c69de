// Generation: what is refused, how it ends, and how tokens are drawn. That greedy tokens are those of
// the Python session is tests/test_runtime_embed.py.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <optional>
#include <set>

#include "folder.hpp"

namespace {

using ingot::GenerateOptions;
using ingot::Ids;
using ingot::Session;

const std::vector<Ids> kPrompts = {{17, 300, 5, 44, 101, 256, 7}, {411}, {9, 8, 207}};

GenerateOptions few(std::int64_t count) {
    GenerateOptions options;
    options.max_new_tokens = count;
    return options;
}

}  // namespace

TEST_SUITE_BEGIN("generate");

TEST_CASE("options that make no sense") {
    Session session(tiny("olmoe-ort"));
    const auto message = [&](const std::function<void(GenerateOptions &)> &change) {
        GenerateOptions options;
        change(options);
        return refusal([&] { session.generate(kPrompts, options); });
    };
    CHECK(contains(message([](auto &o) { o.max_new_tokens = 0; }), "it must be at least 1"));
    CHECK(contains(message([](auto &o) { o.max_new_tokens = INT64_MAX; }), "exceed this model's context"));
    CHECK(contains(message([](auto &o) { o.max_new_tokens = 506; }), "context of 512"));
    CHECK(contains(message([](auto &o) { o.prefill_chunk = -1; }), "prefill_chunk is -1"));
    CHECK(contains(message([](auto &o) { o.sampling.temperature = -1; }), "it must be 0 or more"));
    CHECK(contains(message([](auto &o) { o.sampling.temperature = std::nan(""); }), "temperature"));
    CHECK(contains(message([](auto &o) { o.sampling.temperature = HUGE_VAL; }), "temperature"));
    CHECK(contains(message([](auto &o) { o.sampling.top_k = -1; }), "top-k is -1"));
    CHECK(contains(message([](auto &o) { o.sampling.top_p = 0; }), "top-p"));
    CHECK(contains(message([](auto &o) { o.sampling.top_p = std::nan(""); }), "top-p"));
    for (const std::vector<Ids> &prompts : {std::vector<Ids>{}, {{1}, {}}}) {
        CHECK(contains(refusal([&] { session.generate(prompts); }), "at least one token"));
    }
    CHECK(contains(refusal([&] { session.generate({{1, 512}}); }), "outside the vocabulary"));
}

TEST_CASE("ingots of another task") {
    for (const std::string name : {"jetmoe-classify", "olmoe-features"}) {
        const std::string task = name.substr(name.find('-') + 1);
        Session session(tiny(name));
        const std::string message = refusal([&] { session.generate(kPrompts); });
        CHECK(contains(message, "was exported for the task '" + task + "' and cannot generate"));
    }
}

TEST_CASE("a batch generates what each prompt does alone, and tells it step by step") {
    Session session(tiny("granite-ort"));
    std::vector<Ids> told(kPrompts.size());
    const std::vector<Ids> rows = session.generate(kPrompts, few(24), [&](const auto &tokens) {
        for (std::size_t row = 0; row < told.size(); ++row) told[row].push_back(tokens[row].value());
        return true;
    });
    CHECK(told == rows);
    for (std::size_t row = 0; row < rows.size(); ++row) {
        CHECK(rows[row].size() == 24);
        CHECK(session.generate({kPrompts[row]}, few(24)) == std::vector<Ids>{rows[row]});
    }
}

TEST_CASE("a prompt in pieces generates what it does as a whole") {
    for (const std::string name : {"olmoe-ort", "granite-onnx", "mamba2-ort", "toy_hybrid-ort",
                                   "granitemoehybrid-ort"}) {
        CAPTURE(name);
        Session session(tiny(name));
        for (const std::vector<Ids> &prompts : {kPrompts, {kPrompts[0]}}) {
            GenerateOptions options = few(16);
            options.prefill_chunk = 0;
            const std::vector<Ids> whole = session.generate(prompts, options);
            for (const std::int64_t chunk : {1, 2, 3, 6, 7, 8}) {
                CAPTURE(chunk);
                options.prefill_chunk = chunk;
                CHECK(session.generate(prompts, options) == whole);
            }
        }
    }
}

TEST_CASE("a stop id ends its own row, and the callback ends all") {
    Session session(tiny("olmoe-ort"));
    const std::vector<Ids> free = session.generate(kPrompts, few(12));
    GenerateOptions options = few(12);
    options.stop_ids = Ids{free[0][2]};
    int ended = 0;
    const std::vector<Ids> rows = session.generate(kPrompts, options, [&](const auto &tokens) {
        ended += !tokens[0].has_value();
        return true;
    });
    // The id that ends a row is part of it.
    CHECK(rows[0] == Ids(free[0].begin(), free[0].begin() + 3));
    CHECK(ended == 9);
    // Alone, generation ends with its row.
    CHECK(session.generate({kPrompts[0]}, options)[0].size() == 3);
    int steps = 0;
    session.generate(kPrompts, few(12), [&](const auto &) { return ++steps < 5; });
    CHECK(steps == 5);
}

TEST_CASE("the session refuses calls from its own callback, and goes on with its own tokens") {
    Session session(tiny("olmoe-ort"));
    const std::vector<Ids> expected = session.generate(kPrompts, few(6));
    int refused = 0;
    const Ids one = {1};
    const std::vector<Ids> rows = session.generate(kPrompts, few(6), [&](const auto &) {
        for (const std::function<void()> &call :
             {std::function<void()>([&] { session.generate({{9}}, few(2)); }),
              {[&] { session.reset(1, 4); }},
              {[&] { session.step(one, one, 1, 1); }},
              {[&] { session.state(); }}}) {
            refused += contains(refusal(call), "busy with another call");
        }
        // A fork has a state of its own.
        CHECK(session.fork().generate({kPrompts[1]}, few(2))[0] ==
              Ids(expected[1].begin(), expected[1].begin() + 2));
        return true;
    });
    CHECK(refused == 24);
    CHECK(rows == expected);
    // What the callback throws ends the call, and not the session.
    CHECK_THROWS_AS(session.generate(kPrompts, few(6),
                                     [](const auto &) -> bool { throw std::logic_error("mine"); }),
                    std::logic_error);
    CHECK(session.generate(kPrompts, few(6)) == expected);
}

TEST_CASE("a callback may end its own session") {
    std::optional<Session> session(std::in_place, tiny("olmoe-ort"));
    const std::vector<Ids> expected = session->generate(kPrompts, few(6));
    const std::vector<Ids> rows = session->generate(kPrompts, few(6), [&](const auto &) {
        session.reset();
        return true;
    });
    CHECK(rows == expected);
}

TEST_CASE("prompts that no session takes") {
    for (const char *name : {"olmoe-ort", "mamba2-onnx"}) {
        Session session(tiny(name));
        for (const Ids &prompt : {Ids{512}, {-1}, {INT64_MAX}, {INT64_MIN}, {1, 2, 1LL << 32}}) {
            CHECK(contains(refusal([&] {
                               session.generate({{1}, prompt});
                           }),
                           "outside the vocabulary"));
        }
        CHECK(contains(refusal([&] { session.generate({{}}); }), "at least one token"));
        CHECK(contains(refusal([&] { session.generate({{1}}, few(INT64_MIN)); }), "at least 1"));
        CHECK_FALSE(refusal([&] { session.generate({{1}}, few(INT64_MAX)); }).empty());
        CHECK(session.generate({{1}}, few(2))[0].size() == 2);
    }
    Session session(tiny("mamba2-onnx"));
    CHECK(
        contains(refusal([&] { session.generate({{1}}, few(INT64_MAX - 1)); }), "below 2^31 each"));
}

TEST_CASE("the ingot's own ids end a row where none are given") {
    const Copy copy("olmoe-ort");
    const Ids free = Session(copy.path()).generate({kPrompts[0]}, few(12))[0];
    copy.edit([&](nlohmann::json &raw) { raw["generation"]["eos_token_ids"] = {free[1]}; });
    Session session(copy.path());
    CHECK(session.generate({kPrompts[0]}, few(12))[0].size() == 2);
    GenerateOptions none = few(12);
    none.stop_ids = Ids{};
    CHECK(session.generate({kPrompts[0]}, none)[0] == free);
}

TEST_CASE("sampling repeats a seed and follows the probabilities") {
    Session session(tiny("olmoe-ort"));
    const auto sampled = [&](ingot::Sampling sampling) {
        GenerateOptions options = few(16);
        options.sampling = sampling;
        return session.generate(kPrompts, options);
    };
    CHECK(sampled({1.0, 0, 1.0, 5}) == sampled({1.0, 0, 1.0, 5}));
    CHECK(sampled({1.0, 0, 1.0, 5}) != sampled({1.0, 0, 1.0, 6}));
    const std::vector<Ids> greedy = session.generate(kPrompts, few(16));
    CHECK(sampled({1.0, 1, 1.0, 5}) == greedy);
    CHECK(sampled({1.0, 0, 1e-9, 5}) == greedy);
    CHECK(sampled({1e-300, 0, 1.0, 5}) == greedy);

    // The first token of many seeds against the softmax of the logits.
    const Ids prompt = {411}, one = {1};
    session.reset(1, 1);
    const ingot::View view = session.step(prompt, one, 1, 1);
    std::vector<std::pair<double, std::int64_t>> likeliest;
    for (std::int64_t n = 0; n < 512; ++n) likeliest.emplace_back(view.data[n] / 0.5, n);
    std::sort(likeliest.rbegin(), likeliest.rend());
    double weight[3], sum = 0;
    for (int n = 0; n < 3; ++n) sum += weight[n] = std::exp(likeliest[static_cast<std::size_t>(n)].first);
    int counts[3] = {0, 0, 0};
    const int draws = 600;
    for (std::uint64_t seed = 0; seed < draws; ++seed) {
        GenerateOptions options = few(1);
        options.sampling = {0.5, 3, 1.0, seed};
        const std::int64_t token = session.generate({prompt}, options)[0][0];
        for (int n = 0; n < 3; ++n) counts[n] += token == likeliest[static_cast<std::size_t>(n)].second;
    }
    CHECK(counts[0] + counts[1] + counts[2] == draws);
    for (int n = 0; n < 3; ++n) {
        const double share = weight[n] / sum;
        // Five standard deviations of a binomial draw.
        CHECK(std::fabs(counts[n] - share * draws) < 5 * std::sqrt(draws * share * (1 - share)) + 1);
    }
}

TEST_SUITE_END();
