// Every instruction set's copy of the CPU kernels that this machine can run, against double arithmetic and
// against each other; with the address sanitizer, since the vectors read and write up to the edges. Built and
// run by test_native.py.
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

#include "cpu/attention.h"
#include "cpu/sampler.h"
#include "philox.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

namespace attention {
#define THINKTWICE_KERNELS "cpu/attention_kernels.inc"
#include "cpu/for_each_isa.h"
#undef THINKTWICE_KERNELS
}  // namespace attention

#undef KERNEL_INLINE
#undef KERNEL_SHUFFLE
#undef ISA_DISPATCH

namespace sampler {
#define THINKTWICE_KERNELS "cpu/sampler_kernels.inc"
#include "cpu/for_each_isa.h"
#undef THINKTWICE_KERNELS
}  // namespace sampler

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

std::mt19937 random_bits(0);

std::vector<float> normals(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(random_bits);
  return values;
}

template <typename T>
std::vector<T> rounded(const std::vector<float>& values) {
  std::vector<T> result;
  for (const float value : values) result.push_back(static_cast<T>(value));
  return result;
}

using AttendResult = std::vector<std::vector<float>>;

// One decode or prefill tile of a made-up cache in every instruction set's copy.
template <typename T>
AttendResult attend_everywhere(int64_t dim, int64_t context, int64_t tokens, int64_t group, int64_t window) {
  const int64_t block_size = 7, blocks = (context + block_size - 1) / block_size;
  const auto q = rounded<T>(normals(tokens * group * dim));
  const auto k = rounded<T>(normals(blocks * block_size * dim)),
             v = rounded<T>(normals(blocks * block_size * dim));
  std::vector<int32_t> table(blocks);
  for (int64_t b = 0; b < blocks; ++b) table[b] = static_cast<int32_t>(blocks - 1 - b);
  AttendResult results;
  const auto run = [&](auto kernel) {
    std::vector<T> out(q.size());
    const Attention a{q.data(), k.data(), v.data(), out.data(), group * dim, dim,  group,
                      1,        group,    dim,      block_size, window,      0.3f, 0.0f};
    const Tile tile{0, context - tokens, tokens, 0, table.data()};
    kernel(a, tile, thread_workspace(tokens * group, dim));
    results.emplace_back(out.begin(), out.end());
  };
  run(attention::baseline::attend<T, T>);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) run(attention::avx2::attend<T, T>);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    run(attention::avx512::attend<T, T>);
#endif
  return results;
}

template <typename T>
void test_attention(float tolerance) {
  for (const int64_t dim : {1, 16, 20, 64, 80})
    for (const int64_t context : {1, 63, 64, 65, 150})
      for (const int64_t window : {0, 30}) {
        const int64_t tokens = std::min<int64_t>(context, 9);
        const AttendResult results = attend_everywhere<T>(dim, context, tokens, 3, window);
        for (const auto& result : results)
          for (size_t i = 0; i < result.size(); ++i)
            REQUIRE(std::abs(result[i] - results[0][i]) <= tolerance * (1 + std::abs(results[0][i])));
      }
}

#define TEST_MATH(isa)                                                                                  \
  KERNEL_TEST_TARGET void test_math_##isa() {                                                           \
    using namespace attention::isa;                                                                     \
    for (double x = -88; x <= 20; x += 0.00731) {                                                       \
      const double exact = std::exp(static_cast<double>(static_cast<float>(x)));                        \
      const double got = exp(splat(static_cast<float>(x)))[W - 1];                                      \
      REQUIRE(static_cast<float>(x) < -87.3f ? got == 0 : std::abs(got / exact - 1) < 2e-7);            \
    }                                                                                                   \
    for (double x = 1e-37; x < 1e37; x *= 1.0137) {                                                     \
      const double exact = std::log(static_cast<double>(static_cast<float>(x)));                        \
      REQUIRE(std::abs(log(splat(static_cast<float>(x)))[0] - exact) <= 2e-7 * std::abs(exact) + 1e-9); \
    }                                                                                                   \
    Vec rows[W];                                                                                        \
    for (int i = 0; i < W; ++i)                                                                         \
      for (int j = 0; j < W; ++j) rows[i][j] = static_cast<float>(W * i + j);                           \
    transpose(rows);                                                                                    \
    for (int i = 0; i < W; ++i)                                                                         \
      for (int j = 0; j < W; ++j) REQUIRE(rows[i][j] == static_cast<float>(W * j + i));                 \
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {                                                   \
      Half half[W];                                                                                     \
      for (int i = 0; i < W; ++i) half[i].x = static_cast<uint16_t>(bits);                              \
      const float expected = static_cast<float>(half[0]), got = load(half)[0];                          \
      REQUIRE(got == expected || (got != got && expected != expected));                                 \
    }                                                                                                   \
  }

#define KERNEL_TEST_TARGET
TEST_MATH(baseline)
#undef KERNEL_TEST_TARGET
#if defined(__x86_64__)
#define KERNEL_TEST_TARGET __attribute__((target("avx2,fma")))
TEST_MATH(avx2)
#undef KERNEL_TEST_TARGET
#define KERNEL_TEST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
TEST_MATH(avx512)
#endif

template <typename Scale, typename Sums, typename Race>
int64_t draw(const std::vector<float>& logits, uint64_t sample, Scale scale, Sums sums, Race race) {
  const auto size = static_cast<int64_t>(logits.size());
  const RowBuffers work = thread_buffers(size);
  sums(size, scale(logits.data(), size, 0.7f, work), work);
  return race(size, Draw{1, sample, 2}, work.weights);
}

void test_sampler() {
  for (const int64_t vocabulary : {1, 3, 16, 64, 65, 1030}) {
    const std::vector<float> logits = normals(vocabulary);
    for (uint64_t sample = 0; sample < 200; ++sample) {
      using namespace sampler;
      const int64_t token =
          draw(logits, sample, baseline::scale_row<float>, baseline::softmax_sums, baseline::race);
      REQUIRE(token >= 0 && token < vocabulary);
#if defined(__x86_64__)
      if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        REQUIRE(token == draw(logits, sample, avx2::scale_row<float>, avx2::softmax_sums, avx2::race));
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        REQUIRE(token == draw(logits, sample, avx512::scale_row<float>, avx512::softmax_sums, avx512::race));
#endif
    }
  }
}

void test_philox() {
  const Philox4 zero = philox4x32_10({0, 0, 0, 0}, 0, 0);
  REQUIRE(zero.w0 == 0x6627e8d5u && zero.w1 == 0xe169c58du && zero.w2 == 0xbc57ac4cu &&
          zero.w3 == 0x9b00dbd8u);
  REQUIRE(open_uniform(0) == 0x1p-33f && open_uniform(0xffffffffu) == 1.0f - 0x1p-24f);
}

}  // namespace
}  // namespace thinktwice

int main() {
  using namespace thinktwice;
  test_math_baseline();
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) test_math_avx2();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    test_math_avx512();
#endif
  test_attention<float>(1e-5f);
  test_attention<BFloat16>(0.01f);
  test_sampler();
  test_philox();
  return 0;
}
