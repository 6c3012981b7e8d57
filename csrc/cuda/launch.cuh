// Starting a kernel on a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace thinktwice::gpu {

inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// More than 48 KB of shared memory must be asked for.
template <typename Kernel>
cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// An empty grid is no error and starts nothing.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (const cudaError_t error = allow_shared(kernel, shared_bytes); error != cudaSuccess) return error;
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

// As many blocks as run at a time, and at most `most`: they share out the work themselves.
template <typename Kernel, typename... Arguments>
cudaError_t launch_resident(Kernel* kernel, int64_t most, int threads, size_t shared_bytes,
                            cudaStream_t stream, Arguments&&... arguments) {
  int device = 0, processors = 0, blocks = 0;
  const cudaError_t error = in_turn(
      [&] { return allow_shared(kernel, shared_bytes); }, [&] { return cudaGetDevice(&device); },
      [&] { return cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device); },
      [&] { return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes); });
  if (error != cudaSuccess) return error;
  const int64_t resident = int64_t{processors} * (blocks > 0 ? blocks : 1);
  return launch(kernel, grid_of(resident < most ? resident : most), threads, shared_bytes, stream,
                std::forward<Arguments>(arguments)...);
}

}  // namespace thinktwice::gpu
