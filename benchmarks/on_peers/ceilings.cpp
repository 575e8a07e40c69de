// What this machine can do at most: bytes read a second, and multiply-adds a second by each kind of
// instruction that it has. Every loop is run by all threads at once, several times, and the best
// time counts, since whatever else the machine does can only make it slower.
//
//     ceilings THREADS SECONDS MEBIBYTES
//
// prints one JSON object: {"read": {loop: bytes a second}, "float32": {loop: operations a second},
// ...}, where a multiply-add is two operations.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Rates = std::map<std::string, double>;

// A loop does its work once and says how much that was; it is told which thread it is.
using Loop = std::function<double(int)>;

std::atomic<std::uint64_t> sink;

// Threads of one rate, each on a processor of its own of those that the process may use.
double best_rate(const Loop &loop, int threads, double seconds) {
    constexpr int kRounds = 5;
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    std::vector<int> processors;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &allowed)) processors.push_back(cpu);
    }
    double best = 0;
    for (int round = 0; round < kRounds; ++round) {
        std::atomic<int> ready{0};
        std::vector<double> rates(threads);
        std::vector<std::thread> pool;
        for (int at = 0; at < threads; ++at) {
            pool.emplace_back([&, at] {
                cpu_set_t mine;
                CPU_ZERO(&mine);
                CPU_SET(processors[at % processors.size()], &mine);
                pthread_setaffinity_np(pthread_self(), sizeof mine, &mine);
                loop(at);  // warms up
                ++ready;
                while (ready.load() < threads) {
                }
                const auto begin = Clock::now();
                double done = 0, passed = 0;
                do {
                    done += loop(at);
                    passed = std::chrono::duration<double>(Clock::now() - begin).count();
                } while (passed < seconds / kRounds);
                rates[at] = done / passed;
            });
        }
        for (auto &thread : pool) thread.join();
        double total = 0;
        for (double rate : rates) total += rate;
        best = std::max(best, total);
    }
    return best;
}

// A vector of whole numbers that no compiler takes apart.
void use(std::uint64_t value) { sink.fetch_add(value, std::memory_order_relaxed); }

std::uint64_t sum_plain(const std::uint64_t *data, std::size_t count) {
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < count; ++i) total += data[i];
    return total;
}

#if defined(__x86_64__)

// Rows of lines that are read in turn, `kStreams` at a distance from each other, each fetched ahead.
template <int kStreams>
__attribute__((target("avx2"))) std::uint64_t sum_avx2(const std::uint64_t *data, std::size_t count) {
    constexpr std::size_t kAhead = 2048;
    const std::size_t bytes = count * 8 / kStreams;
    const char *base = reinterpret_cast<const char *>(data);
    __m256i sums[kStreams * 2];
    for (auto &sum : sums) sum = _mm256_setzero_si256();
    for (std::size_t at = 0; at + 64 <= bytes; at += 64) {
#pragma GCC unroll 8
        for (int stream = 0; stream < kStreams; ++stream) {
            const char *line = base + stream * bytes + at;
            _mm_prefetch(line + kAhead, _MM_HINT_T0);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
                const auto found = _mm256_load_si256(reinterpret_cast<const __m256i *>(line) + half);
                sums[2 * stream + half] = _mm256_xor_si256(sums[2 * stream + half], found);
            }
        }
    }
    for (int i = 1; i < kStreams * 2; ++i) sums[0] = _mm256_xor_si256(sums[0], sums[i]);
    alignas(32) std::uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i *>(lanes), sums[0]);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

template <int kStreams, bool kFetch>
__attribute__((target("avx512f"))) std::uint64_t sum_avx512(const std::uint64_t *data,
                                                           std::size_t count) {
    constexpr std::size_t kAhead = 2048;
    const std::size_t bytes = count * 8 / kStreams;
    const char *base = reinterpret_cast<const char *>(data);
    __m512i sums[kStreams];
    for (auto &sum : sums) sum = _mm512_setzero_si512();
    for (std::size_t at = 0; at + 64 <= bytes; at += 64) {
#pragma GCC unroll 8
        for (int stream = 0; stream < kStreams; ++stream) {
            const char *line = base + stream * bytes + at;
            if (kFetch) _mm_prefetch(line + kAhead, _MM_HINT_T0);
            sums[stream] = _mm512_xor_si512(sums[stream], _mm512_load_si512(line));
        }
    }
    for (int i = 1; i < kStreams; ++i) sums[0] = _mm512_xor_si512(sums[0], sums[i]);
    alignas(64) std::uint64_t lanes[8];
    _mm512_store_si512(lanes, sums[0]);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + lanes[4] + lanes[5] + lanes[6] + lanes[7];
}

constexpr int kTimes = 20000;
// More sums than the latency of two units takes, and few enough for the registers.
constexpr int kSums = 14, kSums256 = 12;

__attribute__((target("avx2,fma"))) double fma_avx2(int) {
    __m256 sums[kSums256];
    const __m256 a = _mm256_set1_ps(0.999F), b = _mm256_set1_ps(0.001F);
    for (auto &sum : sums) sum = b;
    for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 16
        for (auto &sum : sums) {
            sum = _mm256_fmadd_ps(sum, a, b);
            asm volatile("" : "+x"(sum));
        }
    }
    return 2.0 * 8 * kSums256 * kTimes;
}

__attribute__((target("avx512f"))) double fma_avx512(int) {
    __m512 sums[kSums];
    const __m512 a = _mm512_set1_ps(0.999F), b = _mm512_set1_ps(0.001F);
    for (auto &sum : sums) sum = b;
    for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 16
        for (auto &sum : sums) {
            sum = _mm512_fmadd_ps(sum, a, b);
            asm volatile("" : "+v"(sum));
        }
    }
    return 2.0 * 16 * kSums * kTimes;
}

