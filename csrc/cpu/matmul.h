// Products with packed weights: y = x W^T + bias for float32 rows x, in float32 whatever the weights' type.
//
// An output's products add up in the order of its inputs, so its bits depend on its own row and weights
// alone.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace thinktwice {

constexpr int64_t kPanel = 16;  // outputs that lie side by side; the widest vector

// A matrix [outputs, inputs] cut into panels of kPanel outputs, each stored as [inputs][kPanel]; what lies
// beyond the last output is zero.
struct PackedWeights {
  const void* data;
  torch::headeronly::ScalarType type;  // Float, BFloat16 or Half
  int64_t outputs, inputs;

  int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
};

// Row-major; a row of y has room for whole panels.
struct Rows {
  const float* x;
  int64_t x_stride;
  float* y;
  int64_t y_stride;
  int64_t count;
};

enum class Start { kZero, kBias, kOutput };  // what the sums begin with: nothing, the bias, what y holds

// The panels begin .. end - 1 of the outputs of all rows, on this thread. `bias` has room for whole panels.
void multiply(const PackedWeights& weights, const Rows& rows, int64_t begin, int64_t end, Start start,
              const float* bias);

// The same over all panels, shared between the threads.
void multiply_in_parallel(const PackedWeights& weights, const Rows& rows, Start start, const float* bias);

}  // namespace thinktwice
