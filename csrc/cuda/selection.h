// Finding where top-k and top-p cut a row, from sums over bins of tokens: integers, so that the order in
// which threads add to a bin does not matter. Knows nothing about threads.
#pragma once

#include <cstdint>

#include "cuda/sampler_math.h"

namespace thinktwice::gpu {

constexpr int kBins = 2048;  // of one pass; a pass settles 11 bits of the key

// A token's rank as one number: the higher, the earlier; equal weights rank by id.
SAMPLER_INLINE uint64_t rank_key(float weight, uint32_t id) {
  return uint64_t{float_bits(weight)} << 32 | (0xffffffffu - id);
}

// Weights are summed in units of 2^-unit_bits: as fine as a sum over the vocabulary fits 63 bits.
SAMPLER_INLINE int unit_bits(int64_t vocabulary) {
  int bits = 62;
  for (int64_t n = 1; n < vocabulary; n *= 2) --bits;
  return bits;
}

SAMPLER_INLINE uint64_t in_units(float weight, int bits) {
  return static_cast<uint64_t>(multiply(weight, bits_float(static_cast<uint32_t>(127 + bits) << 23)));
}

struct Sums {
  uint64_t count, mass;
};

// The search for the lowest key that is kept, bin by bin: of the keys that agree with `prefix` down to bit
// `shift`, some are kept and some may not be.
struct Selection {
  uint64_t lowest;  // keys below this are out from the start
  uint64_t prefix;
  int shift;
  Sums above;     // of the keys before those that agree
  int64_t top_k;  // 0: the share of the mass decides
  double top_p, target;
  bool done;

  SAMPLER_INLINE int bits() const { return shift < 11 ? shift : 11; }  // that the next pass settles

  // The bin of a key in the next pass; -1 if it is settled.
  SAMPLER_INLINE int bin(uint64_t key) const {
    if (key < lowest || (shift < 64 && key >> shift != prefix >> shift)) return -1;
    return static_cast<int>(key >> (shift - bits()) & ((1u << bits()) - 1));
  }

  // Called once with the sums of all keys, before the first bin is chosen.
  SAMPLER_INLINE void start(Sums all) {
    if (top_k > 0)
      done = all.count <= static_cast<uint64_t>(top_k);
    else
      target = top_p * static_cast<double>(all.mass);
  }

  // Whether the keys summed so far, likeliest first, are all that is kept.
  SAMPLER_INLINE bool reached(Sums sums) const {
    return top_k > 0 ? sums.count >= static_cast<uint64_t>(top_k) : static_cast<double>(sums.mass) >= target;
  }

  // Goes on inside a bin, the first with which `reached` holds.
  SAMPLER_INLINE void enter(int chosen, Sums before, Sums inside) {
    above = before;
    shift -= bits();
    prefix |= static_cast<uint64_t>(chosen) << shift;
    const bool whole =
        top_k > 0 ? before.count + inside.count == static_cast<uint64_t>(top_k) : inside.count == 1;
    done = whole || shift == 0;
  }

  // The lowest key kept, once done.
  SAMPLER_INLINE uint64_t last() const { return shift == 64 ? lowest : (prefix > lowest ? prefix : lowest); }
};

// The search for the lowest of the top_k keys from `lowest` on, or if top_k is 0, of those that make up top_p
// of their mass.
SAMPLER_INLINE Selection select_among(uint64_t lowest, int64_t top_k, double top_p) {
  return {lowest, 0, 64, {0, 0}, top_k, top_p, 0.0, false};
}

}  // namespace thinktwice::gpu
