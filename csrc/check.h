// Errors at the boundary. std::invalid_argument becomes ValueError in Python, std::runtime_error
// RuntimeError; nothing here ever ends the process.
#pragma once

#include <sstream>
#include <stdexcept>

namespace vcr1 {

template <typename Error, typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

}  // namespace vcr1

// The caller's mistake: VCR1_CHECK(k == k2, "labels: K is ", k2, ", expected ", k).
#define VCR1_CHECK(condition, ...)                                      \
  do {                                                                  \
    if (!(condition)) ::vcr1::fail<std::invalid_argument>(__VA_ARGS__); \
  } while (false)

#ifdef VCR1_CUDA
#include <cuda_runtime_api.h>

// `op` is the name the user called: the message reads "gather_logprobs: cudaErrorX (text)".
#define CUDA_CHECK(op, expression)                                       \
  do {                                                                   \
    const cudaError_t error_ = (expression);                             \
    if (error_ != cudaSuccess) ::vcr1::fail_with_cuda_error(op, error_); \
  } while (false)

namespace vcr1 {

[[noreturn]] inline void fail_with_cuda_error(const char* op, cudaError_t error) {
  // A failed call also leaves its error in the runtime, where the next op would take it for its
  // own.
  cudaGetLastError();
  fail<std::runtime_error>(op, ": ", cudaGetErrorName(error), " (", cudaGetErrorString(error), ")");
}

// Makes `device` current for a scope: torch's current device may be another one.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    CUDA_CHECK(op, cudaGetDevice(&previous_));
    if (previous_ != device) CUDA_CHECK(op, cudaSetDevice(device));
    changed_ = previous_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace vcr1
#endif  // VCR1_CUDA
