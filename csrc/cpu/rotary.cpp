// Queries and keys between projection and attention: normed, rotated, and the keys and values put into the
// cache.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstring>
#include <optional>
#include <string>

#include "common/parallel.h"
#include "cpu/cache.h"

namespace thinktwice {
namespace {

constexpr int64_t kGrainElements = 16 * 1024;  // less than this is not worth another thread
constexpr int kLanes = 16;                     // partial sums, so that the compiler can use vectors

template <typename T>
float squares(const T* x, int64_t n) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = static_cast<float>(x[i + lane]);
      sums[lane] += value * value;
    }
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  for (; i < n; ++i) total += static_cast<float>(x[i]) * static_cast<float>(x[i]);
  return total;
}

// Norm weights of all heads one after another, or of one head that all share.
template <typename T>
struct Norm {
  const T* weight = nullptr;
  bool whole = false;  // one mean over all heads
};

template <typename T>
Norm<T> norm_of(const char* name, const std::optional<Tensor>& norm, const Tensor& rows) {
  if (!norm) return {};
  const int64_t dim = rows.size(2), size = norm->numel();
  check(size == dim || size == rows.size(1) * dim, "rotary_write_kv: ", name, " has ", size,
        " elements, expected ", dim, " or, over all heads, ", rows.size(1) * dim);
  check_vector(*norm, (std::string("rotary_write_kv: ") + name).c_str(), rows.scalar_type(), size);
  return {static_cast<const T*>(norm->const_data_ptr()), size != dim};
}

// A token's heads, their elements side by side.
template <typename T>
struct Strand {
  const T* from;
  T* to;
  int64_t from_step, to_step, heads, dim;  // steps from head to head
};

// `cos` and `sin` of the token's position, null = no rotation. `room` holds a head.
template <typename T>
void norm_and_rotate(const Strand<T>& strand, const Norm<T>& norm, float eps, const float* cos,
                     const float* sin, float* room) {
  const int64_t dim = strand.dim, half = dim / 2;
  float total = 0.0f;
  for (int64_t h = 0; norm.whole && h < strand.heads; ++h)
    total += squares(strand.from + h * strand.from_step, dim);
  for (int64_t h = 0; h < strand.heads; ++h) {
    const T* const from = strand.from + h * strand.from_step;
    T* const to = strand.to + h * strand.to_step;
    for (int64_t d = 0; d < dim; ++d) room[d] = static_cast<float>(from[d]);
    if (norm.weight) {
      const float sum = norm.whole ? total : squares(from, dim);
      const int64_t size = norm.whole ? strand.heads * dim : dim;
      const float scale = 1.0f / std::sqrt(sum / static_cast<float>(size) + eps);
      const T* const weight = norm.weight + (norm.whole ? h * dim : 0);
      for (int64_t d = 0; d < dim; ++d) room[d] = room[d] * scale * static_cast<float>(weight[d]);
    }
    for (int64_t d = 0; cos && d < half; ++d) {
      const float low = room[d], high = room[half + d];
      room[d] = low * cos[d] - high * sin[d];
      room[half + d] = high * cos[half + d] + low * sin[half + d];
    }
    for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(room[d]);
  }
}

void check_tables(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                  const int64_t* positions, int64_t tokens, int64_t dim) {
  check(cos.has_value() == sin.has_value(), "rotary_write_kv: cos and sin are given together or not at all");
  if (!cos) return;
  for (const Tensor& table : {*cos, *sin})
    check(table.is_cpu() && table.dim() == 2 && table.scalar_type() == ScalarType::Float &&
              table.is_contiguous() && table.size(1) == dim && table.size(0) == cos->size(0),
          "rotary_write_kv: cos and sin must be contiguous float32 CPU tensors [positions, ", dim, "]");
  check(dim % 2 == 0, "rotary_write_kv: a head of ", dim, " elements has no two halves to rotate");
  for (int64_t t = 0; t < tokens; ++t)
    check(positions[t] >= 0 && positions[t] < cos->size(0), "rotary_write_kv: position ", positions[t],
          " of token ", t, " lies outside the tables of ", cos->size(0), " positions");
}

