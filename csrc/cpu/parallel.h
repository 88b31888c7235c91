// parallel_for: fn(begin, end) over [0, n) in pieces of `grain`, on a persistent thread pool.
//
// Pieces are handed out dynamically, but their bounds depend on n and grain alone: a kernel whose
// pieces are independent gives the same bits for every number of threads.
#pragma once

#include <cstdint>

namespace vcr1::cpu {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// The first exception of fn is rethrown here, after all threads have left. A call from inside
// another parallel_for, or while another Python thread uses the pool, runs on its own thread.
void parallel_ranges(int64_t n, int64_t grain, int num_threads, RangeFn fn, void* context);

template <typename Fn>
void parallel_for(int64_t n, int64_t grain, int num_threads, Fn&& fn) {
  parallel_ranges(
      n, grain, num_threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); },
      &fn);
}

}  // namespace vcr1::cpu
