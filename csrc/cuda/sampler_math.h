// The arithmetic of one token in the sampler, for the GPU: with fused multiply-adds where the CPU's vector
// code (cpu/simd.inc, cpu/sampler_kernels.inc) has them on a machine with FMA, so that both come to the same
// bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAMPLER_INLINE __host__ __device__ __forceinline__
#else
#define SAMPLER_INLINE inline
#endif

namespace thinktwice::gpu {

// Products, sums and quotients that the compiler must leave as they are. On the host, compile without
// contraction.
#if defined(__CUDA_ARCH__)
SAMPLER_INLINE float multiply(float a, float b) { return __fmul_rn(a, b); }
SAMPLER_INLINE float add(float a, float b) { return __fadd_rn(a, b); }
SAMPLER_INLINE float divide(float a, float b) { return __fdiv_rn(a, b); }
SAMPLER_INLINE uint32_t float_bits(float x) { return __float_as_uint(x); }
SAMPLER_INLINE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
#else
SAMPLER_INLINE float multiply(float a, float b) { return a * b; }
SAMPLER_INLINE float add(float a, float b) { return a + b; }
SAMPLER_INLINE float divide(float a, float b) { return a / b; }
SAMPLER_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
SAMPLER_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

// e^x for x <= 0, below -87.3 exactly 0.
SAMPLER_INLINE float sampler_exp(float x) {
  constexpr float kMagic = 0x1.8p23f;
  if (x < -87.3f) return 0.0f;
  const float n = add(fmaf(x, 1.44269504088896341f, kMagic), -kMagic);
  const float r = fmaf(n, 2.12194440e-4f, fmaf(-n, 0.693359375f, x));
  float y = 1.9875691500e-4f;
  y = fmaf(y, r, 1.3981999507e-3f);
  y = fmaf(y, r, 8.3334519073e-3f);
  y = fmaf(y, r, 4.1665795894e-2f);
  y = fmaf(y, r, 1.6666665459e-1f);
  y = fmaf(y, r, 5.0000001201e-1f);
  y = add(fmaf(y, multiply(r, r), r), 1.0f);
  return multiply(y, bits_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23));
}

// ln x for normal x > 0.
SAMPLER_INLINE float sampler_log(float x) {
  const uint32_t bits = float_bits(x);
  float m = bits_float((bits & 0x7fffff) | 0x3f000000);
  const bool small = m < 0.707106781186547524f;
  const float e = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126 - (small ? 1 : 0));
  m = add(small ? add(m, m) : m, -1.0f);
  const float z = multiply(m, m);
  float y = 7.0376836292e-2f;
  y = fmaf(y, m, -1.1514610310e-1f);
  y = fmaf(y, m, 1.1676998740e-1f);
  y = fmaf(y, m, -1.2420140846e-1f);
  y = fmaf(y, m, 1.4249322787e-1f);
  y = fmaf(y, m, -1.6668057665e-1f);
  y = fmaf(y, m, 2.0000714765e-1f);
  y = fmaf(y, m, -2.4999993993e-1f);
  y = fmaf(y, m, 3.3333331174e-1f);
  y = fmaf(-0.5f, z, fmaf(multiply(y, m), z, -multiply(e, 2.12194440e-4f)));
  return fmaf(e, 0.693359375f, add(m, y));
}

// weight / -ln(1 - u): whoever has the highest wins the draw.
SAMPLER_INLINE float race_score(float weight, float uniform) {
  const float rest = add(1.0f, -uniform), taken = add(1.0f, -rest);
  if (taken == 0.0f) return divide(weight, uniform);
  return divide(multiply(weight, taken), multiply(-sampler_log(rest), uniform));
}

}  // namespace thinktwice::gpu
