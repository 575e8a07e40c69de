#include <ingot/session.hpp>

#include <algorithm>
#include <limits>

#include "impl.hpp"

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
    if (manifest.engine && !options.graph_only) {
        return open_tensorrt(folder, manifest, options.verify);
    }
    if (manifest.precision == "bfloat16") {
        throw Error(folder.string() +
                    " holds a bfloat16 graph and no engine, and ONNX Runtime's CPU provider computes "
                    "no bfloat16; export with --precision fp32 to run it here.");
    }
    return open_onnxruntime(folder, manifest, options.threads,
                            operators_for(folder, manifest, options.operators));
}

}  // namespace

View Session::Impl::run(const std::int64_t *ids, const std::int64_t *mask, std::int64_t count,
                        std::int64_t kept) {
    lost = true;
    const View result = backend->run(tokens.append(ids, mask, count, kept));
    lost = false;
    const bool whole = kept == count || asks_for_last(manifest);
    return whole ? result : cut(result, kept);
}

// The last rows of what a graph gives of every token.
View Session::Impl::cut(const View &view, std::int64_t kept) {
    const auto rows = static_cast<std::size_t>(view.shape[0]);
    const auto width = static_cast<std::size_t>(view.shape[2]);
    const std::size_t all = static_cast<std::size_t>(view.shape[1]) * width;
    const std::size_t some = static_cast<std::size_t>(kept) * width;
    joined.resize(rows * some);
    for (std::size_t row = 0; row < rows; ++row) {
        std::copy_n(view.data + (row + 1) * all - some, some, joined.data() + row * some);
    }
    return {joined.data(), {view.shape[0], kept, view.shape[2]}};
}

// [B, T] fed as T calls of [B, 1], the outputs of the last K put together as [B, K, V].
View Session::Impl::run_one_by_one(const std::int64_t *ids, const std::int64_t *mask,
                                   std::int64_t count, std::int64_t kept) {
    const auto rows = static_cast<std::size_t>(tokens.batch());
    const auto all = static_cast<std::size_t>(count), last = static_cast<std::size_t>(kept);
    std::vector<std::int64_t> column(rows), column_mask(rows), shape;
    for (std::size_t t = 0; t < all; ++t) {
        for (std::size_t row = 0; row < rows; ++row) {
            column[row] = ids[row * all + t];
            column_mask[row] = mask[row * all + t];
        }
        const View view = run(column.data(), column_mask.data(), 1, 1);
        const auto width = static_cast<std::size_t>(view.shape.back());
        joined.resize(rows * last * width);
        for (std::size_t row = 0; row < rows && t + last >= all; ++row) {
            const std::size_t place = row * last + t + last - all;
            std::copy_n(view.data + row * width, width, joined.data() + place * width);
        }
        shape = view.shape;
    }
    shape[1] = kept;
    return {joined.data(), shape};
}

void Session::Impl::reset(std::int64_t batch, std::int64_t capacity) {
    lost = true;
    const std::string refusal = "there is no memory for " + std::to_string(batch) +
                                " sequences of " + std::to_string(capacity) +
                                " tokens; reset with a smaller batch or capacity.";
    within_memory(refusal.c_str(), [&] {
        // First, since it refuses sizes that make no sense.
        tokens.reset(batch, capacity);
        backend->reset(batch, capacity);
    });
    lost = false;
}

void Session::Impl::usable() const {
    if (lost) throw Error("the last call failed and the state is lost; call reset first.");
}

