// Blocks, warps, clusters and their memory: see device.h.
#include "device.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>

#include "fiber.h"

namespace vcr1::emulation {
namespace {

constexpr size_t kPage = 4096;
constexpr unsigned kWarp = 32;

enum class Wait { kNothing, kBlock, kWarp, kCluster, kEnded };

struct Copy {
  void* to;
  const void* from;

  void arrive() const { std::memcpy(to, from, 16); }
};

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned index = 0;
  Wait wait = Wait::kNothing;
  uint64_t target = 0;                    // of the counter that it waits for
  std::vector<Copy> open;                 // asynchronous copies since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  uint64_t cluster_arrivals = 0;
};

struct Warp {
  uint64_t meetings = 0;
  unsigned arrived = 0;  // a bit a lane
  // Two sets: a fast lane may write for the next meeting while a slow one still reads.
  uint64_t values[2][kWarp];
  uint32_t a[2][kWarp][4], b[2][kWarp][2];
};

struct Cluster;

// Memory that is followed by a page without access.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : mapped_((bytes + kPage - 1) / kPage * kPage + kPage) {
    void* const memory =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(memory);
    mprotect(base_ + mapped_ - kPage, kPage, PROT_NONE);
    data_ = base_ + mapped_ - kPage - (bytes + 15) / 16 * 16;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, mapped_); }
  char* data() const { return data_; }

 private:
  size_t mapped_;
  char *base_, *data_;
};

struct Block {
  Cluster* cluster = nullptr;
  unsigned index = 0, rank = 0, ended = 0;
  bool begun = false;
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  unsigned at_barrier = 0;
  uint64_t barriers = 0;
  std::unique_ptr<GuardedMemory> dynamic;
  std::vector<char> statics;   // its static shared memory while another block of the cluster runs
  std::vector<char> released;  // the same as it was at the last release
};

struct Cluster {
  const Launch* launch;
  const std::function<void()>* thread;
  std::deque<Block> blocks;
  unsigned arrivals = 0;
  uint64_t completed = 0;
  bool late_copies = false;
};

struct Segment {
  char* begin = nullptr;
  size_t size = 0;
};

// One launch runs at a time in the process, and one of its threads.
struct State {
  std::mt19937_64 random{1};
  Segment statics;
  std::vector<char> noise;
  Thread* current = nullptr;
  std::string error;
};
State& state() {
  static auto* const the = new State();
  return *the;
}

Thread& self() { return *state().current; }

// What the kernel did wrong ends the launch: this thread and all others are left where they are.
[[noreturn]] void fail_launch(const std::string& what) {
  Thread& t = self();
  state().error = what + " (block " + std::to_string(t.block->index) + ", thread " +
                  std::to_string(t.index) + ")";
  t.fiber.leave(true);
  __builtin_unreachable();
}

void suspend(Wait wait, uint64_t target) {
  Thread& t = self();
  t.wait = wait;
  t.target = target;
  t.fiber.leave(false);
}

void enter_thread() {
  Thread& t = self();
  t.fiber.arrive();
  (*t.block->cluster->thread)();
  if (!t.open.empty() || !t.groups.empty()) fail_launch("a thread ends with copies under way");
  if (t.block->at_barrier != 0) fail_launch("a thread ends while others wait at __syncthreads");
  if (t.block->warps[t.index / kWarp].arrived != 0)
    fail_launch("a lane ends while its warp waits in a shuffle");
  t.wait = Wait::kEnded;
  ++t.block->ended;
  t.fiber.leave(true);
}

bool can_run(const Thread& t) {
  switch (t.wait) {
    case Wait::kNothing:
      return true;
    case Wait::kBlock:
      return t.block->barriers >= t.target;
    case Wait::kWarp:
      return t.block->warps[t.index / kWarp].meetings >= t.target;
    case Wait::kCluster:
      return t.block->cluster->completed >= t.target;
    case Wait::kEnded:
      return false;
  }
  return false;
}

// Static shared memory is `static thread_local` in the kernels (toolkit/cuda_runtime.h), and
// nothing else in this library is: its thread-local segment is the memory of the running block.
thread_local char anchor = 0;

Segment static_shared() {
  struct Search {
    char* inside;
    Segment found;
  } search{&anchor, {}};
  anchor = 1;  // the first use by a thread allocates the segment
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          auto* const begin = static_cast<char*>(info->dlpi_tls_data);
          if (header.p_type == PT_TLS && begin != nullptr && search.inside >= begin &&
              search.inside < begin + header.p_memsz)
            search.found = {begin, header.p_memsz};
        }
        return 0;
      },
      &search);
  if (search.found.begin == nullptr) throw std::runtime_error("emulation: no static shared memory");
  return search.found;
}

void fill_with_noise(char* to, size_t bytes) {
  State& s = state();
  constexpr size_t kBytes = 1 << 20;
  if (s.noise.empty()) {
    s.noise.resize(kBytes);
    std::mt19937 bits(7);
    for (char& byte : s.noise) byte = static_cast<char>(bits() >> 24);
  }
  for (size_t done = 0; done < bytes;) {
    const size_t from = s.random() % kBytes, part = std::min(bytes - done, kBytes - from);
    std::memcpy(to + done, s.noise.data() + from, part);
    done += part;
  }
}

