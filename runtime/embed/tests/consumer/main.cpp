// Prints the likeliest token after token 1; includes both interfaces, as a program may.
#include <ingot.h>
#include <ingot/session.hpp>

#include <iostream>

int main(int, char **words) {
    try {
        ingot::Session session(words[1]);
        ingot::GenerateOptions options;
        options.max_new_tokens = 1;
        std::cout << session.generate({{1}}, options)[0][0] << '\n';
    } catch (const ingot::Error &error) {
        std::cout << error.what() << '\n';
        return 2;
    }
}
