#include "field.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "json_file.hpp"

namespace ingot {
namespace {

// 400 letters of any language.
constexpr std::size_t kMostText = 1600;

// Letters of UTF-8 that move a cursor, end a line or turn the order of what is read around, as the
// beginnings of their bytes: U+0080 to U+009F, U+2028 to U+202E, U+2066 to U+2069.
bool acts_on_a_terminal(const std::string &text, std::size_t n) {
    const auto at = [&](std::size_t k) {
        return k < text.size() ? static_cast<unsigned char>(text[k]) : 0U;
    };
    const unsigned first = at(n), second = at(n + 1), third = at(n + 2);
    if (first < 0x20 || first == 0x7f) return true;
    if (first == 0xc2) return second < 0xa0;
    if (first != 0xe2) return false;
    return (second == 0x80 && third >= 0xa8 && third <= 0xae) ||
           (second == 0x81 && third >= 0xa6 && third <= 0xa9);
}

bool is_letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_among(char c, const char *letters) {
    return c != '\0' && std::strchr(letters, c) != nullptr;
}

}  // namespace

bool Letters::spell(const std::string &text) const {
    if (text.empty() || text.size() > most) return false;
    const char begin = text[0];
    if (!is_letter(begin) && !(digit_first && is_digit(begin)) && !is_among(begin, first))
        return false;
    return std::all_of(text.begin() + 1, text.end(),
                       [&](char c) { return is_letter(c) || is_digit(c) || is_among(c, rest); });
}

using nlohmann::json;

Field Field::at(const char *key) const {
    if (!has(key))
        throw std::invalid_argument(name_.empty() ? std::string("it lacks ") + key
                                                  : name_ + " lacks " + key);
    return {value_.at(key), name_.empty() ? key : name_ + "." + key};
}

bool Field::has(const char *key) const {
    if (!value_.is_object()) refuse("an object");
    return value_.contains(key);
}

std::vector<std::pair<std::string, Field>> Field::entries(std::size_t most) const {
    if (!value_.is_object() || value_.size() > most)
        refuse("an object of at most " + std::to_string(most));
    std::vector<std::pair<std::string, Field>> result;
    for (const auto &[key, value] : value_.items()) {
        result.emplace_back(key, Field(value, name_ + "[\"" + plain(key) + "\"]"));
    }
    return result;
}

void Field::only(std::initializer_list<const char *> keys) const {
    if (!value_.is_object()) refuse("an object");
    for (const auto &[key, value] : value_.items()) {
        const auto is = [&name = key](const char *known) { return name == known; };
        if (std::any_of(keys.begin(), keys.end(), is)) continue;
        throw std::invalid_argument((name_.empty() ? "it" : name_) + " has \"" + plain(key) +
                                    "\", which is not known here");
    }
}

std::vector<Field> Field::items(std::size_t most) const {
    if (!value_.is_array() || value_.size() > most)
        refuse("a list of at most " + std::to_string(most));
    std::vector<Field> result;
    for (const json &value : value_) {
        result.emplace_back(value, name_ + "[" + std::to_string(result.size()) + "]");
    }
    return result;
}

std::int64_t Field::whole(std::int64_t least, std::int64_t most) const {
    // nlohmann converts between numbers silently, so a size of 1.5 or 2^64-1 would pass.
    const bool large =
        value_.is_number_unsigned() && value_.get<std::uint64_t>() > std::uint64_t{INT64_MAX};
    if (value_.is_number_integer() && !large) {
        const auto found = value_.get<std::int64_t>();
        if (found >= least && found <= most) return found;
    }
    refuse("a whole number from " + std::to_string(least) + " to " + std::to_string(most));
}

std::vector<std::int64_t> Field::wholes(std::int64_t least, std::int64_t most,
                                        std::size_t count) const {
    std::vector<std::int64_t> result;
    for (const Field &item : items(count)) result.push_back(item.whole(least, most));
    return result;
}

bool Field::truth() const {
    if (!value_.is_boolean()) refuse("true or false");
    return value_.get<bool>();
}

std::string Field::text() const {
    bool fits = value_.is_string() && value_.get_ref<const std::string &>().size() <= kMostText;
    for (std::size_t n = 0; fits && n < value_.get_ref<const std::string &>().size(); ++n) {
        fits = !acts_on_a_terminal(value_.get_ref<const std::string &>(), n);
    }
    if (!fits) refuse("one line of text without control characters");
    return value_.get<std::string>();
}

std::string Field::matching(const Letters &letters, const char *expected) const {
    if (!value_.is_string() || !letters.spell(value_.get_ref<const std::string &>()))
        refuse(expected);
    return value_.get<std::string>();
}

std::string Field::one_of(std::initializer_list<const char *> words) const {
    std::string all;
    for (const char *word : words) {
        if (value_.is_string() && value_.get_ref<const std::string &>() == word) return word;
        all += (all.empty() ? "" : ", ") + std::string(word);
    }
    refuse("one of " + all);
}

std::string Field::sha256() const {
    if (value_.is_string()) {
        const auto &found = value_.get_ref<const std::string &>();
        if (found.size() == 64 && found.find_first_not_of("0123456789abcdef") == std::string::npos)
            return found;
    }
    refuse("a SHA-256 in hexadecimal");
}

void Field::refuse(const std::string &expected) const {
    throw std::invalid_argument((name_.empty() ? "it" : name_) + " is " + shown(value_) +
                                ", and must be " + expected);
}

}  // namespace ingot
