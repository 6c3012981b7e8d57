// What the kernels over one row of logits work on, and the same kernels in double; knows nothing about torch.
//
// A row is worked through in blocks that stay in the L1 cache. The kernels over one block come as float, once
// per instruction set (rows_kernels.inc), and as double (here); a row's loop (rows.cpp) is the same for both.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace thinktwice {

constexpr int kBlock = 1024;  // logits

// Sums over a block with s = (value - shift) / temperature. The tokens of s = 0 stand apart, so that the
// digits of log(ones + rest) and of the entropy survive where one token has nearly all of the probability.
struct BlockSums {
  double ones = 0.0;    // how many s are 0
  double rest = 0.0;    // of e^s over the others
  double moment = 0.0;  // of s e^s
};

// What turns a block's values into the gradient: -p (d_logp + d_entropy (log p + entropy)) with
// log p = (value - shift) / temperature.
template <typename A>
struct Slopes {
  A shift;                // log-sum-exp * temperature
  A inverse_temperature;  // 1 / temperature
  A d_logp, d_entropy;    // incoming gradients / temperature
  A entropy;
};

inline double block_max(const double* values, int n) {
  double best = -std::numeric_limits<double>::infinity();
  for (int i = 0; i < n; ++i) best = values[i] > best ? values[i] : best;
  return best;
}

inline BlockSums block_sums(const double* values, int n, double shift, double inverse_temperature, bool) {
  BlockSums sums;
  for (int i = 0; i < n; ++i) {
    const double s = (values[i] - shift) * inverse_temperature, weight = std::exp(s);
    (s == 0.0 ? sums.ones : sums.rest) += weight;
    sums.moment += weight == 0.0 ? 0.0 : weight * s;
  }
  return sums;
}

inline void widen(const double* logits, const double* bias, double softcap, int n, double* values,
                  double* slopes) {
  for (int i = 0; i < n; ++i) {
    values[i] = bias ? logits[i] + bias[i] : logits[i];
    if (softcap == 0.0) continue;
    const double t = std::tanh(values[i] / softcap);
    values[i] = softcap * t;
    if (slopes) slopes[i] = (1.0 - t) * (1.0 + t);
  }
}

// Returns the sum of the gradient before `slopes`.
inline double block_gradient(const double* values, const double* slopes, int n, const Slopes<double>& g,
                             double* out) {
  double total = 0.0;
  for (int i = 0; i < n; ++i) {
    const double log_p = (values[i] - g.shift) * g.inverse_temperature, p = std::exp(log_p);
    const double flow = g.d_entropy == 0.0 || p == 0.0 ? 0.0 : g.d_entropy * (log_p + g.entropy);
    const double gradient = -p * (g.d_logp + flow);
    total += gradient;
    out[i] = slopes ? gradient * slopes[i] : gradient;
  }
  return total;
}

template <typename O>
void narrow(const double* values, int n, O* out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<O>(values[i]);
}

}  // namespace thinktwice
