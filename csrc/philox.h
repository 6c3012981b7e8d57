// Philox4x32-10, the counter-based random generator of Salmon et al. (SC'11): ten rounds turn a 128-bit
// counter and a 64-bit key into four random 32-bit words. Shared by the CPU and the CUDA sampler.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define PHILOX_INLINE inline __attribute__((always_inline))
#endif

namespace thinktwice {

struct Philox4 {
  uint32_t w0, w1, w2, w3;
};

PHILOX_INLINE Philox4 philox4x32_10(Philox4 counter, uint32_t key0, uint32_t key1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * counter.w0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * counter.w2;
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter.w1 ^ key0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter.w3 ^ key1, static_cast<uint32_t>(p0)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The four words of the tokens 4*group .. 4*group+3: the counter of a draw is (token id / 4, position,
// sample id low, sample id high), the key is the seed, and token id % 4 picks the word.
PHILOX_INLINE Philox4 token_words(uint32_t group, uint32_t position, uint64_t sample_id, uint64_t seed) {
  return philox4x32_10(
      {group, position, static_cast<uint32_t>(sample_id), static_cast<uint32_t>(sample_id >> 32)},
      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// A word as a float in the open interval (0, 1): (word + 1/2) / 2^32, rounded to float, and at most
// 1 - 2^-24. Values near 0 keep their full relative precision: that is where the winning draws lie.
PHILOX_INLINE float open_uniform(uint32_t word) {
  const float u = (static_cast<float>(word) + 0.5f) * 0x1p-32f;
  return u < 0x1.fffffep-1f ? u : 0x1.fffffep-1f;
}

}  // namespace thinktwice