template <typename T>
void write(Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& q_norm,
           const std::optional<Tensor>& k_norm, float eps, const std::optional<Tensor>& cos,
           const std::optional<Tensor>& sin, const int64_t* positions, const int64_t* slots, Tensor& k_cache,
           Tensor& v_cache) {
  const int64_t tokens = q.size(0), heads = q.size(1), dim = q.size(2);
  const int64_t kv_heads = k_cache.size(1), block_size = k_cache.size(2);
  const Norm<T> norm_q = norm_of<T>("q_norm", q_norm, q), norm_k = norm_of<T>("k_norm", k_norm, k);
  const float* const cos_table = cos ? cos->const_data_ptr<float>() : nullptr;
  const float* const sin_table = sin ? sin->const_data_ptr<float>() : nullptr;
  auto* const q_data = static_cast<T*>(q.mutable_data_ptr());
  auto *const k_to = static_cast<T*>(k_cache.mutable_data_ptr()), *const v_to = static_cast<T*>(
                                                                      v_cache.mutable_data_ptr());
  const auto *const k_from = static_cast<const T*>(k.const_data_ptr()), *const v_from = static_cast<const T*>(
                                                                            v.const_data_ptr());
  const int64_t q_token = q.stride(0), q_head = q.stride(1), k_token = k.stride(0), k_head = k.stride(1);
  const int64_t v_token = v.stride(0), v_head = v.stride(1);
  const auto write_token = [&](int64_t t) {
    thread_local std::vector<float> room;
    if (static_cast<int64_t>(room.size()) < dim) room.resize(dim);
    const float* const turn_cos = cos_table ? cos_table + positions[t] * dim : nullptr;
    const float* const turn_sin = sin_table ? sin_table + positions[t] * dim : nullptr;
    const int64_t at = (slots[t] / block_size * kv_heads * block_size + slots[t] % block_size) * dim,
                  step = block_size * dim;
    T* const own_q = q_data + t * q_token;
    norm_and_rotate<T>({own_q, own_q, q_head, q_head, heads, dim}, norm_q, eps, turn_cos, turn_sin,
                       room.data());
    norm_and_rotate<T>({k_from + t * k_token, k_to + at, k_head, step, kv_heads, dim}, norm_k, eps, turn_cos,
                       turn_sin, room.data());
    for (int64_t h = 0; h < kv_heads; ++h)
      std::memcpy(v_to + at + h * step, v_from + t * v_token + h * v_head, dim * sizeof(T));
  };
  parallel_tasks(tokens, 1 + kGrainElements / (1 + (heads + 2 * kv_heads) * dim), write_token);
}

void rotary_write_kv(Tensor q, Tensor k, Tensor v, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                     double eps, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor positions,
                     Tensor slots, Tensor k_cache, Tensor v_cache) {
  const char* const op = "rotary_write_kv";
  const int64_t tokens = slots.numel();
  check_vector(slots, "rotary_write_kv: slots", ScalarType::Long, tokens);
  check_vector(positions, "rotary_write_kv: positions", ScalarType::Long, tokens);
  check_caches(op, k_cache, v_cache, 4);
  check(q.dim() == 3, op, ": q must have 3 dimensions");
  check_rows(op, "q", q, k_cache, tokens, q.size(1));
  check_rows(op, "k", k, k_cache, tokens, k_cache.size(1));
  check_rows(op, "v", v, k_cache, tokens, k_cache.size(1));
  const auto *slot = slots.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  check_slots(op, slot, tokens, k_cache);
  check_tables(cos, sin, position, tokens, k_cache.size(3));
  const auto run = [&](auto zero) {
    write<decltype(zero)>(q, k, v, q_norm, k_norm, static_cast<float>(eps), cos, sin, position, slot, k_cache,
                          v_cache);
  };
  const ScalarType dtype = k_cache.scalar_type();
  if (dtype == ScalarType::Float) return run(float{});
  if (dtype == ScalarType::BFloat16) return run(torch::headeronly::BFloat16{});
  check(dtype == ScalarType::Half, op, ": type ", torch::headeronly::toString(dtype),
        " is not one of float32, bfloat16, float16");
  run(torch::headeronly::Half{});
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("rotary_write_kv", TORCH_BOX(&thinktwice::rotary_write_kv));
}
