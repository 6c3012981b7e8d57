// Queries and keys between projection and attention: normed, rotated, and the keys and values put into the
// cache.
#undef NDEBUG  // a slot outside the cache stops the kernel in every build
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace thinktwice::gpu {
namespace {

constexpr int kRotaryThreads = 256;
constexpr int kQuad = 4;  // elements that a thread moves at a time

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float& to) { to = x; }
__device__ inline void narrow(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half& to) { to = __float2half_rn(x); }

template <typename T>
struct alignas(kQuad * sizeof(T)) Quad {
  T x[kQuad];
};

struct Values {
  float x[kQuad];
};

template <bool kAligned, typename T>
__device__ Values load_quad(const T* from) {
  Quad<T> quad;
  if constexpr (kAligned) {
    quad = *reinterpret_cast<const Quad<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) quad.x[i] = from[i];
  }
  Values values;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) values.x[i] = widen(quad.x[i]);
  return values;
}

template <bool kAligned, typename T>
__device__ void store_quad(const Values& values, T* to) {
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < kQuad; ++i) narrow(values.x[i], quad.x[i]);
  if constexpr (kAligned) {
    *reinterpret_cast<Quad<T>*>(to) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < kQuad; ++i) to[i] = quad.x[i];
  }
}

// A token's queries, keys or values, and where they go.
template <typename T>
struct Strand {
  const T* from;
  T* to;
  int64_t from_step, to_step;  // from head to head
  int heads;
  const T* norm;  // null = none
  bool norm_is_whole;
  bool rotated;
};

template <typename T>
__device__ Strand<T> find_strand(const Rotary& w, int64_t token, int which) {
  if (which == 0) {
    T* const q = static_cast<T*>(w.q) + token * w.q_token_stride;
    return {q,
            q,
            w.q_head_stride,
            w.q_head_stride,
            w.heads,
            static_cast<const T*>(w.q_norm),
            w.q_norm_is_whole != 0,
            w.cos != nullptr};
  }
  const int64_t slot = w.slots[token];
  assert(slot >= 0 && slot < w.blocks * w.block_size);
  const int64_t row = slot / w.block_size * w.kv_heads * w.block_size + slot % w.block_size;
  const int64_t to_step = w.block_size * w.dim;
  if (which == 1)
    return {static_cast<const T*>(w.k) + token * w.k_token_stride,
            static_cast<T*>(w.k_cache) + row * w.dim,
            w.k_head_stride,
            to_step,
            w.kv_heads,
            static_cast<const T*>(w.k_norm),
            w.k_norm_is_whole != 0,
            w.cos != nullptr};
  return {static_cast<const T*>(w.v) + token * w.v_token_stride,
          static_cast<T*>(w.v_cache) + row * w.dim,
          w.v_head_stride,
          to_step,
          w.kv_heads,
          nullptr,
          false,
          false};
}

__device__ inline float add_squares(const Values& a, float sum) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) sum = fmaf(a.x[i], a.x[i], sum);
  return sum;
}

__device__ inline float lanes_sum(float x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// Of all threads of the block, which all get it.
__device__ inline float block_sum(float x) {
  __shared__ float sums[kRotaryThreads / 32];
  x = lanes_sum(x, 32);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kRotaryThreads / 32; ++i) total += sums[i];
  return total;
}

__device__ inline void multiply(Values& a, const Values& weight, float scale) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) a.x[i] = a.x[i] * scale * weight.x[i];
}

