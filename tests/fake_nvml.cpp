// A stand-in for libnvidia-ml.so.1 with two GPUs, so that the ways of a driver can be had without one. Files in the folder
// $FAKE_NVML switch them: "absent" (no driver loaded), "lost-N" (GPU N is off the bus), "broken" (power cannot be read),
// "xid" ("GPU XID", told once and removed).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unistd.h>

namespace {
enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, DRIVER_NOT_LOADED = 9, TIMEOUT = 10, GPU_IS_LOST = 15, UNKNOWN = 999 };
struct Device { int index; } devices[] = {{0}, {1}};
struct Event { Device *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; };
int opened = 0;

std::string path(const std::string &name) { return std::string(getenv("FAKE_NVML")) + "/" + name; }
bool is_there(const std::string &name) { return access(path(name).c_str(), F_OK) == 0; }
int state(Device *device) {
    if (is_there("absent") || opened == 0) return UNINITIALIZED;
    return is_there("lost-" + std::to_string(device->index)) ? GPU_IS_LOST : SUCCESS;
}
template <class T> int give(Device *device, T *out, T first, T second) {
    *out = device->index == 0 ? first : second;
    return state(device);
}
int text(Device *device, char *out, const char *first, const char *second) {
    strcpy(out, device->index == 0 ? first : second);
    return state(device);
}
}  // namespace

extern "C" {
int nvmlInitWithFlags(unsigned) { return is_there("absent") ? DRIVER_NOT_LOADED : (++opened, SUCCESS); }
int nvmlShutdown() { return opened == 0 ? UNINITIALIZED : (--opened, SUCCESS); }
const char *nvmlErrorString(int) { return "an error"; }
int nvmlSystemGetDriverVersion(char *out, unsigned) { return strcpy(out, "580.0"), SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *out) { return *out = 2, SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **out) { return *out = &devices[index], state(*out); }
int nvmlDeviceGetUUID(Device *device, char *out, unsigned) { return text(device, out, "GPU-zero", "GPU-one"); }
int nvmlDeviceGetName(Device *device, char *out, unsigned) { return text(device, out, "NVIDIA H200", "NVIDIA B200"); }
int nvmlDeviceGetMemoryInfo(Device *device, unsigned long long *out) { return out[0] = 1000, out[1] = 400, out[2] = 600, state(device); }
int nvmlDeviceGetUtilizationRates(Device *device, unsigned *out) { return out[1] = 7, give(device, out, 98u, 3u); }
int nvmlDeviceGetPowerUsage(Device *device, unsigned *out) { return is_there("broken") ? UNKNOWN : give(device, out, 650000u, 90000u); }
int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *out) { return give(device, out, 700000u, 600000u); }
int nvmlDeviceGetTemperature(Device *device, unsigned, unsigned *out) { return give(device, out, 64u, 31u); }
int nvmlDeviceGetClockInfo(Device *device, unsigned kind, unsigned *out) { return kind == 1 ? give(device, out, 1830u, 345u) : UNKNOWN; }
int nvmlDeviceGetCurrentClocksEventReasons(Device *device, unsigned long long *out) { return give(device, out, 4ull, 1ull); }
int nvmlDeviceGetPcieThroughput(Device *device, unsigned counter, unsigned *out) {
    usleep(20000);
    if (device->index == 1) return NOT_SUPPORTED;
    return give(device, out, counter == 0 ? 100u : 2000u, 0u);
}
int nvmlEventSetCreate(void **out) { return *out = devices, SUCCESS; }
int nvmlEventSetFree(void *) { return SUCCESS; }
int nvmlDeviceRegisterEvents(Device *device, unsigned long long kinds, void *) { return kinds == 8 ? state(device) : NOT_SUPPORTED; }
int nvmlEventSetWait_v2(void *, Event *out, unsigned) {
    usleep(20000);
    unsigned index, xid;
    FILE *file = fopen(path("xid").c_str(), "r");
    if (file == nullptr) return is_there("absent") ? UNINITIALIZED : TIMEOUT;
    const bool whole = fscanf(file, "%u %u", &index, &xid) == 2;
    fclose(file);
    if (!whole) return TIMEOUT;
    unlink(path("xid").c_str());
    *out = Event{&devices[index], 8, xid, 0, 0};
    return SUCCESS;
}
}
