// Copies of the tiny ingots, to damage in one way each.
#pragma once

#include <ingot/session.hpp>

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

// One of the tiny ingots, such as "olmoe-ort"; read only.
std::filesystem::path tiny(const std::string &name);

// Options that name the library of operators which lies in a folder.
ingot::Options vouched(const std::filesystem::path &folder);

std::string text_of(const std::filesystem::path &file);
void write_text(const std::filesystem::path &file, const std::string &text);

// A copy of a tiny ingot that is removed with this object.
class Copy {
  public:
    explicit Copy(const std::string &name);
    ~Copy();
    Copy(const Copy &) = delete;
    Copy &operator=(const Copy &) = delete;

    const std::filesystem::path &path() const { return path_; }

    // Changes ingot.json.
    void edit(const std::function<void(nlohmann::json &)> &change) const;

    // Writes a file of the folder, with its size and hash in ingot.json, as an export would.
    void put(const std::string &name, const std::string &text) const;

  private:
    std::filesystem::path path_;
};

// The message with which a call is refused; empty where it is not.
std::string refusal(const std::function<void()> &call);

// The message with which a folder is refused.
std::string refusal(const std::filesystem::path &folder, const ingot::Options &options = {});

// Lets ingot.json say that a graph gives the logits of all tokens, as before there was logits_to_keep
// and as engines do. The graph itself may stay, since nobody has to give it that input.
void all_logits(nlohmann::json &raw);

bool contains(const std::string &text, const std::string &part);
