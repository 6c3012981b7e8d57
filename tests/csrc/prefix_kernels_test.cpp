// Every instruction set's copy of the shared-prefix attention that this machine can run, against a plain
// computation in double; with the address sanitizer, since the vectors read and write up to the edges. Built
// and run by test_native.py.
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

#include "cpu/prefix_attention.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

#define THINKTWICE_KERNELS "cpu/prefix_attention_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

std::mt19937 random_bits(0);

template <typename T>
std::vector<T> normals(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(normal(random_bits));
  return values;
}

// One KV head and one tile: queries of a segment that follows its prefix in the row, but for a token between.
template <typename T>
struct Case {
  int64_t dim, group, window;
  Sequence sequence;
  std::vector<T> q, k, v, gradient;

  Case(int64_t dim, int64_t group, int64_t prefix, int64_t length, int64_t window)
      : dim(dim), group(group), window(window), sequence{0, prefix, prefix + 1, length} {
    const int64_t tokens = prefix + 1 + length;
    q = normals<T>(tokens * group * dim);
    k = normals<T>(tokens * dim);
    v = normals<T>(tokens * dim);
    gradient = normals<T>(tokens * group * dim);
  }

  Attention attention(std::vector<T>& out) const {
    return {q.data(), nullptr, nullptr, out.data(), group * dim, dim, group, 1, group, dim, 0, window, 0.3f};
  }
};

// Of the segment's rows: result, dq; of all positions: dk, dv.
struct Result {
  std::vector<double> out, dq, dk, dv;
};

template <typename T>
Result exactly(const Case<T>& c) {
  const Sequence& s = c.sequence;
  Result r;
  r.dk.resize(s.end() * c.dim);
  r.dv.resize(s.end() * c.dim);
  for (int64_t row = 0; row < s.length * c.group; ++row) {
    const int64_t position = s.prefix_length + row / c.group;
    const int64_t first = c.window ? std::max<int64_t>(0, position - c.window + 1) : 0;
    const int64_t at = s.start * c.group + row;
    std::vector<double> weights, products;
    double total = 0, delta = 0;
    for (int64_t p = first; p <= position; ++p) {
      double score = 0, product = 0;
      for (int64_t d = 0; d < c.dim; ++d) {
        score += static_cast<double>(c.q[at * c.dim + d]) * static_cast<double>(c.k[s.token(p) * c.dim + d]);
        product += static_cast<double>(c.gradient[at * c.dim + d]) *
                   static_cast<double>(c.v[s.token(p) * c.dim + d]);
      }
      weights.push_back(std::exp(0.3 * score));
      products.push_back(product);
      total += weights.back();
    }
    for (size_t j = 0; j < weights.size(); ++j) delta += (weights[j] /= total) * products[j];
    for (int64_t d = 0; d < c.dim; ++d) {
      double out = 0, dq = 0;
      for (int64_t p = first; p <= position; ++p) {
        const double weight = weights[p - first], change = 0.3 * weight * (products[p - first] - delta);
        out += weight * static_cast<double>(c.v[s.token(p) * c.dim + d]);
        dq += change * static_cast<double>(c.k[s.token(p) * c.dim + d]);
        r.dk[p * c.dim + d] += change * static_cast<double>(c.q[at * c.dim + d]);
        r.dv[p * c.dim + d] += weight * static_cast<double>(c.gradient[at * c.dim + d]);
      }
      r.out.push_back(out);
      r.dq.push_back(dq);
    }
  }
  return r;
}

void require_near(const char* name, const double* got, const std::vector<double>& expected,
                  double tolerance) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::abs(got[i] - expected[i]) <= tolerance * (1 + std::abs(expected[i])))) {
      std::fprintf(stderr, "%s[%zu] is %g, expected %g\n", name, i, got[i], expected[i]);
      std::exit(1);
    }
}

template <typename T, typename Forward, typename Backward>
void run(const Case<T>& c, double tolerance, Forward forward, Backward backward) {
  const Sequence& s = c.sequence;
  const SegmentTile tile{s, 0, s.length, 0};
  const Heads k{c.k.data(), c.dim, c.dim}, v{c.v.data(), c.dim, c.dim};
  std::vector<T> out(c.q.size()), dq(c.q.size());
  std::vector<float> lse(c.q.size() / c.dim);
  const int64_t rows = s.length * c.group;
  forward(PrefixForward{c.attention(out), k, v, lse.data()}, tile, thread_workspace(rows, c.dim));
  const int64_t width = c.group * c.dim;
  const BackwardWorkspace work = backward_workspace(rows, c.dim);
  const int64_t stride = work.weights.row_stride;
  std::vector<float> dk(s.end() * stride), dv(s.end() * stride);
  const PrefixBackward b{
      c.attention(dq), k,       v,      {out.data(), width, c.dim}, {c.gradient.data(), width, c.dim},
      lse.data(),      nullptr, nullptr};
  backward(b, tile, work, dk.data(), dv.data());
  const Result exact = exactly(c);
  const auto own = [&](const std::vector<T>& x) {
    return std::vector<double>(x.begin() + s.start * width, x.end());
  };
  require_near("out", own(out).data(), exact.out, tolerance);
  require_near("dq", own(dq).data(), exact.dq, tolerance);
  const auto columns = [&](const std::vector<float>& x) {
    std::vector<double> values;
    for (int64_t p = 0; p < s.end(); ++p)
      values.insert(values.end(), x.begin() + p * stride, x.begin() + p * stride + c.dim);
    return values;
  };
  require_near("dk", columns(dk).data(), exact.dk, tolerance);
  require_near("dv", columns(dv).data(), exact.dv, tolerance);
}

template <typename T>
void test_everywhere(double tolerance) {
  for (const int64_t dim : {1, 16, 20, 64})
    for (const int64_t prefix : {0, 5, 63, 64, 130})
      for (const int64_t length : {1, 9})
        for (const int64_t window : {0, 30}) {
          const Case<T> c(dim, 3, prefix, length, window);
          run(c, tolerance, baseline::attend_segment<T>, baseline::backward_tile<T>);
#if defined(__x86_64__)
          if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            run(c, tolerance, avx2::attend_segment<T>, avx2::backward_tile<T>);
          if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            run(c, tolerance, avx512::attend_segment<T>, avx512::backward_tile<T>);
#endif
        }
}

}  // namespace
}  // namespace thinktwice

int main() {
  thinktwice::test_everywhere<float>(2e-5);
  // The result is rounded to 8 or 11 bits before the backward pass reads it.
  thinktwice::test_everywhere<c10::BFloat16>(0.06);
  thinktwice::test_everywhere<c10::Half>(0.01);
  return 0;
}
