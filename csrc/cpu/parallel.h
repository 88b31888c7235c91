// parallel_for: fn(begin, end) over [0, n) in pieces of `grain`, on torch's OpenMP threads, or on a
// persistent pool of our own.
//
// Torch's threads, when an operator is done, spin for milliseconds in wait of the next: threads of
// ours beside them would have half a processor each where there are as many threads as processors.
//
// Pieces are handed out dynamically, but their bounds depend on n and grain alone: a kernel whose
// pieces are independent gives the same bits for every number of threads.
#pragma once

#include <cstdint>

namespace vcr1::cpu {

// GOMP_parallel of the OpenMP runtime: runs body(data) on each of `threads` threads.
using TeamFn = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// The runtime to run on from now on; null for our own pool. A forked child, in which no runtime of
// OpenMP can start threads, goes back to the pool by itself.
void use_team(TeamFn team);

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// The first exception of fn is rethrown here, after all threads have left. A call from inside
// another parallel_for runs on its own thread; on our pool, one while another Python thread uses it
// does so too.
void parallel_ranges(int64_t n, int64_t grain, int num_threads, RangeFn fn, void* context);

template <typename Fn>
void parallel_for(int64_t n, int64_t grain, int num_threads, Fn&& fn) {
  parallel_ranges(
      n, grain, num_threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); },
      &fn);
}

}  // namespace vcr1::cpu
