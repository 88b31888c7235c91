#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstdint>

namespace vcr1::cpu {

#if defined(__linux__)
namespace {

// MADV_POPULATE_WRITE of Linux 5.14, which the C library's headers may be too old to name.
constexpr int kPopulateWrite = 23;

uintptr_t page_size() {
  static const uintptr_t size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return size;
}

uintptr_t page_begin(const void* p) {
  return reinterpret_cast<uintptr_t>(p) / page_size() * page_size();
}

}  // namespace

bool untouched(const void* p) {
  unsigned char state = 0;
  return mincore(reinterpret_cast<void*>(page_begin(p)), page_size(), &state) == 0 && !(state & 1);
}

void populate(void* p, size_t bytes) {
  const uintptr_t begin = page_begin(p);
  const uintptr_t end = reinterpret_cast<uintptr_t>(p) + bytes;
  // Refused by older kernels: the pages then come one by one.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
}
#else
bool untouched(const void*) { return false; }
void populate(void*, size_t) {}
#endif

}  // namespace vcr1::cpu
