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
#include "cpu/matmul.h"
#include "cpu/sampler.h"
#include "philox.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

namespace attention {
#define THINKTWICE_KERNELS "cpu/attention_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS
}  // namespace attention

#undef KERNEL_INLINE
#undef KERNEL_SHUFFLE
#undef ISA_DISPATCH

namespace sampler {
#define THINKTWICE_KERNELS "cpu/sampler_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS
}  // namespace sampler

#undef KERNEL_INLINE
#undef KERNEL_SHUFFLE
#undef ISA_DISPATCH

namespace matmul {
constexpr int64_t kInputsAtOnce = 40;  // of a size that few inputs go beyond
#define THINKTWICE_KERNELS "cpu/matmul_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS
}  // namespace matmul

#undef KERNEL_INLINE
#undef KERNEL_SHUFFLE
#undef ISA_DISPATCH

namespace decoder {
#define THINKTWICE_KERNELS "cpu/decoder_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS
}  // namespace decoder

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// run(kernel) with the copy of every instruction set that this machine has.
#define RUN_EVERYWHERE(run, space, ...)                \
  do {                                                 \
    run(space::baseline::__VA_ARGS__);                 \
    if (has_avx2()) run(space::avx2::__VA_ARGS__);     \
    if (has_avx512()) run(space::avx512::__VA_ARGS__); \
  } while (false)
#else
#define RUN_EVERYWHERE(run, space, ...) run(space::baseline::__VA_ARGS__)
#endif

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
    const Attention a{q.data(), k.data(), v.data(), out.data(), group * dim, dim, group,
                      1,        group,    dim,      block_size, window,      0.3f};
    const Tile tile{0, context - tokens, tokens, 0, table.data()};
    kernel(a, tile, thread_workspace(tokens * group, dim));
    results.emplace_back(out.begin(), out.end());
  };
  RUN_EVERYWHERE(run, attention, attend<T, T>);
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
      if (has_avx2())
        REQUIRE(token == draw(logits, sample, avx2::scale_row<float>, avx2::softmax_sums, avx2::race));
      if (has_avx512())
        REQUIRE(token == draw(logits, sample, avx512::scale_row<float>, avx512::softmax_sums, avx512::race));
#endif
    }
  }
}

constexpr double kUnit = 0x1p-24;  // a rounding's share of a float

// x [rows][inputs] times three panels, added to ones; a row's bits are those that it has alone.
template <typename T, typename Kernel>
void check_products(Kernel kernel, const std::vector<T>& packed, int64_t inputs, int64_t rows) {
  constexpr int64_t panels = 3, outputs = panels * kPanel;
  const auto add = [&](const float* x, float* y, int64_t count) {
    kernel({packed.data(), torch::headeronly::ScalarType::Float, outputs, inputs},
           {x, inputs, y, outputs, count}, 0, panels);
  };
  const std::vector<float> x = normals(rows * inputs);
  std::vector<float> y(rows * outputs, 1.0f);
  add(x.data(), y.data(), rows);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> alone(outputs, 1.0f);
    add(x.data() + r * inputs, alone.data(), 1);
    for (int64_t o = 0; o < outputs; ++o) {
      double exact = 1, size = 1;
      for (int64_t i = 0; i < inputs; ++i) {
        const auto weight = static_cast<float>(packed[(o / kPanel * inputs + i) * kPanel + o % kPanel]);
        const double product = static_cast<double>(x[r * inputs + i]) * weight;
        exact += product;
        size += std::abs(product);
      }
      const float got = y[r * outputs + o];
      REQUIRE(std::abs(got - exact) <= 1.01 * (inputs + 1) * kUnit * size);
      REQUIRE(got == alone[o]);
    }
  }
}

template <typename T>
void test_products() {
  for (const int64_t inputs : {1, 39, 40, 41, 90}) {
    const std::vector<T> packed = rounded<T>(normals(3 * inputs * kPanel));
    for (int64_t rows = 0; rows <= 27; ++rows) {
      const auto run = [&](auto kernel) { check_products<T>(kernel, packed, inputs, rows); };
      RUN_EVERYWHERE(run, matmul, add_products<T>);
    }
  }
}

