// A CUDA driver that hands each launch to a function of the test: see interpret.py.
#include <cstring>
#include <string>

#pragma GCC visibility push(default)

extern "C" {

using Launched = int (*)(const char *form, unsigned x, unsigned y, unsigned z, void **arguments);

static Launched launched = nullptr;
static int capability = 90;

void fake_driver_set(Launched callback, int compute_capability) {
    launched = callback;
    capability = compute_capability;
}

int cuInit(unsigned) { return 0; }

int cuCtxGetCurrent(void **context) {
    // Another context for each capability, as another device would have.
    *context = reinterpret_cast<void *>(static_cast<size_t>(capability));
    return 0;
}

int cuCtxGetDevice(int *device) {
    *device = 0;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return 0;
}

// The image of a form is its name.
int cuModuleLoadData(void **module, const void *image) {
    *module = strdup(static_cast<const char *>(image));
    return *module == nullptr;
}

int cuModuleGetFunction(void **function, void *module, const char *) {
    *function = module;
    return 0;
}

int cuFuncSetAttribute(void *, int, int) { return 0; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned,
                   unsigned, void *, void **arguments, void **) {
    return launched(static_cast<const char *>(function), x, y, z, arguments);
}

int cuGetErrorString(int, const char **text) {
    *text = "the interpreter met an error";
    return 0;
}

}  // extern "C"
