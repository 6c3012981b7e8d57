// Every instruction set's copy of the kernels over blocks of logits that this machine can run, against double
// arithmetic; with the address sanitizer, since the vectors read and write up to the edges. Built and run by
// tests/kernels/test_rows.py.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "loss/rows.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

#define THINKTWICE_KERNELS "loss/rows_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> normals(int n, float scale) {
  static std::mt19937 random_bits(0);
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = scale * normal(random_bits);
  return values;
}

std::vector<double> doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

bool close(double got, double want, double relative, double absolute) {
  return (std::isnan(got) && std::isnan(want)) ||
         std::abs(got - want) <= relative * std::abs(want) + absolute;
}

// One instruction set's kernels.
struct Kernels {
  float (*block_max)(const float*, int);
  BlockSums (*block_sums)(const float*, int, float, float, bool);
  void (*widen)(const float*, const float*, float, int, float*, float*);
  void (*widen_bfloat16)(const BFloat16*, const float*, float, int, float*, float*);
  void (*widen_half)(const Half*, const float*, float, int, float*, float*);
  double (*block_gradient)(const float*, const float*, int, const Slopes<float>&, float*);
  void (*narrow_bfloat16)(const float*, int, BFloat16*);
  void (*narrow_half)(const float*, int, Half*);
};

#define KERNELS_OF(isa)                                                                         \
  Kernels {                                                                                     \
    isa::block_max, isa::block_sums, isa::widen<float>, isa::widen<BFloat16>, isa::widen<Half>, \
        isa::block_gradient, isa::narrow<BFloat16>, isa::narrow<Half>,                          \
  }

void test_statistics(const Kernels& k, int n) {
  const std::vector<float> values = normals(n, 3.0f);
  const float best = k.block_max(values.data(), n);
  REQUIRE(best == *std::max_element(values.begin(), values.end()));
  for (const bool want_moment : {false, true}) {
    const BlockSums got = k.block_sums(values.data(), n, best, 0.7f, want_moment);
    const BlockSums want = block_sums(doubles(values).data(), n, best, 0.7f, want_moment);
    REQUIRE(got.ones == want.ones && close(got.rest, want.rest, 1e-6, 0));
    REQUIRE(close(got.moment, want_moment ? want.moment : 0.0, 2e-6, 0));
  }
}

void test_gradient(const Kernels& k, int n) {
  const std::vector<float> values = normals(n, 3.0f), slopes = normals(n, 1.0f);
  for (const float d_entropy : {0.0f, -0.4f})
    for (const bool capped : {false, true}) {
      std::vector<float> got(values);
      std::vector<double> want(n);
      k.block_gradient(got.data(), capped ? slopes.data() : nullptr, n, {5.0f, 0.7f, 1.1f, d_entropy, 2.0f},
                       got.data());
      block_gradient(doubles(values).data(), capped ? doubles(slopes).data() : nullptr, n,
                     {5.0, 0.7f, 1.1f, d_entropy, 2.0}, want.data());
      for (int i = 0; i < n; ++i) {
        // The terms that p is multiplied by may cancel.
        const double log_p = (values[i] - 5.0) * 0.7f, terms = 1.1 + 0.4 * (std::abs(log_p) + 2.0);
        REQUIRE(
            close(got[i], want[i], 0, 2e-6 * std::exp(log_p) * terms * (capped ? std::abs(slopes[i]) : 1)));
      }
    }
}

void test_widening(const Kernels& k, int n) {
  const std::vector<float> bias = normals(n, 1.0f);
  std::vector<float> logits = normals(n, 20.0f), values(kBlock), slopes(kBlock);
  if (n > 4) std::copy_n(std::vector<float>{kInf, -kInf, NAN, 0.0f}.begin(), 4, logits.begin());
  for (const float softcap : {0.0f, 30.0f, 2.0f}) {
    std::vector<double> want(n), want_slopes(n);
    widen(doubles(logits).data(), doubles(bias).data(), softcap, n, want.data(), want_slopes.data());
    k.widen(logits.data(), bias.data(), softcap, n, values.data(), slopes.data());
    for (int i = 0; i < n; ++i) {
      REQUIRE(values[i] == want[i] || close(values[i], want[i], 4e-7, 1e-6));
      if (softcap != 0.0f) REQUIRE(close(slopes[i], want_slopes[i], 2e-5, 1e-12));
    }
  }
}

// tanh over all magnitudes, through a soft cap of 1.
void test_tanh(const Kernels& k) {
  for (double start = 1e-30; start < 100; start *= 1.1) {
    const float x = static_cast<float>(start);
    float value[kBlock], slope[kBlock];
    for (const float signed_x : {x, -x}) {
      k.widen(&signed_x, nullptr, 1.0f, 1, value, slope);
      const double exact = std::tanh(static_cast<double>(signed_x));
      REQUIRE(close(value[0], exact, 2e-7, 0));
      const double cosh = std::cosh(std::min(static_cast<double>(x), 40.0));
      REQUIRE(close(slope[0], 1 / (cosh * cosh), 2e-6, 1e-30));
    }
  }
}

template <typename H, typename Widen, typename Narrow>
void test_half_type(Widen widen, Narrow narrow) {
  std::vector<float> values(1 << 16);
  std::vector<H> all(1 << 16), back(1 << 16);
  for (uint32_t bits = 0; bits < all.size(); ++bits) all[bits].x = static_cast<uint16_t>(bits);
  for (size_t i = 0; i < all.size(); i += kBlock) widen(&all[i], nullptr, 0.0f, kBlock, &values[i], nullptr);
  // Every value of the type, what lies halfway to the next, and the neighbours of that.
  std::vector<float> inputs = values;
  for (uint32_t bits = 0; bits + 1 < all.size(); ++bits) {
    const float middle = values[bits] / 2 + values[bits + 1] / 2;
    inputs.insert(inputs.end(), {middle, std::nextafter(middle, kInf), std::nextafter(middle, -kInf)});
  }
  inputs.insert(inputs.end(), {65519.9f, 65520.0f, 65535.0f, 65536.0f, 1e38f, -1e38f, 3.4028235e38f, 1e-45f});
  inputs.push_back(NAN);
  back.resize(inputs.size());
  for (size_t i = 0; i < inputs.size(); i += 100)
    narrow(&inputs[i], static_cast<int>(std::min<size_t>(100, inputs.size() - i)), &back[i]);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const H want = static_cast<H>(inputs[i]);
    REQUIRE(std::isnan(inputs[i]) ? std::isnan(static_cast<float>(back[i])) : back[i].x == want.x);
  }
  for (size_t i = 0; i < all.size(); ++i)
    REQUIRE(values[i] == static_cast<float>(all[i]) || std::isnan(static_cast<float>(all[i])));
}

void test(const Kernels& k) {
  for (const int n : {1, 3, 4, 7, 8, 15, 16, 17, 63, 64, 65, 257, kBlock}) {
    test_statistics(k, n);
    test_gradient(k, n);
    test_widening(k, n);
  }
  test_tanh(k);
  test_half_type<BFloat16>(k.widen_bfloat16, k.narrow_bfloat16);
  test_half_type<Half>(k.widen_half, k.narrow_half);
}

}  // namespace
}  // namespace thinktwice

int main() {
  using namespace thinktwice;
  test(KERNELS_OF(baseline));
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) test(KERNELS_OF(avx2));
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    test(KERNELS_OF(avx512));
#endif
  return 0;
}