void test_norm_row() {
  for (int64_t n = 1; n <= 70; ++n) {
    const std::vector<float> x = normals(n), weight = normals(n);
    double squares = 0;
    for (const float value : x) squares += static_cast<double>(value) * value;
    const double scale = 1 / std::sqrt(squares / n + 0.1);
    const auto run = [&](auto kernel) {
      std::vector<float> to(n), in_place = x;
      kernel(x.data(), weight.data(), n, 0.1f, to.data());
      kernel(in_place.data(), weight.data(), n, 0.1f, in_place.data());
      for (int64_t i = 0; i < n; ++i) {
        const double exact = x[i] * scale * weight[i];
        REQUIRE(std::abs(to[i] - exact) <= (n + 8) * kUnit * std::abs(exact));
      }
      REQUIRE(to == in_place);
    };
    RUN_EVERYWHERE(run, decoder, norm_row);
  }
}

void test_rotate_head() {
  for (int64_t dim = 2; dim <= 256; dim += 2) {
    const std::vector<float> x = normals(dim), cos = normals(dim), sin = normals(dim);
    const auto run = [&](auto kernel) {
      std::vector<float> turned = x;
      kernel(turned.data(), cos.data(), sin.data(), dim);
      for (int64_t i = 0; i < dim; ++i) {
        const double other = i < dim / 2 ? -x[i + dim / 2] : x[i - dim / 2];
        const double straight = static_cast<double>(x[i]) * cos[i], across = other * sin[i];
        REQUIRE(std::abs(turned[i] - (straight + across)) <=
                3 * kUnit * (std::abs(straight) + std::abs(across)));
      }
    };
    RUN_EVERYWHERE(run, decoder, rotate_head);
  }
}

void test_gate_row() {
  std::vector<float> gate{0, -87.2f, -87.4f, -88, -88.1f, -100, -200, 88, 89, 200};
  for (float g = -30; g < 30; g += 0.37f) gate.push_back(g);
  for (int64_t n = 1; n <= static_cast<int64_t>(gate.size()); ++n) {
    const std::vector<float> some(gate.end() - n, gate.end()), up = normals(n);
    const auto run = [&](auto kernel) {
      std::vector<float> to(n);
      kernel(some.data(), up.data(), n, to.data());
      for (int64_t i = 0; i < n; ++i) {
        const double exact = some[i] / (1 + std::exp(-static_cast<double>(some[i]))) * up[i];
        // Beyond -88 the kernel takes e^88 for e^-gate: 200 e^-88 is under 2e-36.
        REQUIRE(std::abs(to[i] - exact) <= 5e-7 * std::abs(exact) + 2e-36 * std::abs(up[i]));
      }
      const float nan = std::numeric_limits<float>::quiet_NaN();
      kernel(&nan, up.data(), 1, to.data());
      REQUIRE(std::isnan(to[0]));
    };
    RUN_EVERYWHERE(run, decoder, gate_row);
  }
}

template <typename T>
void test_copies() {
  for (int64_t n = 1; n <= 50; ++n) {
    const std::vector<float> start = normals(n), x = normals(n);
    const std::vector<T> narrow = rounded<T>(x);
    const auto add = [&](auto kernel) {
      std::vector<float> to = start;
      kernel(x.data(), n, to.data());
      for (int64_t i = 0; i < n; ++i) REQUIRE(to[i] == start[i] + x[i]);
    };
    RUN_EVERYWHERE(add, decoder, add_row);
    const auto widen = [&](auto kernel) {
      std::vector<float> to(n);
      kernel(narrow.data(), n, to.data());
      for (int64_t i = 0; i < n; ++i) REQUIRE(to[i] == static_cast<float>(narrow[i]));
    };
    RUN_EVERYWHERE(widen, decoder, widen_row<T>);
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
  if (has_avx2()) test_math_avx2();
  if (has_avx512()) test_math_avx512();
#endif
  test_attention<float>(1e-5f);
  test_attention<BFloat16>(0.01f);
  test_sampler();
  test_products<float>();
  test_products<BFloat16>();
  test_products<Half>();
  test_norm_row();
  test_rotate_head();
  test_gate_row();
  test_copies<BFloat16>();
  test_copies<Half>();
  test_philox();
  return 0;
}