// Blocks: (token, queries or keys or values). `lanes` threads share a head, a power of two: each holds four
// elements of its lower half, and the four of its upper half that they turn with.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRotaryThreads) rotary_write_kv_kernel(Rotary w, int lanes) {
  const int64_t token = blockIdx.x;
  const Strand<T> strand = find_strand<T>(w, token, static_cast<int>(blockIdx.y));
  const int half = w.dim / 2, at_once = kRotaryThreads / lanes;
  const int own = static_cast<int>(threadIdx.x) / lanes, d = static_cast<int>(threadIdx.x) % lanes * kQuad;

  float scale = 1.0f;
  if (strand.norm && strand.norm_is_whole) {
    float squares = 0.0f;
    for (int head = own; head < strand.heads && d < half; head += at_once) {
      const T* const from = strand.from + head * strand.from_step + d;
      squares = add_squares(load_quad<kAligned>(from), squares);
      squares = add_squares(load_quad<kAligned>(from + half), squares);
    }
    scale = 1.0f / sqrtf(block_sum(squares) / static_cast<float>(strand.heads * w.dim) + w.eps);
  }

  Values low_cos{}, high_cos{}, low_sin{}, high_sin{};
  if (strand.rotated && d < half) {
    const int64_t position = w.positions[token];
    assert(position >= 0 && position < w.table_rows);
    const int64_t at = position * w.dim + d;
    low_cos = load_quad<kAligned>(w.cos + at);
    high_cos = load_quad<kAligned>(w.cos + at + half);
    low_sin = load_quad<kAligned>(w.sin + at);
    high_sin = load_quad<kAligned>(w.sin + at + half);
  }

  // All threads take all turns: they sum squares together.
  for (int first = 0; first < strand.heads; first += at_once) {
    const int head = first + own;
    const bool used = head < strand.heads && d < half;
    Values low{}, high{};
    if (used) {
      const T* const from = strand.from + head * strand.from_step + d;
      low = load_quad<kAligned>(from);
      high = load_quad<kAligned>(from + half);
    }
    if (strand.norm && !strand.norm_is_whole) {
      const float squares = lanes_sum(add_squares(high, add_squares(low, 0.0f)), lanes);
      scale = 1.0f / sqrtf(squares / static_cast<float>(w.dim) + w.eps);
    }
    if (!used) continue;
    if (strand.norm) {
      const T* const weight = strand.norm + (strand.norm_is_whole ? head * w.dim : 0) + d;
      multiply(low, load_quad<kAligned>(weight), scale);
      multiply(high, load_quad<kAligned>(weight + half), scale);
    }
    if (strand.rotated) {
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const float x = low.x[i], y = high.x[i];
        low.x[i] = x * low_cos.x[i] - y * low_sin.x[i];
        high.x[i] = y * high_cos.x[i] + x * high_sin.x[i];
      }
    }
    T* const to = strand.to + head * strand.to_step + d;
    store_quad<kAligned>(low, to);
    store_quad<kAligned>(high, to + half);
  }
}

bool is_aligned_to(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether four elements are one access, wherever they start.
bool moves_in_quads(const Rotary& w, size_t element) {
  bool aligned = is_aligned_to(w.cos, kQuad * sizeof(float)) && is_aligned_to(w.sin, kQuad * sizeof(float));
  for (const void* pointer : {static_cast<const void*>(w.q), w.k, w.v, w.q_norm, w.k_norm,
                              static_cast<const void*>(w.k_cache), static_cast<const void*>(w.v_cache)})
    aligned = aligned && is_aligned_to(pointer, kQuad * element);
  for (const int64_t stride : {w.q_token_stride, w.q_head_stride, w.k_token_stride, w.k_head_stride,
                               w.v_token_stride, w.v_head_stride})
    aligned = aligned && stride % kQuad == 0;
  return aligned;
}

template <typename T>
cudaError_t launch_of_type(const Rotary& w, cudaStream_t stream) {
  int lanes = 1;
  while (lanes * kQuad < w.dim / 2) lanes *= 2;
  auto* const kernel =
      moves_in_quads(w, sizeof(T)) ? rotary_write_kv_kernel<T, true> : rotary_write_kv_kernel<T, false>;
  return launch(kernel, grid_of(w.tokens, 3), kRotaryThreads, 0, stream, w, lanes);
}

}  // namespace

cudaError_t launch_rotary_write_kv(const Rotary& w, Type type, cudaStream_t stream) {
  if (type == Type::kFloat) return launch_of_type<float>(w, stream);
  if (type == Type::kBFloat16) return launch_of_type<__nv_bfloat16>(w, stream);
  return launch_of_type<__half>(w, stream);
}

}  // namespace thinktwice::gpu
