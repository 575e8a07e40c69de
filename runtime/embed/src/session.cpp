#include <ingot/session.hpp>

#include <algorithm>
#include <limits>
#include <new>

#include "backend.hpp"

namespace ingot {
namespace {

namespace fs = std::filesystem;

// ONNX Runtime hangs when asked for more threads than the system gives.
constexpr int kMostThreads = 1024;

std::unique_ptr<Backend> open(const fs::path &folder, const Manifest &manifest,
                              const Options &options) {
    manifest.check_files(folder, options.verify);
    if (manifest.verdict == "failed" && !options.allow_failed) {
        throw Error(folder.string() + " failed its validation, so its numbers are wrong; see " +
                    (folder / "report").string() +
                    ", and export it again or allow failed ingots to run it all the same.");
    }
    const std::vector<std::string> targets = {"onnx", "ort", "trt", "trt-rtx"};
    if (std::find(targets.begin(), targets.end(), manifest.target) == targets.end()) {
        throw Error(folder.string() + " is for " + manifest.target +
                    "; this version runs onnx, ort, trt, trt-rtx: use the one that made it.");
    }
    if (manifest.engine && !options.graph_only) {
        return open_tensorrt(folder, manifest, options.verify);
    }
    if (manifest.precision == "bfloat16") {
        throw Error(folder.string() +
                    " holds a bfloat16 graph and no engine, and ONNX Runtime's CPU provider computes "
                    "no bfloat16; export with --precision fp32 to run it here.");
    }
    return open_onnxruntime(folder, manifest, options.threads);
}

}  // namespace

struct Session::Impl {
    Manifest manifest;
    std::unique_ptr<Backend> backend;
    TokenInputs tokens;
    std::vector<float> joined;  // the output of a call that was fed token by token
    bool lost = false;          // the backend failed half-way through its states

    explicit Impl(Manifest read)
        : manifest(std::move(read)), tokens(manifest.vocab_size, manifest.states) {}

    View run(const std::int64_t *ids, const std::int64_t *mask, std::int64_t count) {
        lost = true;
        View result = backend->run(tokens.append(ids, mask, count));
        lost = false;
        return result;
    }

    // [B, T] fed as T calls of [B, 1], their outputs put together as [B, T, V].
    View run_one_by_one(const std::int64_t *ids, const std::int64_t *mask, std::int64_t count) {
        const auto rows = static_cast<std::size_t>(tokens.batch());
        const auto all = static_cast<std::size_t>(count);
        std::vector<std::int64_t> column(rows), column_mask(rows), shape;
        for (std::size_t t = 0; t < all; ++t) {
            for (std::size_t row = 0; row < rows; ++row) {
                column[row] = ids[row * all + t];
                column_mask[row] = mask[row * all + t];
            }
            const View view = run(column.data(), column_mask.data(), 1);
            const auto width = static_cast<std::size_t>(view.shape.back());
            joined.resize(rows * all * width);
            for (std::size_t row = 0; row < rows; ++row) {
                std::copy_n(view.data + row * width, width,
                            joined.data() + (row * all + t) * width);
            }
            shape = view.shape;
        }
        shape[1] = count;
        return {joined.data(), shape};
    }
};

Session::Session(const fs::path &folder, const Options &options) {
    if (options.threads < 0 || options.threads > kMostThreads) {
        throw Error("threads is " + std::to_string(options.threads) + "; it must be 0 to " +
                    std::to_string(kMostThreads) + ".");
    }
    impl_ = std::make_unique<Impl>(Manifest::read(folder));
    impl_->backend = open(folder, impl_->manifest, options);
    reset(1, 0);
}

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Session::Session(Session &&) noexcept = default;
Session &Session::operator=(Session &&) noexcept = default;
Session::~Session() = default;

const Manifest &Session::manifest() const { return impl_->manifest; }

Session Session::fork() const {
    auto impl = std::make_unique<Impl>(impl_->manifest);
    impl->backend = impl_->backend->fork();
    Session result(std::move(impl));
    result.reset(1, 0);
    return result;
}

void Session::reset(std::int64_t batch, std::int64_t capacity) {
    impl_->lost = true;
    try {
        // First, since it refuses sizes that make no sense.
        impl_->tokens.reset(batch, capacity);
        impl_->backend->reset(batch, capacity);
    } catch (const std::exception &error) {
        const bool memory = dynamic_cast<const std::bad_alloc *>(&error) != nullptr ||
                            dynamic_cast<const std::length_error *>(&error) != nullptr;
        if (!memory) throw;
        throw Error("there is no memory for " + std::to_string(batch) + " sequences of " +
                    std::to_string(capacity) + " tokens; reset with a smaller batch or capacity.");
    }
    impl_->lost = false;
}

View Session::step(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t tokens) {
    if (impl_->lost) throw Error("the last call failed and the state is lost; call reset first.");
    impl_->tokens.check(ids, mask, batch, tokens);
    const bool refused = batch > 1 && tokens > 1 && impl_->tokens.seen() > 0;
    if (refused && impl_->backend->one_by_one()) {
        return impl_->run_one_by_one(ids.data, mask.data, tokens);
    }
    return impl_->run(ids.data, mask.data, tokens);
}

std::vector<StateCopy> Session::state() const {
    if (impl_->lost) throw Error("the last call failed and the state is lost; call reset first.");
    return impl_->backend->state(impl_->tokens.seen());
}

std::vector<std::int64_t> state_shape(const StateInfo &state, std::int64_t batch,
                                      std::int64_t length) {
    std::vector<std::int64_t> result;
    for (const Dimension &dimension : state.input_shape) {
        result.push_back(dimension.fixed() ? dimension.size
                                           : (dimension.name == "batch" ? batch : length));
    }
    return result;
}

std::size_t elements(const std::vector<std::int64_t> &shape) {
    // Four bytes each at most, and as a signed number, as every allocator counts.
    constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max() / 4;
    std::uint64_t result = 1;
    for (const std::int64_t size : shape) {
        const auto factor = static_cast<std::uint64_t>(size);
        if (factor != 0 && result > kMost / factor) {
            throw Error("the states do not fit into memory; reset with a smaller batch or capacity.");
        }
        result *= factor;
    }
    return static_cast<std::size_t>(result);
}

}  // namespace ingot