class ClusterRun {
 public:
  ClusterRun(const Launch& launch, const std::function<void()>& thread, unsigned first_block)
      : shared_(state().statics) {
    cluster_.launch = &launch;
    cluster_.thread = &thread;
    cluster_.late_copies = state().random() % 4 != 0;
    for (unsigned rank = 0; rank < launch.cluster; ++rank) {
      Block& b = cluster_.blocks.emplace_back();
      b.cluster = &cluster_;
      b.rank = rank;
      b.index = first_block + rank;
      b.warps.resize((launch.block + kWarp - 1) / kWarp);
      b.dynamic = std::make_unique<GuardedMemory>(launch.shared_bytes);
      fill_with_noise(b.dynamic->data(), launch.shared_bytes);
      if (launch.cluster > 1) {
        b.statics.resize(shared_.size);
        fill_with_noise(b.statics.data(), shared_.size);
        b.released.resize(shared_.size);
        fill_with_noise(b.released.data(), shared_.size);
      } else {
        fill_with_noise(shared_.begin, shared_.size);
      }
      for (unsigned i = 0; i < launch.block; ++i) {
        Thread& t = b.threads.emplace_back();
        t.block = &b;
        t.index = i;
        t.fiber.start(&enter_thread);
      }
    }
  }

  void run() {
    std::vector<unsigned> order(cluster_.blocks.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    for (;;) {
      std::shuffle(order.begin(), order.end(), state().random);
      bool moved = false, all_ended = true;
      for (const unsigned rank : order) {
        Block& b = cluster_.blocks[rank];
        if (b.ended == b.threads.size()) continue;
        all_ended = false;
        moved |= run_block(b);
      }
      if (all_ended) return;
      if (!moved) throw std::runtime_error(deadlock());
    }
  }

 private:
  // Until no thread of the block can go on, or for a part of that: blocks of a cluster interleave,
  // and at times one runs to its end while the others have not moved since the last barrier.
  bool run_block(Block& b) {
    b.begun = true;
    const bool to_the_end = cluster_.blocks.size() == 1 || state().random() % 2 == 0;
    load_statics(b);
    std::vector<unsigned> order(b.threads.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    bool moved = false;
    do {
      std::shuffle(order.begin(), order.end(), state().random);
      bool any = false;
      for (const unsigned i : order) {
        Thread& t = b.threads[i];
        if (!can_run(t)) continue;
        any = true;
        t.wait = Wait::kNothing;
        state().current = &t;
        t.fiber.resume();
        state().current = nullptr;
        if (!state().error.empty()) throw std::runtime_error(state().error);
      }
      if (!any) break;
      moved = true;
    } while (to_the_end || state().random() % 4 != 0);
    return moved;
  }

  void load_statics(Block& b) {
    if (cluster_.blocks.size() == 1 || resident_ == &b) return;
    if (resident_ != nullptr) std::memcpy(resident_->statics.data(), shared_.begin, shared_.size);
    std::memcpy(shared_.begin, b.statics.data(), shared_.size);
    resident_ = &b;
  }

  std::string deadlock() const {
    unsigned counts[5] = {};
    for (const Block& b : cluster_.blocks)
      for (const Thread& t : b.threads) ++counts[static_cast<int>(t.wait)];
    return "deadlock: " + std::to_string(counts[1]) + " threads wait at __syncthreads, " +
           std::to_string(counts[2]) + " in their warp, " + std::to_string(counts[3]) +
           " at a cluster barrier; " + std::to_string(counts[4]) + " have ended (block " +
           std::to_string(cluster_.blocks[0].index) + " on)";
  }

  Cluster cluster_;
  Segment shared_;
  Block* resident_ = nullptr;
};

// All lanes of the warp come here before any goes on.
void meet(unsigned mask) {
  if (mask != ~0u) fail_launch("partial warp masks are not emulated");
  Thread& t = self();
  Warp& w = t.block->warps[t.index / kWarp];
  w.arrived |= 1u << lane();
  if (w.arrived == mask) {
    w.arrived = 0;
    ++w.meetings;
    suspend(Wait::kNothing, 0);
  } else {
    suspend(Wait::kWarp, w.meetings + 1);
  }
}

}  // namespace

Device& device() {
  static Device the;
  return the;
}

std::vector<Launch>& launches() {
  static std::vector<Launch> all;
  return all;
}

void seed(uint64_t value) { state().random.seed(value); }

void run(const Launch& launch, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  state().error.clear();
  state().statics = static_shared();
  std::vector<unsigned> order(launch.grid / launch.cluster);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i * launch.cluster;
  std::shuffle(order.begin(), order.end(), state().random);
  for (const unsigned first : order) ClusterRun(launch, thread, first).run();
}

unsigned thread_index() { return self().index; }
unsigned block_index() { return self().block->index; }
unsigned block_size() { return self().block->cluster->launch->block; }
unsigned grid_size() { return self().block->cluster->launch->grid; }
unsigned lane() { return self().index % kWarp; }
void* dynamic_shared() { return self().block->dynamic->data(); }

void sync_block() {
  Block& b = *self().block;
  if (b.ended != 0) fail_launch("__syncthreads after threads of the block have ended");
  if (++b.at_barrier == b.threads.size()) {
    b.at_barrier = 0;
    ++b.barriers;
    suspend(Wait::kNothing, 0);
  } else {
    suspend(Wait::kBlock, b.barriers + 1);
  }
}

void sync_warp(unsigned mask) { meet(mask); }

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane) {
  Thread& t = self();
  Warp& w = t.block->warps[t.index / kWarp];
  auto& values = w.values[w.meetings % 2];
  values[lane()] = value;
  meet(mask);
  return values[source_lane];
}

