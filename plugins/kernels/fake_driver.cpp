// A CUDA driver that hands each launch to a function of the test: see interpret.py.
//
// It has two devices, each with its primary context, and as CUDA has it a thread begins without a
// current one. What is loaded into a context can be launched in that one alone.
#include <cstddef>
#include <string>

#pragma GCC visibility push(default)

extern "C" {

using Launched = int (*)(const char *form, unsigned x, unsigned y, unsigned z, void **arguments);

constexpr int kDevices = 2;
constexpr int kInvalidValue = 1, kInvalidContext = 201, kInvalidHandle = 400;
constexpr int kCaptureUnsupported = 900;

struct Context {
    int device;
    int capability;
    unsigned long long id;
};

struct Kernel {
    std::string form;
    unsigned long long context;
};

static Launched launched = nullptr;
static Context contexts[kDevices] = {{0, 90, 1}, {1, 90, 2}};
static unsigned long long last_id = kDevices;
static bool capturing = false;
static int load_result = 0;
static int cuda_version = 13000;
static thread_local Context *current = nullptr;

// What was done since fake_driver_set: modules loaded, and per device contexts retained and set.
int fake_driver_loads = 0;
int fake_driver_retained[kDevices] = {0, 0};
int fake_driver_bound[kDevices] = {0, 0};

// Begins anew as a first device of this compute capability, with a context of its own.
void fake_driver_set(Launched callback, int compute_capability) {
    launched = callback;
    contexts[0] = {0, compute_capability, ++last_id};
    fake_driver_loads = 0;
    capturing = false;
    for (int i = 0; i < kDevices; ++i) fake_driver_retained[i] = fake_driver_bound[i] = 0;
}

// Makes a device's context current in this thread, as its user would; none for -1.
void fake_driver_enter(int device) { current = device < 0 ? nullptr : &contexts[device]; }

// Destroys a device's context and makes another at its address, as a reset of the device does.
void fake_driver_remake(int device) { contexts[device].id = ++last_id; }

// Acts as while a stream is captured into a graph: nothing can be loaded.
void fake_driver_capture(int on) { capturing = on != 0; }

// From now on a load answers this, and the driver supports this version of CUDA (12040 is 12.4).
void fake_driver_set_load(int result, int version) {
    load_result = result;
    cuda_version = version;
}

int cuInit(unsigned) { return 0; }

int cuDriverGetVersion(int *version) {
    *version = cuda_version;
    return 0;
}

int cuCtxGetCurrent(void **context) {
    *context = current;
    return 0;
}

int cuCtxSetCurrent(void *context) {
    current = static_cast<Context *>(context);
    ++fake_driver_bound[current->device];
    return 0;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device < 0 || device >= kDevices) return kInvalidValue;
    ++fake_driver_retained[device];
    *context = &contexts[device];
    return 0;
}

#ifndef FAKE_DRIVER_WITHOUT_IDS
int cuCtxGetId(void *context, unsigned long long *id) {
    *id = static_cast<Context *>(context)->id;
    return 0;
}
#endif

int cuCtxGetDevice(int *device) {
    if (current == nullptr) return kInvalidContext;
    *device = current->device;
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const int capability = contexts[device].capability;
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return 0;
}

// The image of a form is its name. Like CUDA's, a module lives as long as its context, and longer
// here: no test loads many.
int cuModuleLoadData(void **module, const void *image) {
    if (current == nullptr) return kInvalidContext;
    if (load_result != 0) return load_result;
    if (capturing) return kCaptureUnsupported;
    ++fake_driver_loads;
    *module = new Kernel{static_cast<const char *>(image), current->id};
    return 0;
}

int cuModuleGetFunction(void **function, void *module, const char *) {
    *function = module;
    return 0;
}

int cuFuncSetAttribute(void *, int, int) { return 0; }

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned, unsigned, unsigned,
                   unsigned, void *, void **arguments, void **) {
    const Kernel &kernel = *static_cast<Kernel *>(function);
    if (current == nullptr || kernel.context != current->id) return kInvalidHandle;
    return launched(kernel.form.c_str(), x, y, z, arguments);
}

int cuGetErrorString(int, const char **text) {
    *text = "the interpreter met an error";
    return 0;
}

}  // extern "C"
