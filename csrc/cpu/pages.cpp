#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

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

namespace {

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = true;

void* map(size_t bytes) {
  void* const p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}
void unmap(void* p, size_t bytes) { munmap(p, bytes); }
#else
// AddressSanitizer sees neither what is past the end of a mapping nor the use of a block after its
// release: it watches what the C library's allocator gives, of which it lets nothing be kept here.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif

void* map(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 4096, bytes) != 0) throw std::bad_alloc();
  return p;
}
void unmap(void* p, size_t) { std::free(p); }
#endif

}  // namespace

namespace {

// Without a lock: a forked child may begin while another thread holds one.
constexpr int kSlots = 8;
std::atomic<Block*> g_slots[kSlots];
std::atomic<size_t> g_kept{0};
std::atomic<unsigned> g_turn{0};

void destroy(Block* block) {
  unmap(block->data, block->bytes);
  delete block;
}

// What the slot held before.
Block* exchange(int slot, Block* block) {
  Block* const before = g_slots[slot].exchange(block, std::memory_order_acq_rel);
  if (before != nullptr) g_kept.fetch_sub(before->bytes, std::memory_order_relaxed);
  return before;
}

// In an empty slot, or in that of the block that has been kept for longest.
void keep(Block* block) {
  g_kept.fetch_add(block->bytes, std::memory_order_relaxed);
  for (auto& slot : g_slots) {
    Block* none = nullptr;
    if (slot.compare_exchange_strong(none, block, std::memory_order_acq_rel)) return;
  }
  if (Block* const before = exchange(g_turn.fetch_add(1) % kSlots, block)) destroy(before);
}

}  // namespace

Block* take_block(size_t bytes) {
  for (int slot = 0; slot < kSlots; ++slot) {
    Block* const block = exchange(slot, nullptr);
    if (block == nullptr) continue;
    if (block->bytes >= bytes && block->bytes / 2 <= bytes) return block;
    keep(block);
  }
  return new Block{map(bytes), bytes};
}

void release_block(Block* block) {
  if (!kKeeps || block->bytes > kKeptBytes) return destroy(block);
  for (int i = 0; i < kSlots && g_kept.load(std::memory_order_relaxed) + block->bytes > kKeptBytes;
       ++i)
    if (Block* const before = exchange(g_turn.fetch_add(1) % kSlots, nullptr)) destroy(before);
  keep(block);
}

size_t drop_kept_blocks() {
  size_t bytes = 0;
  for (int slot = 0; slot < kSlots; ++slot)
    if (Block* const block = exchange(slot, nullptr)) {
      bytes += block->bytes;
      destroy(block);
    }
  return bytes;
}

}  // namespace vcr1::cpu
