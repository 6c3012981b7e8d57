// The sampler on the CPU: temperature, truncation, and a draw that depends on nothing but its own key.
#include "cpu/sampler.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/tensor_utils.h"
#include "philox.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

#define THINKTWICE_KERNELS "cpu/sampler_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

// A token's rank as one number: the higher, the earlier. Weights are not negative, so their bits sort as they
// do.
uint64_t rank_key(float weight, int64_t id) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return uint64_t{bits} << 32 | (std::numeric_limits<uint32_t>::max() - static_cast<uint32_t>(id));
}

double key_weight(uint64_t key) {
  const auto bits = static_cast<uint32_t>(key >> 32);
  float weight;
  std::memcpy(&weight, &bits, sizeof weight);
  return weight;
}

// The lowest key of those that make up top_p of the mass of all, likeliest first. Sorts no more than it has
// to.
uint64_t nucleus_end(std::vector<uint64_t>& keys, double top_p) {
  double mass = 0.0, reached = 0.0;
  for (const uint64_t key : keys) mass += key_weight(key);
  const auto end = keys.end();
  uint64_t last = 0;
  int64_t step = 64;
  for (auto begin = keys.begin(); begin != end; step *= 4) {
    const auto next = end - begin > step ? begin + step : end;
    if (next != end) std::nth_element(begin, next, end, std::greater<>());
    std::sort(begin, next, std::greater<>());
    for (; begin != next; ++begin) {
      if (begin != keys.begin() && reached >= top_p * mass) return last;
      last = *begin;
      reached += key_weight(last);
    }
  }
  return last;
}

// Sets the weight of every token that may not be drawn to 0 and returns the mass of the others; the rule
// stands in thinktwice_fast/model/csrc.py. The likeliest token's weight is 1.
double truncate(const Truncation& truncation, int64_t vocabulary, float* weights) {
  uint64_t last = 0;
  if (truncation.top_k > 0 || truncation.top_p < 1.0) {
    thread_local std::vector<uint64_t> keys;
    keys.clear();
    for (int64_t i = 0; i < vocabulary; ++i)
      if (weights[i] > 0.0f) keys.push_back(rank_key(weights[i], i));
    if (truncation.top_k > 0 && truncation.top_k < static_cast<int64_t>(keys.size())) {
      std::nth_element(keys.begin(), keys.begin() + truncation.top_k - 1, keys.end(), std::greater<>());
      keys.resize(truncation.top_k);
      last = keys.back();
    }
    if (truncation.top_p < 1.0) last = nucleus_end(keys, truncation.top_p);
  }
  double mass = 0.0;
  for (int64_t i = 0; i < vocabulary; ++i) {
    if (rank_key(weights[i], i) < last || weights[i] < truncation.min_p) weights[i] = 0.0f;
    mass += weights[i];
  }
  return mass;
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr RowResult kRefused{-1, kNaN, kNaN, kNaN};

template <typename T>
RowResult sample_row_of(const T* logits, int64_t vocabulary, float temperature, const Truncation& truncation,
                        const Draw& draw) {
  const RowBuffers work = thread_buffers(vocabulary);
  const bool greedy = temperature == 0.0f;
  const float max = ISA_DISPATCH(scale_row<T>)(logits, vocabulary, greedy ? 1.0f : temperature, work);
  if (!std::isfinite(max)) return kRefused;
  const SoftmaxSums sums = ISA_DISPATCH(softmax_sums)(vocabulary, max, work);
  int64_t token;
  double mass = sums.total;
  if (greedy) {
    token = std::find(work.scaled, work.scaled + vocabulary, max) - work.scaled;
  } else {
    if (truncation.top_k > 0 || truncation.top_p < 1.0 || truncation.min_p > 0.0f)
      mass = truncate(truncation, vocabulary, work.weights);
    token = ISA_DISPATCH(race)(vocabulary, draw, work.weights);
  }
  const double below = static_cast<double>(work.scaled[token]) - max, log_total = std::log(sums.total);
  return {token, static_cast<float>(below - std::log(mass)), static_cast<float>(below - log_total),
          static_cast<float>(log_total - sums.moment / sums.total)};
}

using Sampled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Sampled sample_rows(const Tensor& logits, const RowOptions& o, int64_t seed) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  const auto* const from = static_cast<const T*>(logits.const_data_ptr());
  Tensor tokens = new_tensor({rows}, ScalarType::Long), logps = new_tensor({rows}, ScalarType::Float);
  Tensor raw_logps = new_tensor({rows}, ScalarType::Float), entropy = new_tensor({rows}, ScalarType::Float);
  Tensor statuses = new_tensor({rows}, ScalarType::Int);
  auto* const token = tokens.mutable_data_ptr<int64_t>();
  auto* const logp = logps.mutable_data_ptr<float>();
  auto* const raw_logp = raw_logps.mutable_data_ptr<float>();
  auto* const nats = entropy.mutable_data_ptr<float>();
  auto* const status = statuses.mutable_data_ptr<int32_t>();
  constexpr int64_t kGrainTokens = 4096;
  parallel_tasks(rows, 1 + kGrainTokens / vocabulary, [&](int64_t n) {
    const Draw draw{static_cast<uint64_t>(seed), static_cast<uint64_t>(o.sample_ids[n]),
                    static_cast<uint32_t>(o.positions[n])};
    status[n] = options_status(o, n);
    const RowResult row = status[n] == kOk ? sample_row_of(from + n * stride, vocabulary, o.temperature[n],
                                                           {o.top_k[n], o.top_p[n], o.min_p[n]}, draw)
                                           : kRefused;
    if (status[n] == kOk && row.token < 0) status[n] = kBadLogits;
    token[n] = row.token;
    logp[n] = row.logp;
    raw_logp[n] = row.raw_logp;
    nats[n] = row.entropy;
  });
  return {tokens, logps, raw_logps, entropy, statuses};
}

