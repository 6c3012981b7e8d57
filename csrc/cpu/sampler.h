// What the sampler's kernels of every instruction set work on; knows nothing about torch.
#pragma once

#include <cstdint>
#include <vector>

#include "sample_status.h"

namespace thinktwice {

struct Draw {
  uint64_t seed, sample_id;
  uint32_t position;
};

struct Truncation {
  int64_t top_k;  // 0 = off
  double top_p;   // 1 = off
  float min_p;    // 0 = off
};

struct RowResult {
  int64_t token;  // -1: the row has no valid distribution
  float logp, raw_logp, entropy;
};

// Every tensor argument of the op but the logits, one entry per row.
struct RowOptions {
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const int64_t *sample_ids, *positions;
};

// Why a row's options are refused; kOk if they are not.
inline RowStatus options_status(const RowOptions& o, int64_t row) {
  return options_status(o.temperature[row], o.top_k[row], o.top_p[row], o.min_p[row], o.positions[row]);
}

// One row on this thread; the rule stands in thinktwice_fast/model/csrc.py.
RowResult sample_row(const float* logits, int64_t vocabulary, float temperature, const Truncation& truncation,
                     const Draw& draw);

struct RowBuffers {
  float* scaled;   // logits / temperature
  float* weights;  // e^(scaled - max); 0 = cannot be drawn
};

struct SoftmaxSums {
  double total = 0.0;   // sum of weights
  double moment = 0.0;  // sum of weight * (scaled - max)
};

inline RowBuffers thread_buffers(int64_t vocabulary) {
  thread_local std::vector<float> floats;
  constexpr int64_t kPadding = 64;  // the longest round of the race, so that whole vectors stay inside
  const int64_t padded = (vocabulary + kPadding - 1) / kPadding * kPadding;
  if (static_cast<int64_t>(floats.size()) < 2 * padded) floats.resize(2 * padded);
  return {floats.data(), floats.data() + padded};
}

}  // namespace thinktwice
