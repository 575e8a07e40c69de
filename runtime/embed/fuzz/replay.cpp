// fuzz_NAME RUNS SEED FILE...: a fuzzer without its engine. It runs the files, and then as many
// mutations of them; the same seed makes the same ones. Its exit status is 0 unless a sanitizer or
// the fuzzer stops it.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" {
int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size);
std::size_t LLVMFuzzerCustomMutator(std::uint8_t *data, std::size_t size, std::size_t most,
                                    unsigned seed);
std::size_t LLVMFuzzerMutate(std::uint8_t *data, std::size_t size, std::size_t most);
}

namespace {

using Bytes = std::vector<std::uint8_t>;

std::mt19937 random_bytes;

std::size_t below(std::size_t most) { return most == 0 ? 0 : random_bytes() % most; }

}  // namespace

// As libFuzzer's, simpler: flips, values, pieces that are dropped, doubled or cut off.
extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t *data, std::size_t size, std::size_t most) {
    if (size == 0) return 0;
    const std::size_t at = below(size), length = 1 + below(std::min<std::size_t>(size - at, 64));
    switch (below(5)) {
        case 0: data[at] = static_cast<std::uint8_t>(data[at] ^ (1U << below(8))); return size;
        case 1: data[at] = std::vector<std::uint8_t>{0, 1, 0x7f, 0x80, 0xff}[below(5)]; return size;
        case 2: std::copy(data + at + length, data + size, data + at); return size - length;
        case 3:
            if (size + length > most) return size;
            std::copy_backward(data + at, data + size, data + size + length);
            return size + length;
        default: return at;
    }
}

int main(int count, char **words) {
    if (count < 4) {
        std::cerr << "usage: " << words[0] << " RUNS SEED FILE...\n";
        return 2;
    }
    const int runs = std::atoi(words[1]);
    random_bytes.seed(static_cast<unsigned>(std::atoi(words[2])));
    std::vector<Bytes> seeds;
    for (int n = 3; n < count; ++n) {
        std::ifstream file(words[n], std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        LLVMFuzzerTestOneInput(seeds.back().data(), seeds.back().size());
    }
    for (int run = 0; run < runs; ++run) {
        Bytes input = seeds[below(seeds.size())];
        const std::size_t size = input.size(), room = size + (std::size_t{1} << 18);
        input.resize(room);
        std::size_t made = size;
        const std::size_t changes = 1 + below(3);
        for (std::size_t n = 0; n < changes; ++n) {
            made = LLVMFuzzerCustomMutator(input.data(), made, room,
                                           static_cast<unsigned>(random_bytes()));
        }
        // A vector of exactly its size, so that a read behind its end is seen.
        const Bytes exact(input.begin(), input.begin() + static_cast<std::ptrdiff_t>(made));
        LLVMFuzzerTestOneInput(exact.data(), exact.size());
    }
    std::cout << seeds.size() << " seeds and " << runs << " mutations\n";
}
