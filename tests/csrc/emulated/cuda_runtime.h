// As much of CUDA as the kernels use, on the CPU, so that their sources can be run and tested without a GPU.
// A block's threads are fibres that take turns: a warp runs until it waits for the others, and they go in
// either order, so that a missing barrier shows in one of the two.
#pragma once

#include <setjmp.h>
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
#define __launch_bounds__(...)

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <typename T, typename U>
T atomicAdd(T* to, U value) {
  const T before = *to;
  *to += static_cast<T>(value);
  return before;
}

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

// Where some threads wait for one another; those that have returned are not waited for.
struct Barrier {
  int members = 0, waiting = 0;
  uint64_t round = 0;

  void open_if_full() {
    if (members > 0 && waiting < members) return;
    waiting = 0;
    ++round;
  }
};

struct Thread {
  ucontext_t context;
  jmp_buf place;  // where it waits; faster to jump to than a context, which keeps the signal mask
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 index;
  bool ended = false, at_block_barrier = false;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<uint64_t> slots;  // one word per thread, what it shows to its warp
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  std::function<void()> body;
  int current = 0;
  bool backwards = false;
};

inline Block* block;
inline dim3 block_index;

inline void yield() {
  if (_setjmp(block->threads[block->current].place) == 0) _longjmp(block->scheduler_place, 1);
}

inline void resume(Thread& thread) {
  if (_setjmp(block->scheduler_place) != 0) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  swapcontext(&block->scheduler, &thread.context);
}

inline void wait(Barrier& barrier) {
  const uint64_t round = barrier.round;
  ++barrier.waiting;
  barrier.open_if_full();
  bool& flag = block->threads[block->current].at_block_barrier;
  flag = &barrier == &block->all;
  while (barrier.round == round) yield();
  flag = false;
}

inline Barrier& own_warp() { return block->warps[block->current / kWarp]; }

inline void run_thread() {
  block->body();
  block->threads[block->current].ended = true;
  for (Barrier* barrier : {&block->all, &own_warp()}) {
    --barrier->members;
    if (barrier->waiting > 0) barrier->open_if_full();
  }
  yield();
}

// Runs a warp as far as it gets without the others; false if all its threads have ended.
inline bool run_warp(int warp, int threads, bool backwards) {
  const int first = warp * kWarp, end = std::min(first + kWarp, threads);
  for (;;) {
    bool alive = false, waiting = true;
    for (int i = first; i < end; ++i) {
      block->current = backwards ? first + end - 1 - i : i;
      Thread& thread = block->threads[block->current];
      if (thread.ended) continue;
      resume(thread);
      alive = true;
      waiting &= thread.ended || thread.at_block_barrier;
    }
    if (!alive || waiting) return alive;
  }
}

inline void run_block(int threads, const std::function<void()>& body, bool backwards) {
  static std::vector<Thread> kept;
  Block here;
  if (static_cast<int>(kept.size()) < threads) kept.resize(threads);
  here.threads.swap(kept);
  here.warps.resize((threads + kWarp - 1) / kWarp);
  here.slots.resize(here.warps.size() * kWarp);
  here.all.members = threads;
  here.body = body;
  block = &here;
  for (int t = 0; t < threads; ++t) {
    ++here.warps[t / kWarp].members;
    Thread& thread = here.threads[t];
    thread.started = thread.ended = thread.at_block_barrier = false;
    thread.index = dim3(static_cast<unsigned>(t), 0, 0);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStackBytes;
    makecontext(&thread.context, run_thread, 0);
  }
  const int warps = static_cast<int>(here.warps.size());
  for (bool running = true; running;) {
    running = false;
    for (int w = 0; w < warps; ++w) running |= run_warp(backwards ? warps - 1 - w : w, threads, backwards);
  }
  here.threads.swap(kept);
}

// Shows the warp a value, and returns pick(shown), where shown(lane) is what that lane shows.
template <typename T, typename Pick>
auto from_warp(T value, const Pick& pick) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const int first = block->current / kWarp * kWarp;
  std::memcpy(&block->slots[block->current], &value, sizeof value);
  wait(own_warp());
  const auto result = pick([first](int lane) {
    T shown;
    std::memcpy(&shown, &block->slots[first + lane], sizeof shown);
    return shown;
  });
  wait(own_warp());
  return result;
}

inline int lane() { return block->current % kWarp; }

}  // namespace emulated

#define threadIdx (emulated::block->threads[emulated::block->current].index)
#define blockIdx (emulated::block_index)

inline void __syncthreads() { emulated::wait(emulated::block->all); }
inline void __syncwarp() { emulated::wait(emulated::own_warp()); }

inline int __syncthreads_or(int value) {
  static int any;
  if (emulated::block->current == 0) any = 0;
  __syncthreads();
  any |= value;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}

inline unsigned __ballot_sync(unsigned, bool value) {
  return emulated::from_warp<uint64_t>(value, [](const auto& shown) {
    uint64_t bits = 0;
    for (int lane = 0; lane < emulated::kWarp; ++lane) bits |= (shown(lane) & 1) << lane;
    return bits;
  });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return emulated::from_warp(value, [step](const auto& shown) { return shown(emulated::lane() ^ step); });
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int step) {
  return emulated::from_warp(value, [step](const auto& shown) {
    return shown(std::min(emulated::lane() + step, emulated::kWarp - 1));
  });
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  return emulated::from_warp(
      value, [step](const auto& shown) { return shown(std::max(emulated::lane() - step, 0)); });
}

using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 gridDim;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

namespace emulated {
inline int launches_left = -1;  // until one fails; below 0: none does

inline cudaError_t outcome() {
  if (launches_left < 0) return cudaSuccess;
  return launches_left-- == 0 ? cudaErrorInvalidValue : cudaSuccess;
}
}  // namespace emulated

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return emulated::outcome();
}

// A device on which few blocks run at a time.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

namespace emulated {
inline bool backwards = false;  // the order of threads and blocks
inline std::function<void(size_t)>
    refill;  // fills the dynamic shared memory with garbage before a block runs
}  // namespace emulated

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                        Arguments&&... arguments) {
  if (const cudaError_t error = emulated::outcome(); error != cudaSuccess) return error;
  const dim3 grid = config->gridDim;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  gridDim = grid;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t index = emulated::backwards ? blocks - 1 - i : i;
    emulated::block_index =
        dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
             static_cast<unsigned>(index / grid.x / grid.y));
    if (emulated::refill) emulated::refill(config->dynamicSmemBytes);
    emulated::run_block(
        static_cast<int>(config->blockDim.x), [&] { kernel(arguments...); }, emulated::backwards);
  }
  return cudaSuccess;
}
