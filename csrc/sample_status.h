// Why a row of logits gets no token; the words for it stand in thinktwice_fast/model/csrc.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define STATUS_INLINE __host__ __device__ __forceinline__
#else
#define STATUS_INLINE inline
#endif

namespace thinktwice {

enum RowStatus : int32_t { kOk, kBadTemperature, kBadTopK, kBadTopP, kBadMinP, kBadPosition, kBadLogits };

// Of a row's options; its logits are judged where they are read.
STATUS_INLINE RowStatus options_status(float temperature, int32_t top_k, float top_p, float min_p,
                                       int64_t position) {
  if (!(temperature >= 0.0f && temperature <= 3.402823466e38f)) return kBadTemperature;  // finite, no NaN
  if (top_k < 0) return kBadTopK;
  if (!(top_p > 0.0f && top_p <= 1.0f)) return kBadTopP;
  if (!(min_p >= 0.0f && min_p <= 1.0f)) return kBadMinP;
  if (position < 0 || position > int64_t{0xffffffff}) return kBadPosition;
  return kOk;
}

}  // namespace thinktwice