__attribute__((target("avx512f,avx512bf16"))) double dot_bf16(int) {
    __m512 sums[kSums];
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (auto &sum : sums) sum = _mm512_setzero_ps();
    for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 16
        for (auto &sum : sums) {
            sum = _mm512_dpbf16_ps(sum, a, a);
            asm volatile("" : "+v"(sum));
        }
    }
    return 2.0 * 32 * kSums * kTimes;
}

__attribute__((target("avx512f,avx512vnni"))) double dot_int8(int) {
    __m512i sums[kSums];
    const __m512i a = _mm512_set1_epi8(1);
    for (auto &sum : sums) sum = _mm512_setzero_si512();
    for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 16
        for (auto &sum : sums) {
            sum = _mm512_dpbusd_epi32(sum, a, a);
            asm volatile("" : "+v"(sum));
        }
    }
    return 2.0 * 64 * kSums * kTimes;
}

__attribute__((target("avx2,avxvnni"))) double dot_int8_avx2(int) {
    __m256i sums[kSums256];
    const __m256i a = _mm256_set1_epi8(1);
    for (auto &sum : sums) sum = _mm256_setzero_si256();
    for (int i = 0; i < kTimes; ++i) {
#pragma GCC unroll 16
        for (auto &sum : sums) {
            sum = _mm256_dpbusd_avx_epi32(sum, a, a);
            asm volatile("" : "+x"(sum));
        }
    }
    return 2.0 * 32 * kSums256 * kTimes;
}

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t columns[16] = {};
    std::uint8_t rows[16] = {};
};

// All eight tiles whole: sixteen rows of 64 bytes.
__attribute__((target("amx-tile"))) void load_tiles() {
    static const std::vector<std::uint8_t> zeros(1024);
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) config.columns[tile] = 64, config.rows[tile] = 16;
    _tile_loadconfig(&config);
    _tile_loadd(4, zeros.data(), 64);
    _tile_loadd(5, zeros.data(), 64);
    _tile_loadd(6, zeros.data(), 64);
    _tile_loadd(7, zeros.data(), 64);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

__attribute__((target("amx-tile,amx-int8"))) double tile_int8(int) {
    load_tiles();
    for (int i = 0; i < kTimes; ++i) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 64 * 4 * kTimes;
}

__attribute__((target("amx-tile,amx-bf16"))) double tile_bf16(int) {
    load_tiles();
    for (int i = 0; i < kTimes; ++i) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 32 * 4 * kTimes;
}

// The kernel lends the tiles' registers to a process that asks for them.
bool tiles_granted() {
    constexpr int kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

#endif

void print(const std::map<std::string, Rates> &found) {
    std::string text = "{";
    for (const auto &[kind, rates] : found) {
        if (rates.empty()) continue;
        text += (text.size() > 1 ? ", \"" : "\"") + kind + "\": {";
        bool first = true;
        for (const auto &[name, rate] : rates) {
            char number[64];
            std::snprintf(number, sizeof number, "%s\"%s\": %.6g", first ? "" : ", ", name.c_str(),
                          rate);
            text += number;
            first = false;
        }
        text += "}";
    }
    std::printf("%s}\n", text.c_str());
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 4) {
        std::fprintf(stderr, "usage: ceilings THREADS SECONDS MEBIBYTES\n");
        return 2;
    }
    const int threads = std::atoi(argv[1]);
    const double seconds = std::atof(argv[2]);
    // Each thread reads its own part, as the rows of a weight are shared out.
    const std::size_t count = (std::size_t{std::strtoul(argv[3], nullptr, 10)} << 20) / 8 / threads;
    std::vector<std::uint64_t *> parts;
    for (int at = 0; at < threads; ++at) {
        auto *part = static_cast<std::uint64_t *>(std::aligned_alloc(4096, count * 8));
        std::fill_n(part, count, 1);
        parts.push_back(part);
    }
    std::map<std::string, Rates> found;
    const auto read = [&](const char *name, std::uint64_t (*loop)(const std::uint64_t *, std::size_t)) {
        found["read"][name] = best_rate(
            [&](int at) {
                use(loop(parts[at], count));
                return 8.0 * count;
            },
            threads, seconds);
    };
    const auto peak = [&](const char *kind, const char *name, double (*loop)(int)) {
        found[kind][name] = best_rate(loop, threads, seconds);
    };
    read("plain sum", sum_plain);
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f");
    unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, b1 = 0, c1 = 0, d1 = 0;
    __get_cpuid_count(7, 0, &a, &b, &c, &d);
    __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    if (avx2) {
        read("AVX2", sum_avx2<1>);
        read("AVX2, 4 streams", sum_avx2<4>);
        peak("float32", "AVX2", fma_avx2);
        if (a1 >> 4 & 1) peak("int8", "AVX-VNNI", dot_int8_avx2);
    }
    if (avx512) {
        read("AVX-512, not fetched ahead", sum_avx512<1, false>);
        read("AVX-512", sum_avx512<1, true>);
        read("AVX-512, 4 streams", sum_avx512<4, true>);
        read("AVX-512, 8 streams", sum_avx512<8, true>);
        peak("float32", "AVX-512", fma_avx512);
        if (a1 >> 5 & 1) peak("bfloat16", "AVX-512", dot_bf16);
        if (c >> 11 & 1) peak("int8", "AVX-512", dot_int8);
    }
    if ((d >> 24 & 1) && tiles_granted()) {
        if (d >> 25 & 1) peak("int8", "AMX", tile_int8);
        if (d >> 22 & 1) peak("bfloat16", "AMX", tile_bf16);
    }
#endif
    print(found);
    for (auto *part : parts) std::free(part);
    return 0;
}
