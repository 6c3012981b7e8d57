// Moving keys and values: new tokens into their slots, forked blocks into their copies.
#undef NDEBUG  // a slot outside the cache stops the kernel in every build
#include <cassert>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace thinktwice::gpu {
namespace {

constexpr int kCopyThreads = 256;

// Unit: the piece that one thread moves at a time. Sizes and strides here count units.
template <typename Unit>
__global__ void __launch_bounds__(kCopyThreads) write_kv_kernel(CacheWrite w) {
  const int64_t token = blockIdx.x, slot = w.slots[token];
  assert(slot >= 0 && slot < w.blocks * w.block_size);
  const int64_t first = slot / w.block_size * w.heads * w.block_size + slot % w.block_size;
  const bool keys = blockIdx.y == 0;
  const auto* const from =
      static_cast<const Unit*>(keys ? w.k : w.v) + token * (keys ? w.k_token_stride : w.v_token_stride);
  auto* const to = static_cast<Unit*>(keys ? w.k_cache : w.v_cache);
  const int64_t head_stride = keys ? w.k_head_stride : w.v_head_stride;
  for (int64_t i = threadIdx.x; i < w.heads * w.dim; i += kCopyThreads) {
    const int64_t head = i / w.dim, d = i % w.dim;
    to[(first + head * w.block_size) * w.dim + d] = from[head * head_stride + d];
  }
}

// Every thread takes one piece of a block through all pairs, so that the pairs follow one another.
template <typename Unit>
__global__ void __launch_bounds__(kCopyThreads) copy_blocks_kernel(BlockCopy w, int64_t units) {
  const int64_t unit = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x;
  if (unit >= units) return;
  auto* const layer =
      static_cast<Unit*>(blockIdx.z == 0 ? w.k_cache : w.v_cache) + blockIdx.y * w.blocks * units + unit;
  for (int64_t i = 0; i < w.num_pairs; ++i) {
    const int64_t from = w.pairs[2 * i], to = w.pairs[2 * i + 1];
    assert(from >= 0 && from < w.blocks && to >= 0 && to < w.blocks);
    layer[to * units] = layer[from * units];
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0; }

template <typename Unit>
cudaError_t write_in_units(CacheWrite w, cudaStream_t stream) {
  const int64_t per_unit = static_cast<int64_t>(sizeof(Unit)) / w.element_size;
  for (int64_t* size : {&w.dim, &w.k_token_stride, &w.k_head_stride, &w.v_token_stride, &w.v_head_stride})
    *size /= per_unit;
  return launch(write_kv_kernel<Unit>, grid_of(w.tokens, 2), kCopyThreads, 0, stream, w);
}

template <typename Unit>
cudaError_t copy_in_units(const BlockCopy& w, cudaStream_t stream) {
  const int64_t units = w.block_bytes / static_cast<int64_t>(sizeof(Unit));
  return launch(copy_blocks_kernel<Unit>, grid_of((units + kCopyThreads - 1) / kCopyThreads, w.layers, 2),
                kCopyThreads, 0, stream, w, units);
}

}  // namespace

cudaError_t launch_write_kv(const CacheWrite& w, cudaStream_t stream) {
  bool wide = is_aligned(w.k) && is_aligned(w.v) && is_aligned(w.k_cache) && is_aligned(w.v_cache);
  for (const int64_t size : {w.dim, w.k_token_stride, w.k_head_stride, w.v_token_stride, w.v_head_stride})
    wide = wide && size * w.element_size % static_cast<int64_t>(sizeof(uint4)) == 0;
  if (wide) return write_in_units<uint4>(w, stream);
  if (w.element_size == sizeof(uint32_t)) return write_in_units<uint32_t>(w, stream);
  return write_in_units<uint16_t>(w, stream);
}

cudaError_t launch_copy_blocks(const BlockCopy& w, cudaStream_t stream) {
  if (w.block_bytes % sizeof(uint4) == 0 && is_aligned(w.k_cache) && is_aligned(w.v_cache))
    return copy_in_units<uint4>(w, stream);
  return copy_in_units<uint16_t>(w, stream);
}

}  // namespace thinktwice::gpu
