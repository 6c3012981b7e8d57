// Starting a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace thinktwice::gpu {

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// An empty grid is no error and starts nothing.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  // More than 48 KB of shared memory must be asked for.
  if (shared_bytes > 48 * 1024) {
    const cudaError_t granted = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared_bytes));
    if (granted != cudaSuccess) return granted;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// Launches one after another, up to the first that fails.
template <typename... Launches>
cudaError_t in_turn(const Launches&... launches) {
  cudaError_t error = cudaSuccess;
  (void)((... && ((error = launches()) == cudaSuccess)));
  return error;
}

}  // namespace thinktwice::gpu
