// Runs CUDA kernels on the CPU, for tests: each CUDA thread is a coroutine, barriers and shuffles switch between them.
//
// Included ahead of a .cu compiled as C++. It covers what csrc/ uses and no more. Blocks run one after another. Dynamic
// shared memory starts as NaN, so that a kernel that reads what it did not write is seen, and CUDA_ON_CPU_REVERSED=1 runs
// the threads of a block in the opposite order, so that a missing barrier changes the result.
#pragma once

#define POTSTILL_ON_CPU
#define POTSTILL_KEY CPU

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_cpu::dynamic_shared.data())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

struct alignas(16) Chunk {
  uint32_t word[4];
};
inline std::vector<Chunk> dynamic_shared;

struct Barrier {
  int waiting = 0, generation = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

inline std::vector<Thread> threads;
inline std::vector<Barrier> warp_barriers;
inline std::vector<uint32_t> exchange;  // one word a thread, for shuffles
inline Barrier block_barrier;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int alive;
inline bool progress;  // since the last round of all threads: a barrier opened, or a thread finished
constexpr size_t STACK = 256 * 1024;

inline void wait(Barrier& barrier, int members) {
  const int generation = barrier.generation;
  if (++barrier.waiting == members) {
    barrier.waiting = 0;
    ++barrier.generation;
    progress = true;
  }
  const unsigned self = threadIdx.x;
  while (barrier.generation == generation) swapcontext(&threads[self].context, &scheduler);
}

inline void thread_main() {
  body();
  threads[threadIdx.x].done = true;
  --alive;
  progress = true;
}

// Blocks one after another; in a block, threads in turn until each has finished.
inline void launch(std::function<void()> kernel, dim3 grid, unsigned block, size_t shared) {
  const bool reversed = std::getenv("CUDA_ON_CPU_REVERSED") != nullptr;
  body = std::move(kernel);
  gridDim = grid;
  blockDim = dim3(block);
  threads.resize(block);
  for (auto& thread : threads) {
    if (!thread.stack) thread.stack.reset(new char[STACK]);
  }
  exchange.assign(block, 0);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        const uint32_t nan = 0x7fc00000u;
        dynamic_shared.assign((shared + 15) / 16 + 1, Chunk{{nan, nan, nan, nan}});
        block_barrier = Barrier();
        warp_barriers.assign((block + 31) / 32, Barrier());
        alive = static_cast<int>(block);
        for (unsigned t = 0; t < block; ++t) {
          threads[t].done = false;
          getcontext(&threads[t].context);
          threads[t].context.uc_stack.ss_sp = threads[t].stack.get();
          threads[t].context.uc_stack.ss_size = STACK;
          threads[t].context.uc_link = &scheduler;
          makecontext(&threads[t].context, thread_main, 0);
        }
        while (alive > 0) {
          progress = false;
          for (unsigned i = 0; i < block; ++i) {
            const unsigned t = reversed ? block - 1 - i : i;
            if (threads[t].done) continue;
            threadIdx = dim3(t, 0, 0);
            blockIdx = dim3(x, y, z);
            swapcontext(&scheduler, &threads[t].context);
          }
          if (!progress) {
            std::fputs("cuda_on_cpu: every thread waits at a barrier that some will never reach\n", stderr);
            std::abort();
          }
        }
      }
    }
  }
}

}  // namespace cuda_on_cpu

// A thread that has returned no longer counts, as on the GPU; ours all reach every barrier or none does.
inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block_barrier, static_cast<int>(blockDim.x)); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  using namespace cuda_on_cpu;
  const unsigned warp = threadIdx.x / 32, first = warp * 32, self = threadIdx.x;
  const int members = static_cast<int>(std::min(32u, blockDim.x - first));
  std::memcpy(&exchange[self], &value, 4);
  wait(warp_barriers[warp], members);
  float got;
  std::memcpy(&got, &exchange[first + ((self - first) ^ static_cast<unsigned>(mask))], 4);
  wait(warp_barriers[warp], members);
  return got;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