View Session::Impl::step(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t count,
                         std::int64_t logits_to_keep) {
    usable();
    tokens.check(ids, mask, batch, count);
    if (logits_to_keep < 0) {
        throw Error("logits_to_keep is " + std::to_string(logits_to_keep) +
                    "; it must be 0 (all) or more.");
    }
    if (logits_to_keep > 0 && manifest.task != "generate") {
        throw Error("logits_to_keep is " + std::to_string(logits_to_keep) +
                    ", and the ingot was exported for the task '" + manifest.task +
                    "', which has no logits of each token; give 0.");
    }
    const std::int64_t kept = logits_to_keep > 0 ? std::min(logits_to_keep, count) : count;
    return within_memory("there is no memory for this call; feed fewer tokens at once.", [&] {
        const bool refused = batch > 1 && count > 1 && tokens.seen() > 0;
        if (refused && backend->one_by_one()) return run_one_by_one(ids.data, mask.data, count, kept);
        return run(ids.data, mask.data, count, kept);
    });
}

Session::Session(const fs::path &folder, const Options &options) {
    if (options.threads < 0 || options.threads > kMostThreads) {
        throw Error("threads is " + std::to_string(options.threads) + "; it must be 0 to " +
                    std::to_string(kMostThreads) + ".");
    }
    within_memory("there is no memory to open this ingot; close other sessions, or fork one.", [&] {
        impl_ = std::make_shared<Impl>(Manifest::read(folder));
        impl_->backend = open(folder, impl_->manifest, options);
    });
    impl_->reset(1, 0);
}

Session::Session(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}

Session::Session(Session &&) noexcept = default;
Session &Session::operator=(Session &&) noexcept = default;
Session::~Session() = default;

Session::Impl &Session::impl() const {
    if (!impl_) throw Error("this session was moved from; call the one that it was moved to.");
    return *impl_;
}

const Manifest &Session::manifest() const { return impl().manifest; }

Session Session::fork() const {
    auto forked = std::make_shared<Impl>(impl().manifest);
    forked->backend = impl().backend->fork();
    forked->reset(1, 0);
    return Session(std::move(forked));
}

void Session::reset(std::int64_t batch, std::int64_t capacity) {
    const Call call(impl().busy);
    impl_->reset(batch, capacity);
}

View Session::step(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t tokens,
                   std::int64_t logits_to_keep) {
    const Call call(impl().busy);
    return impl_->step(ids, mask, batch, tokens, logits_to_keep);
}

std::vector<StateCopy> Session::state() const {
    const Call call(impl().busy);
    impl_->usable();
    return within_memory(
        "there is no memory for a copy of the states; reset with a smaller capacity.",
        [&] { return impl_->backend->state(impl_->tokens.seen()); });
}

const TensorInfo &main_output(const Manifest &manifest) {
    // The manifest's rules have it that it is there.
    return *std::find_if(
        manifest.outputs.begin(), manifest.outputs.end(),
        [&](const TensorInfo &output) { return output.name == manifest.main_output; });
}

bool asks_for_last(const Manifest &manifest) {
    return std::any_of(manifest.inputs.begin(), manifest.inputs.end(),
                       [](const TensorInfo &input) { return input.name == kLogitsToKeep; });
}

bool by_token(const Manifest &manifest) {
    return manifest.kernels != "ingot" &&
           std::any_of(manifest.states.begin(), manifest.states.end(),
                       [](const StateInfo &state) { return state.shared && state.axis; });
}

std::vector<std::int64_t> main_shape(const TensorInfo &main, const Feeds &feeds) {
    std::vector<std::int64_t> result;
    for (const Dimension &dimension : main.shape) {
        result.push_back(dimension.fixed()                   ? dimension.size
                         : dimension.name == "batch"         ? feeds.batch
                         : dimension.name == "kept_sequence" ? feeds.kept
                                                             : feeds.tokens);
    }
    return result;
}

std::string sizes_of(const std::vector<std::int64_t> &shape) {
    std::string result;
    for (const std::int64_t size : shape)
        result += (result.empty() ? "" : ", ") + std::to_string(size);
    return "[" + result + "]";
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
            throw Error(
                "these sizes do not fit into memory; reset with a smaller batch or capacity.");
        }
        result *= factor;
    }
    return static_cast<std::size_t>(result);
}

}  // namespace ingot
