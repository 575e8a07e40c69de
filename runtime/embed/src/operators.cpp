// The library of Ingot's own kernels that a graph needs: which one is loaded.
//
// A library is a program, and a folder may be anybody's. So the one that lies in an ingot is what was
// validated, and not what is loaded: loaded is the one that the caller names, and only where it is the
// same to the byte.
#include "backend.hpp"

namespace ingot {

namespace fs = std::filesystem;

fs::path operators_for(const fs::path &folder, const Manifest &manifest, const fs::path &named) {
    if (manifest.kernels != "ingot") return {};
    const std::string ways =
        "; name " + (folder / kOperators).string() +
        " as the library of operators if you would run a program of whoever made it, or the one that "
        "`make cpu` builds of the Ingot that it was made with, or export it again with --kernels ort.";
    if (named.empty()) {
        throw Error(folder.string() +
                    " runs on Ingot's own kernels, and no library that has them is named" + ways);
    }
    std::error_code none;
    if (!fs::is_regular_file(named, none)) {
        throw Error(folder.string() + " runs on Ingot's own kernels, and " + named.string() +
                    " is missing" + ways);
    }
    std::string found;
    try {
        found = sha256(named);
    } catch (const Error &) {
        throw Error(named.string() + ", the library of operators, cannot be read" + ways);
    }
    // Compared whatever is verified of the folder: this one is run.
    if (found != manifest.files.at(kOperators).sha256) {
        throw Error(folder.string() + " was validated with another library of kernels than " +
                    named.string() + ways);
    }
    // A name without a folder would be looked for where the system keeps libraries.
    return fs::absolute(named);
}

}  // namespace ingot
