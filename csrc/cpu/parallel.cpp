#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace vcr1::cpu {
namespace {

struct Job {
  int64_t n, grain;
  RangeFn fn;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  void run() {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n || failed.load(std::memory_order_relaxed)) return;
      try {
        fn(context, begin, std::min(begin + grain, n));
      } catch (...) {
        // exchange() elects one writer; the pool's mutex publishes it to the caller.
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  // False when the pool is taken: the caller then works alone.
  bool try_run(Job& job, int helpers) {
    if (taken_.test_and_set(std::memory_order_acquire)) return false;
    const Release release{taken_};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(threads_.size()) < helpers)
        threads_.emplace_back([this, index = threads_.size()] { serve(index); });
      job_ = &job;
      wanted_ = helpers;
      ++generation_;
    }
    wake_.notify_all();
    job.run();
    // Nothing is left to hand out: a helper that has not come yet, because its processor was busy
    // or asleep, is not waited for.
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    done_.wait(lock, [this] { return running_ == 0; });
    return true;
  }

 private:
  // A flag, not a mutex: a nested call on the owner's own thread must be refused too.
  struct Release {
    std::atomic_flag& flag;
    ~Release() { flag.clear(std::memory_order_release); }
  };

  void serve(size_t index) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      Job* const job = job_;
      if (job == nullptr || static_cast<int>(index) >= wanted_) continue;
      ++running_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::atomic_flag taken_ = ATOMIC_FLAG_INIT;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> threads_;
  Job* job_ = nullptr;
  uint64_t generation_ = 0;
  int wanted_ = 0, running_ = 0;
};

// Never destroyed: joining threads at interpreter exit can dead-lock. A forked child (a data
// loader's worker) has none of the threads, so it forgets the pool and makes its own.
std::atomic<Pool*> g_pool{nullptr};
std::mutex g_pool_mutex;
std::atomic<TeamFn> g_team{nullptr};

void forget_threads_after_fork() {
  static const int registered =
      pthread_atfork([] { g_pool_mutex.lock(); }, [] { g_pool_mutex.unlock(); },
                     [] {
                       g_pool = nullptr;
                       g_team = nullptr;
                       g_pool_mutex.unlock();
                     });
  (void)registered;
}

Pool& pool() {
  if (Pool* const ready = g_pool.load(std::memory_order_acquire)) return *ready;
  const std::lock_guard<std::mutex> lock(g_pool_mutex);
  if (g_pool.load() == nullptr) {
    forget_threads_after_fork();
    g_pool.store(new Pool, std::memory_order_release);
  }
  return *g_pool.load();
}

}  // namespace

void use_team(TeamFn team) {
  forget_threads_after_fork();
  g_team = team;
}

void parallel_ranges(int64_t n, int64_t grain, int num_threads, RangeFn fn, void* context) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  Job job{n, grain, fn, context};
  const int64_t pieces = (n + grain - 1) / grain;
  const int helpers = static_cast<int>(std::min<int64_t>(num_threads, pieces)) - 1;
  const TeamFn team = helpers > 0 ? g_team.load(std::memory_order_relaxed) : nullptr;
  if (team != nullptr)
    team([](void* data) { static_cast<Job*>(data)->run(); }, &job, helpers + 1, 0);
  else if (helpers <= 0 || !pool().try_run(job, helpers))
    job.run();
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace vcr1::cpu
