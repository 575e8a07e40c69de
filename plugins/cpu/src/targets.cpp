#include "targets.h"

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <limits>
#include <mutex>

#include "hwy/highway.h"
#include "hwy/targets.h"
#include "refuse.h"

namespace ingot::cpu {
namespace {

constexpr const char *kReference = "reference";

// Highway's targets as people call them.
std::string name_of(int64_t target) {
    switch (target) {
        case HWY_AVX3: return "avx512";
        case HWY_AVX3_DL: return "avx512-vnni";
        default: {
            std::string name = hwy::TargetName(target);
            std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) {
                return char(std::tolower(c));
            });
            return name;
        }
    }
}

// What was built and this processor has, the best first.
std::vector<int64_t> &supported() {
    static std::vector<int64_t> result = [] {
        std::vector<int64_t> found;
        const int64_t both = hwy::SupportedTargets() & HWY_TARGETS;
        // The better a target, the lower its bit.
        for (int64_t bit = 1; bit > 0 && bit <= both; bit <<= 1)
            if (both & bit) found.push_back(bit);
        return found;
    }();
    return result;
}

std::string listed() {
    std::string result;
    for (const int64_t target : supported()) result += name_of(target) + ",";
    return result + kReference;
}

std::atomic<bool> reference{false};
std::once_flag once;

void choose(const std::string &name) {
    const auto &all = supported();
    if (name == kReference) {
        reference = true;
        return;
    }
    for (size_t i = 0; i < all.size(); ++i)
        if (name_of(all[i]) == name) {
            hwy::SetSupportedTargetsForTest(all[i]);
            hwy::GetChosenTarget().Update(hwy::SupportedTargets());
            reference = false;
            return;
        }
    throw Refused("there is no target \"" + name + "\" on this processor; choose one of " + listed());
}

void begin() {
    std::call_once(once, [] {
        supported();
        const char *asked = std::getenv("INGOT_CPU");
        if (asked && *asked) choose(asked);
    });
}

}  // namespace

bool use_reference() {
    begin();
    return reference;
}

std::string &last_error() {
    thread_local std::string why;
    return why;
}

void check(const ingot_cpu_format &format) {
    require(format.numbers >= INGOT_CPU_FLOAT32 && format.numbers <= INGOT_CPU_INT4,
            "there is no such format of weights");
    if (is_whole(format))
        require(format.block == 32 || format.block == 64 || format.block == 128,
                "a block has 32, 64 or 128 numbers");
    else
        require(!format.block && !format.zero_points, "floats have neither blocks nor zero points");
}

void check_activation(int32_t activation) {
    require(activation >= INGOT_CPU_SILU && activation <= INGOT_CPU_IDENTITY,
            "there is no such activation");
}

void check_size(const char *name, int64_t size, int64_t least) {
    if (size < least || size > std::numeric_limits<int32_t>::max())
        throw Refused(std::string(name) + " is " + std::to_string(size) + "; it may be " +
                      std::to_string(least) + " to 2147483647");
}

}  // namespace ingot::cpu

using namespace ingot::cpu;

int ingot_cpu_version(void) { return INGOT_CPU_VERSION; }

const char *ingot_cpu_last_error(void) { return last_error().c_str(); }

const char *ingot_cpu_targets(void) {
    static const std::string all = listed();
    return all.c_str();
}

const char *ingot_cpu_target(void) {
    thread_local std::string name;
    name = use_reference() ? kReference : name_of([] {
        const int64_t now = hwy::SupportedTargets() & HWY_TARGETS;
        return now & -now;
    }());
    return name.c_str();
}

int ingot_cpu_use(const char *target) {
    return answered([&] {
        begin();
        choose(target);
    });
}
