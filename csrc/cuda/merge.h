// Putting the parts of a row's softmax together, one after the other: the same arithmetic wherever that is
// done, so that a row's bits do not depend on which kernel computed it.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define MERGE_INLINE __host__ __device__ __forceinline__
#else
#define MERGE_INLINE inline
#endif

namespace thinktwice::gpu {

// Of the keys met so far: their highest score, in powers of two, and the sum of 2^(score - best).
struct SoftmaxState {
  float best = -INFINITY;
  float total = 0.0f;
};

// What the sums so far and those of the next part are multiplied by before they are added.
struct MergeWeights {
  float before, part;
};

// A maximum that may be subtracted: -inf where no key was visible, and there every weight is 0.
MERGE_INLINE float finite_base(float best) { return best == -INFINITY ? 0.0f : best; }

MERGE_INLINE float merge_sums(float before, float part, MergeWeights weights) {
  return fmaf(part, weights.part, before * weights.before);
}

MERGE_INLINE MergeWeights merge_states(SoftmaxState& state, SoftmaxState part) {
  if (part.total == 0.0f) return {1.0f, 0.0f};
  const float best = fmaxf(state.best, part.best), base = finite_base(best);
  const MergeWeights weights{exp2f(state.best - base), exp2f(part.best - base)};
  state = {best, merge_sums(state.total, part.total, weights)};
  return weights;
}

}  // namespace thinktwice::gpu