void multiply_add(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_signed) {
  Thread& t = self();
  Warp& w = t.block->warps[t.index / kWarp];
  const auto set = w.meetings % 2;
  std::copy(a, a + 4, w.a[set][lane()]);
  std::copy(b, b + 2, w.b[set][lane()]);
  meet(~0u);
  const unsigned g = lane() / 4, pair = lane() % 4;
  for (unsigned k = 0; k < 4; ++k) {
    const unsigned row = g + (k >= 2 ? 8 : 0), column = 2 * pair + k % 2;
    auto sum = static_cast<uint32_t>(c[k]);
    for (unsigned i = 0; i < 32; ++i) {
      // Row `row % 8` of a and column `column` of b, inputs 4 q to 4 q + 3 (and 16 on) by lane q.
      const unsigned quad = i % 16 / 4, shift = 8 * (i % 4), half = i / 16;
      const unsigned byte_a = w.a[set][row % 8 * 4 + quad][2 * half + row / 8] >> shift & 255;
      const unsigned byte_b = w.b[set][column * 4 + quad][half] >> shift & 255;
      const int left = is_signed ? static_cast<int8_t>(byte_a) : static_cast<int>(byte_a);
      sum += static_cast<uint32_t>(left * static_cast<int>(byte_b));
    }
    c[k] = static_cast<int>(sum);
  }
}

void copy_async(void* shared, const void* global) {
  Thread& t = self();
  const auto* const begin = t.block->dynamic->data();
  const size_t size = (t.block->cluster->launch->shared_bytes + 15) / 16 * 16;
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(global) % 16 != 0)
    fail_launch("cp.async: both addresses must be multiples of 16");
  if (static_cast<char*>(shared) < begin || static_cast<char*>(shared) + 16 > begin + size)
    fail_launch("cp.async: outside dynamic shared memory");
  volatile char probe = static_cast<const char*>(global)[0];  // faults here, not in wait_copies()
  probe = static_cast<const char*>(global)[15];
  (void)probe;
  t.open.push_back({shared, global});
  if (t.block->cluster->late_copies) {
    fill_with_noise(static_cast<char*>(shared), 16);
  } else {
    t.open.back().arrive();
  }
}

void commit_copies() {
  Thread& t = self();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void wait_copies(int pending) {
  Thread& t = self();
  while (static_cast<int>(t.groups.size()) > pending) {
    if (t.block->cluster->late_copies)
      for (const Copy& copy : t.groups.front()) copy.arrive();
    t.groups.erase(t.groups.begin());
  }
}

// Kernels compiled for less than compute capability 9.0 know no clusters: csrc/cuda/cluster.cuh.
void cluster_arrive(bool release) {
  if (device().code < 90) return;
  Thread& t = self();
  Cluster& c = *t.block->cluster;
  auto& released = t.block->released;
  if (release && !released.empty())
    std::memcpy(released.data(), state().statics.begin, released.size());
  ++t.cluster_arrivals;
  if (++c.arrivals == c.blocks.size() * c.launch->block) {
    c.arrivals = 0;
    ++c.completed;
  }
  suspend(Wait::kNothing, 0);
}

void cluster_wait() {
  if (device().code < 90) return;
  Thread& t = self();
  if (t.cluster_arrivals == 0) fail_launch("barrier.cluster.wait before any arrive");
  suspend(Wait::kCluster, t.cluster_arrivals);
}

float cluster_read(const float* p, unsigned rank) {
  if (device().code < 90) return *p;
  Block& own = *self().block;
  Cluster& c = *own.cluster;
  if (rank >= c.blocks.size()) fail_launch("mapa: the cluster has no block of this rank");
  Block& other = c.blocks[rank];
  // A thread may exit once no other block reads its shared memory, and must not have exited before.
  if (!other.begun || other.ended != 0)
    fail_launch("shared memory of a block that has not begun or has ended");
  if (c.blocks.size() == 1) return *p;
  const auto offset = reinterpret_cast<const char*>(p) - state().statics.begin;
  const char* const memory = &other == &own ? state().statics.begin : other.statics.data();
  float value;
  std::memcpy(&value, memory + offset, sizeof(value));
  if (std::memcmp(&value, other.released.data() + offset, sizeof(value)) != 0)
    fail_launch("shared memory that was written after its block's last release");
  return value;
}

}  // namespace vcr1::emulation
