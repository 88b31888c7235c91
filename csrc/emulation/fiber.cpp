// Fibers by a switch of stacks. A switch costs some 10 ns, where swapcontext() makes two system
// calls: a block of 256 threads switches thousands of times per row of logits.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define VCR1_WITH_ASAN(...) __VA_ARGS__
#else
#define VCR1_WITH_ASAN(...)
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and takes those of the new one.
extern "C" void vcr1_switch_stack(void** save, void* to);
asm(R"(
.text
.globl vcr1_switch_stack
.hidden vcr1_switch_stack
.type vcr1_switch_stack,@function
vcr1_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vcr1_switch_stack,.-vcr1_switch_stack
)");
#else
#error "csrc/emulation/fiber.cpp switches stacks on x86-64 only"
#endif

namespace vcr1::emulation {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kPage = 4096;

// Kept for the process: mapping 256 stacks a block would take most of the time.
class Stacks {
 public:
  char* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      char* const stack = free_.back();
      free_.pop_back();
      return stack;
    }
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);  // an overflow faults
    return static_cast<char*>(memory);
  }
  void give(char* stack) {
    // Frames that were left and not returned from are still marked.
    VCR1_WITH_ASAN(__asan_unpoison_memory_region(stack + kPage, kStackBytes - kPage);)
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(stack);
  }

 private:
  std::vector<char*> free_;
  std::mutex mutex_;
};

Stacks& stacks() {
  static auto* const all = new Stacks();
  return *all;
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) stacks().give(stack_);
}

void Fiber::start(void (*entry)()) {
  stack_ = stacks().take();
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
  *--top = nullptr;  // as if `entry` had been called: rsp % 16 == 8
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers
  context_ = top;
}

void Fiber::resume() {
  VCR1_WITH_ASAN(__sanitizer_start_switch_fiber(&home_fake_, stack_, kStackBytes);)
  vcr1_switch_stack(&home_, context_);
  VCR1_WITH_ASAN(__sanitizer_finish_switch_fiber(home_fake_, nullptr, nullptr);)
}

void Fiber::leave(bool last) {
  (void)last;
  VCR1_WITH_ASAN(
      __sanitizer_start_switch_fiber(last ? nullptr : &fiber_fake_, home_bottom_, home_size_);)
  vcr1_switch_stack(&context_, home_);
  VCR1_WITH_ASAN(__sanitizer_finish_switch_fiber(fiber_fake_, &home_bottom_, &home_size_);)
}

void Fiber::arrive() {
  VCR1_WITH_ASAN(__sanitizer_finish_switch_fiber(nullptr, &home_bottom_, &home_size_);)
}

}  // namespace vcr1::emulation
