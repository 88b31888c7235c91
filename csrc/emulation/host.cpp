// The CUDA runtime of the emulation: errors, devices and the checks of a launch.
#include <map>
#include <set>
#include <string>

#include "toolkit/cuda_runtime.h"

namespace vcr1::emulation {
namespace {

constexpr size_t kSharedWithoutAsking = 48 << 10;
constexpr unsigned kMostThreads = 1024, kPortableCluster = 8;

// As the real runtime's: it stays until someone takes it, and the next good call leaves it there.
cudaError_t last_error = cudaSuccess;
std::string last_text = "no error";

std::map<const void*, int>& shared_limits() {
  static auto* const limits = new std::map<const void*, int>();
  return *limits;
}

std::set<const void*>& not_portable() {
  static auto* const kernels = new std::set<const void*>();
  return *kernels;
}

cudaError_t set_error(cudaError_t error, const char* text) {
  last_error = error;
  last_text = text;
  return error;
}

}  // namespace

cudaError_t check_launch(const Launch& launch, const void* kernel) {
  if (launch.grid == 0 || launch.grid > 0x7fffffffu || launch.block == 0 ||
      launch.block > kMostThreads || launch.block % 32 != 0)
    return set_error(cudaErrorInvalidConfiguration, "grid or block size");
  const unsigned most = not_portable().count(kernel) != 0
                            ? static_cast<unsigned>(device().largest_cluster)
                            : kPortableCluster;
  if (launch.cluster != 1 && (device().major < 9 || launch.cluster > most || launch.cluster == 0 ||
                              launch.grid % launch.cluster != 0))
    return set_error(cudaErrorInvalidConfiguration, "cluster size");
  const auto asked = shared_limits().find(kernel);
  const size_t limit = asked == shared_limits().end() ? 0 : static_cast<size_t>(asked->second);
  if (launch.shared_bytes > kSharedWithoutAsking && launch.shared_bytes > limit)
    return set_error(cudaErrorInvalidValue, "more dynamic shared memory than was asked for");
  launches().push_back(launch);
  return cudaSuccess;
}

cudaError_t allow_large_clusters(const void* kernel) {
  not_portable().insert(kernel);
  return cudaSuccess;
}

cudaError_t set_shared_limit(const void* kernel, int bytes) {
  if (bytes > device().shared_bytes_optin)
    return set_error(cudaErrorInvalidValue, "more shared memory than the device offers");
  shared_limits()[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace vcr1::emulation

using namespace vcr1::emulation;

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
  }
  return "unknown";
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : last_text.c_str();
}

// One device, always current.
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().shared_bytes_optin;
      return cudaSuccess;
  }
  return set_error(cudaErrorInvalidValue, "attribute");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = device().driver;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
