// The values of ingot.json as whoever reads them expects them: typed, in range, and named in
// refusals.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace ingot {

// Far above any model, and far below where arithmetic over them would overflow.
constexpr std::int64_t kMostSize = 2147483647;              // of a dimension, and of a count
constexpr std::int64_t kMostBytes = std::int64_t{1} << 53;  // of a file, and parameters

// The letters that a name consists of: letters and digits beside those given.
struct Letters {
    const char *first;  // beside letters, and digits where `digit_first`
    const char *rest;   // beside letters and digits
    std::size_t most;   // of all
    bool digit_first;

    bool spell(const std::string &text) const;
};

// The patterns of the Python schema, export/ingot_schema.py.
constexpr Letters kTensor{"_", "_.", 128, false};
constexpr Letters kOperator{"_", "_.:", 128, false};
constexpr Letters kVersion{"", ".+!_-", 64, true};
constexpr Letters kPackage{"", "._-", 64, true};
constexpr Letters kProfile{"_", "_", 64, true};
constexpr Letters kSymbol{"_", "_ +*/()-", 128, false};

// One value and where it stands, such as states[2].axis. It must not outlive the document.
//
// Each reading throws std::invalid_argument where the value is another: where it stands, what was
// found, and what it must be.
class Field {
  public:
    Field(const nlohmann::json &value, std::string name) : value_(value), name_(std::move(name)) {}

    const std::string &name() const { return name_; }
    bool null() const { return value_.is_null(); }
    bool is_text() const { return value_.is_string(); }

    // Of an object: one of its values, whether it has it, or all of them by their keys.
    Field at(const char *key) const;
    bool has(const char *key) const;
    std::vector<std::pair<std::string, Field>> entries(std::size_t most) const;

    // Refuses any other key of an object.
    void only(std::initializer_list<const char *> keys) const;

    // Of a list.
    std::vector<Field> items(std::size_t most) const;

    std::int64_t whole(std::int64_t least, std::int64_t most) const;
    std::vector<std::int64_t> wholes(std::int64_t least, std::int64_t most,
                                     std::size_t count) const;
    bool truth() const;

    // One line of text that may be printed as it is: at most 1600 bytes, without what acts on a
    // terminal.
    std::string text() const;
    std::string matching(const Letters &letters, const char *expected) const;
    std::string one_of(std::initializer_list<const char *> words) const;

    // SHA-256 in 64 hexadecimal digits.
    std::string sha256() const;

    [[noreturn]] void refuse(const std::string &expected) const;

  private:
    const nlohmann::json &value_;
    std::string name_;
};

}  // namespace ingot