Sampled sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,
               Tensor sample_ids, Tensor positions) {
  check(logits.dim() == 2 && logits.size(1) > 0 &&
            logits.size(1) <= std::numeric_limits<int32_t>::max() - 64 &&
            (logits.stride(1) == 1 || logits.size(1) == 1),
        "sample: logits must be [rows, vocabulary] with a contiguous last dimension");
  const int64_t rows = logits.size(0);
  check_vector(temperature, "sample: temperature", ScalarType::Float, rows);
  check_vector(top_k, "sample: top_k", ScalarType::Int, rows);
  check_vector(top_p, "sample: top_p", ScalarType::Float, rows);
  check_vector(min_p, "sample: min_p", ScalarType::Float, rows);
  check_vector(seed, "sample: seed", ScalarType::Long, 1);
  check_vector(sample_ids, "sample: sample_ids", ScalarType::Long, rows);
  check_vector(positions, "sample: positions", ScalarType::Long, rows);
  const RowOptions options{temperature.const_data_ptr<float>(),  top_p.const_data_ptr<float>(),
                           min_p.const_data_ptr<float>(),        top_k.const_data_ptr<int32_t>(),
                           sample_ids.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>()};
  const int64_t key = *seed.const_data_ptr<int64_t>();
  const ScalarType dtype = logits.scalar_type();
  if (dtype == ScalarType::Float) return sample_rows<float>(logits, options, key);
  if (dtype == ScalarType::BFloat16) return sample_rows<BFloat16>(logits, options, key);
  check(dtype == ScalarType::Half, "sample: logits of type ", torch::headeronly::toString(dtype),
        " are not one of float32, bfloat16, float16");
  return sample_rows<Half>(logits, options, key);
}

}  // namespace

RowResult sample_row(const float* logits, int64_t vocabulary, float temperature, const Truncation& truncation,
                     const Draw& draw) {
  return sample_row_of(logits, vocabulary, temperature, truncation, draw);
}

}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) { m.impl("sample", TORCH_BOX(&thinktwice::sample)); }
