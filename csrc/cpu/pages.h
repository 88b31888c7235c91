// Large memory for results. Fresh pages cost more than writing them: the system zeroes
// each at its first use, and unmaps it at its release.
#pragma once

#include <cstddef>

namespace vcr1::cpu {

// Whether nothing has been written yet to the page that holds *p. False where that is not known.
bool untouched(const void* p);

// Has the pages of [p, p + bytes) made now, all in one call, instead of at the first write to each.
// What they hold is kept. Where the system cannot, nothing happens.
void populate(void* p, size_t bytes);

// At least `bytes`, from the start of a page: what was released before, with any contents, where
// that is not more than twice as large, or else fresh. Throws std::bad_alloc.
struct Block {
  void* data;
  size_t bytes;
};
Block* take_block(size_t bytes);

// From any thread, without Python. At most kKeptBytes are kept; the oldest block is released.
// MADV_FREE, with which the system could take kept pages back, made their next use up to 1 us a
// page slower.
constexpr size_t kKeptBytes = size_t{256} << 20;
void release_block(Block* block);

// Gives all kept blocks back to the system; returns how many bytes they had.
size_t drop_kept_blocks();

}  // namespace vcr1::cpu
