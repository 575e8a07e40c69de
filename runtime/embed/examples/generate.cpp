// ingot_generate INGOT --prompt-ids 1,2,3 [--prompt-ids ...] --max-new-tokens N
//
// Generates from an ingot and prints a line of token ids for each prompt. One prompt alone is printed
// as its tokens come.
#include <ingot/session.hpp>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

namespace {

constexpr const char *kUsage =
    "usage: ingot_generate INGOT --prompt-ids 1,2,3 [--prompt-ids 4,5 ...]\n"
    "  --max-new-tokens N   at most so many for each prompt (64)\n"
    "  --temperature X      0 is greedy (0)\n"
    "  --top-k K            0 is off (0)\n"
    "  --top-p P            1 is off (1)\n"
    "  --seed S             of the random choices (0)\n"
    "  --stop-id ID         instead of the model's own; may be repeated\n"
    "  --prefill-chunk N    tokens of a prompt that are fed at once; 0 is all (512)\n"
    "  --threads N          0 lets the runtime choose (0)\n"
    "  --no-verify          check file sizes only, not their SHA-256\n"
    "  --allow-failed       run an ingot that failed its validation\n"
    "  --graph-only         run the graph on ONNX Runtime, also where there is an engine\n"
    "  --operators FILE     of an ingot on Ingot's own kernels the library that has them: a program\n"
    "                       that you vouch for\n";

// What the command line asks for.
struct Arguments {
    std::string folder;
    std::vector<ingot::Ids> prompts;
    ingot::Options open;
    ingot::GenerateOptions generate;
};

template <typename Convert>
auto number(const std::string &text, const std::string &name, Convert convert) {
    std::size_t end = 0;
    try {
        const auto value = convert(text, &end);
        if (end == text.size()) return value;
    } catch (const std::logic_error &) {
        // Not a number, or out of range; said below.
    }
    throw ingot::Error(name + " '" + text + "' is not a number that fits; see --help.");
}

std::int64_t whole(const std::string &text, const std::string &name) {
    return number(text, name, [](const std::string &t, std::size_t *end) { return std::stoll(t, end); });
}

double real(const std::string &text, const std::string &name) {
    return number(text, name, [](const std::string &t, std::size_t *end) { return std::stod(t, end); });
}

ingot::Ids ids(const std::string &text) {
    ingot::Ids result;
    for (std::size_t begin = 0; begin <= text.size();) {
        const std::size_t end = std::min(text.find(',', begin), text.size());
        result.push_back(whole(text.substr(begin, end - begin), "--prompt-ids"));
        begin = end + 1;
    }
    return result;
}

Arguments parse(const std::vector<std::string> &words) {
    Arguments result;
    std::vector<std::int64_t> stops;
    for (std::size_t n = 0; n < words.size(); ++n) {
        const std::string &name = words[n];
        const auto value = [&]() -> const std::string & {
            if (n + 1 == words.size()) throw ingot::Error(name + " needs a value; see --help.");
            return words[++n];
        };
        ingot::Sampling &sampling = result.generate.sampling;
        if (name == "--prompt-ids") {
            result.prompts.push_back(ids(value()));
        } else if (name == "--max-new-tokens") {
            result.generate.max_new_tokens = whole(value(), name);
        } else if (name == "--temperature") {
            sampling.temperature = real(value(), name);
        } else if (name == "--top-k") {
            sampling.top_k = whole(value(), name);
        } else if (name == "--top-p") {
            sampling.top_p = real(value(), name);
        } else if (name == "--seed") {
            sampling.seed = static_cast<std::uint64_t>(whole(value(), name));
        } else if (name == "--stop-id") {
            stops.push_back(whole(value(), name));
        } else if (name == "--prefill-chunk") {
            result.generate.prefill_chunk = whole(value(), name);
        } else if (name == "--threads") {
            result.open.threads = static_cast<int>(std::min<std::int64_t>(whole(value(), name), 1 << 20));
        } else if (name == "--no-verify") {
            result.open.verify = false;
        } else if (name == "--allow-failed") {
            result.open.allow_failed = true;
        } else if (name == "--graph-only") {
            result.open.graph_only = true;
        } else if (name == "--operators") {
            result.open.operators = value();
        } else if (name.rfind("--", 0) == 0 || !result.folder.empty()) {
            throw ingot::Error("'" + name + "' is not an option of this program; see --help.");
        } else {
            result.folder = name;
        }
    }
    if (result.folder.empty() || result.prompts.empty()) {
        throw ingot::Error("give an ingot folder and at least one --prompt-ids; see --help.");
    }
    if (!stops.empty()) result.generate.stop_ids = stops;
    return result;
}

void run(const Arguments &arguments) {
    ingot::Session session(arguments.folder, arguments.open);
    const bool alone = arguments.prompts.size() == 1;
    const auto stream = [&](const std::vector<std::optional<std::int64_t>> &tokens) {
        if (alone) std::cout << *tokens[0] << ' ' << std::flush;
        return true;
    };
    const std::vector<ingot::Ids> made =
        session.generate(arguments.prompts, arguments.generate, stream);
    for (const ingot::Ids &row : made) {
        for (const std::int64_t token : row) {
            if (!alone) std::cout << token << ' ';
        }
        std::cout << '\n';
    }
}

}  // namespace

int main(int count, char **words) {
    const std::vector<std::string> given(words + 1, words + count);
    for (const std::string &word : given) {
        if (word == "--help") return std::cout << kUsage, EXIT_SUCCESS;
    }
    try {
        run(parse(given));
    } catch (const std::exception &error) {
        std::cerr << "error: " << error.what() << '\n';
        return 2;
    }
}
