// A thread for each row.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace thinktwice::gpu {
namespace {

constexpr int kAdvanceThreads = 128;

__global__ void __launch_bounds__(kAdvanceThreads) advance_kernel(Advance work) {
  const int64_t row = int64_t{blockIdx.x} * kAdvanceThreads + threadIdx.x;
  if (row < work.rows) advance_row(work, row);
}

}  // namespace

cudaError_t launch_advance(const Advance& work, cudaStream_t stream) {
  return launch(advance_kernel, grid_of((work.rows + kAdvanceThreads - 1) / kAdvanceThreads), kAdvanceThreads,
                0, stream, work);
}

}  // namespace thinktwice::gpu
