// The emulated GPU, as device code and the stand-ins for the toolkit's headers see it.
//
// -DVCR1_EMULATE=ON compiles csrc/cuda for the host. The threads of a block are fibers that run in
// random order from one synchronisation to the next, so a missing barrier gives a wrong result in
// some order. Checked on the way, and raised as RuntimeError from the op's call:
//   - threads of a block that reach different barriers, or end before a barrier others wait at;
//   - lanes of a warp that miss a shuffle, blocks of a cluster that miss a cluster barrier;
//   - reads of another block's shared memory before it has begun, after it has ended, or of what
//     was written there and not released;
//   - asynchronous copies that are misaligned, outside shared memory, or never waited for;
//   - launches beyond the limits of the device.
// Shared memory starts as noise and asynchronous copies arrive as late as they may, so what reads
// too early reads garbage. Dynamic shared memory ends at a page that faults.
//
// Not seen: ptxas, the memory model within a warp's instruction, the error of ex2.approx, streams,
// graphs, speed. Partial warp masks are not emulated; no kernel uses them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace vcr1::emulation {

struct Launch {
  unsigned grid, block, cluster;
  size_t shared_bytes;
};

// The GPU that launches are checked against, and the architecture that the kernels are compiled
// for: as on a real one, they differ where the driver compiles older PTX for a newer GPU.
struct Device {
  int major = 9;
  int code = 90;  // __CUDA_ARCH__ / 10
  int shared_bytes_optin = 232448;
  int driver = 13000;  // CUDA version that the driver supports, as the runtime numbers them
  int multiprocessors = 132;
  int largest_cluster = 16;  // beyond 8 only for kernels that ask for it
};
Device& device();

// Called by the host.
std::vector<Launch>& launches();  // all since it was last cleared
void seed(uint64_t value);
// Runs every block of a launch, which was checked. Throws std::runtime_error for what the kernel
// does wrong.
void run(const Launch& launch, const std::function<void()>& thread);

// Called by emulated threads.
unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
unsigned lane();
void* dynamic_shared();
void sync_block();
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source_lane);
void copy_async(void* shared, const void* global);
void commit_copies();
void wait_copies(int pending);
// As mma.sync.m16n8k32 of s8 (or u8) and u8: see csrc/cuda/ptx.cuh for the layouts.
void multiply_add(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool is_signed);
// release: what the thread wrote to its block's shared memory before, other blocks may read.
void cluster_arrive(bool release);
void cluster_wait();
float cluster_read(const float* p, unsigned rank);

}  // namespace vcr1::emulation
