// Fibers: threads of an emulated block, each with its own stack, one of which runs at a time.
#pragma once

#include <cstddef>

namespace vcr1::emulation {

// A stack that a function runs on until it switches away. The function never returns: it ends by
// switching to the scheduler for the last time.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  void start(void (*entry)());
  // Called by the scheduler: runs the fiber until it calls leave().
  void resume();
  // Called by the fiber: back to the scheduler's resume(). `last`: it is not resumed again.
  void leave(bool last);
  // Called first on a fresh fiber.
  void arrive();

 private:
  char* stack_ = nullptr;
  void* context_ = nullptr;  // where the fiber continues
  void* home_ = nullptr;     // where the scheduler continues
  // AddressSanitizer must be told of each change of stack.
  void* fiber_fake_ = nullptr;
  void* home_fake_ = nullptr;
  const void* home_bottom_ = nullptr;
  size_t home_size_ = 0;
};

}  // namespace vcr1::emulation
