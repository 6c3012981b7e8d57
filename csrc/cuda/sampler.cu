// The sampler: a thread block per row, two passes over its logits (the maximum; everything else), and some
// more where top-k or top-p ask for them. The arithmetic of a token is the CPU's, bit for bit; sums are in
// double and in a fixed order.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sampler_math.h"
#include "cuda/selection.h"
#include "philox.h"

namespace thinktwice::gpu {
namespace {

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / 32;
constexpr int kWords = 4;  // tokens that one counter of the random generator serves

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <typename T>
struct alignas(kWords * sizeof(T)) Four {
  T values[kWords];
};

// One row's logits over its temperature, relative to their maximum once that is known.
template <typename T>
struct Row {
  const T* logits;
  int64_t vocabulary;
  float temperature;
  bool aligned;

  __device__ float scaled(int64_t id) const { return __fdiv_rn(to_float(logits[id]), temperature); }

  // Calls body(id, logit / temperature) for the tokens of this thread, four successive ids at a time.
  template <typename Body>
  __device__ void for_tokens(const Body& body) const {
    const int64_t whole = aligned ? vocabulary / kWords : 0;
#pragma unroll 2
    for (int64_t group = threadIdx.x; group < whole; group += kRowThreads) {
      const auto four = reinterpret_cast<const Four<T>*>(logits)[group];
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        body(group * kWords + i, __fdiv_rn(to_float(four.values[i]), temperature));
    }
    for (int64_t group = whole + threadIdx.x; group * kWords < vocabulary; group += kRowThreads)
      for (int i = 0; i < kWords; ++i)
        if (group * kWords + i < vocabulary) body(group * kWords + i, scaled(group * kWords + i));
  }
};

// What a row comes to, over the tokens of one thread and then of all.
struct Totals {
  double total = 0.0, moment = 0.0;  // sums of weight and of weight * (scaled - max), over all tokens
  double mass = 0.0;                 // sum of the weights that may be drawn
  float score = -1.0f;               // the highest of the race, and whose it is
  uint32_t token = 0xffffffffu;

  __device__ void offer(float other, uint32_t id) {
    if (other > score || (other == score && id < token)) {
      score = other;
      token = id;
    }
  }
  __device__ void add(const Totals& other) {
    total += other.total;
    moment += other.moment;
    mass += other.mass;
    offer(other.score, other.token);
  }
  __device__ Totals from_lane(int distance) const {
    Totals other;
    other.total = __shfl_down_sync(0xffffffffu, total, distance);
    other.moment = __shfl_down_sync(0xffffffffu, moment, distance);
    other.mass = __shfl_down_sync(0xffffffffu, mass, distance);
    other.score = __shfl_down_sync(0xffffffffu, score, distance);
    other.token = __shfl_down_sync(0xffffffffu, token, distance);
    return other;
  }
};

struct Shared {
  unsigned long long masses[kBins];
  unsigned int counts[kBins];
  double sums[3][kRowWarps];
  float best[kRowWarps];
  uint32_t tokens[kRowWarps];
  Selection selection;
  volatile uint64_t seed;  // read where it is used: no registers are left to keep it in
};

__device__ float block_max(float best, Shared& shared) {
  for (int step = 16; step > 0; step /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffffu, best, step));
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = best;
  __syncthreads();
  for (int w = 0; w < kRowWarps; ++w) best = fmaxf(best, shared.best[w]);
  __syncthreads();
  return best;
}

// The whole row's totals, for thread 0.
__device__ Totals block_totals(Totals totals, Shared& shared) {
  for (int step = 16; step > 0; step /= 2) totals.add(totals.from_lane(step));
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    shared.sums[0][warp] = totals.total;
    shared.sums[1][warp] = totals.moment;
    shared.sums[2][warp] = totals.mass;
    shared.best[warp] = totals.score;
    shared.tokens[warp] = totals.token;
  }
  __syncthreads();
  Totals all;
  for (int w = 0; w < kRowWarps; ++w) {
    Totals part;
    part.total = shared.sums[0][w];
    part.moment = shared.sums[1][w];
    part.mass = shared.sums[2][w];
    part.score = shared.best[w];
    part.token = shared.tokens[w];
    all.add(part);
  }
  return all;
}

// By one thread of the row's block.
__device__ void refuse(const Sampling& w, int64_t n, RowStatus why) {
  w.statuses[n] = why;
  w.tokens[n] = -1;
  w.logps[n] = w.raw_logps[n] = w.entropies[n] = NAN;
}

// Chooses the bin in which the cut lies, by one warp: each lane sums a stretch of bins, the highest bins
// first.
__device__ void choose_bin(Shared& shared, bool first) {
  constexpr int kStretch = kBins / 32;
  const int lane = threadIdx.x, top = kBins - 1 - lane * kStretch;
  Sums here{};
  for (int i = 0; i < kStretch; ++i) {
    here.count += shared.counts[top - i];
    here.mass += shared.masses[top - i];
  }
  Sums upto = here;  // of this lane's bins and all higher ones
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t count = __shfl_up_sync(0xffffffffu, upto.count, step);
    const uint64_t mass = __shfl_up_sync(0xffffffffu, upto.mass, step);
    if (lane >= step) {
      upto.count += count;
      upto.mass += mass;
    }
  }
  if (first && lane == 31) shared.selection.start(upto);
  __syncwarp();
  Selection& selection = shared.selection;
  if (selection.done) return;
  const Sums above = selection.above;
  Sums before{above.count + upto.count - here.count, above.mass + upto.mass - here.mass};
  const bool reached = selection.reached({above.count + upto.count, above.mass + upto.mass});
  const unsigned lanes = __ballot_sync(0xffffffffu, reached);
  if (lane != __ffs(static_cast<int>(lanes)) - 1) return;
  for (int i = 0; i < kStretch; ++i) {
    const Sums inside{shared.counts[top - i], shared.masses[top - i]};
    const Sums after{before.count + inside.count, before.mass + inside.mass};
    if (selection.reached(after)) {
      selection.enter(top - i, before, inside);
      return;
    }
    before = after;
  }
}

// The lowest key that top-k (if top_k > 0) or top-p keeps of those from `lowest` on.
template <typename T>
__device__ uint64_t select(const Row<T>& row, float max, int64_t top_k, double top_p, uint64_t lowest,
                           Shared& shared) {
  const int units = unit_bits(row.vocabulary);
  if (threadIdx.x == 0) shared.selection = select_among(lowest, top_k, top_p);
  for (bool first = true;; first = false) {
    for (int i = threadIdx.x; i < kBins; i += kRowThreads) {
      shared.masses[i] = 0;
      shared.counts[i] = 0;
    }
    __syncthreads();
    const Selection selection = shared.selection;
    if (selection.done) {
      __syncthreads();  // the next search writes what is read here
      return selection.last();
    }
    row.for_tokens([&](int64_t id, float scaled) {
      const float weight = sampler_exp(add(scaled, -max));
      const int bin = weight > 0.0f ? selection.bin(rank_key(weight, static_cast<uint32_t>(id))) : -1;
      if (bin < 0) return;
      atomicAdd(&shared.masses[bin], static_cast<unsigned long long>(in_units(weight, units)));
      atomicAdd(&shared.counts[bin], 1u);
    });
    __syncthreads();
    if (threadIdx.x < 32) choose_bin(shared, first);
    __syncthreads();
  }
}

__device__ float uniform_of(const Philox4& words, int i) {
  return open_uniform(i == 0 ? words.w0 : i == 1 ? words.w1 : i == 2 ? words.w2 : words.w3);
}

template <typename T>
__device__ Totals run_race(const Row<T>& row, float max, bool greedy, uint64_t last, float min_p,
                           uint32_t position, uint64_t sample_id, const Shared& shared) {
  Totals totals;
  Philox4 words{};
  row.for_tokens([&](int64_t id, float scaled) {
    const float below = add(scaled, -max), weight = sampler_exp(below);
    totals.total += weight;
    if (below >= -87.0f) totals.moment += __fmul_rn(weight, below);
    const auto token = static_cast<uint32_t>(id);
    const int word = static_cast<int>(token % kWords);
    if (word == 0 && !greedy) words = token_words(token / kWords, position, sample_id, shared.seed);
    if (greedy) {
      if (below == 0.0f) totals.offer(1.0f, token);
    } else if (rank_key(weight, token) >= last && weight >= min_p) {
      totals.mass += weight;
      totals.offer(race_score(weight, uniform_of(words, word)), token);
    }
  });
  return totals;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) sample_kernel(Sampling w) {
  __shared__ Shared shared;
  const int64_t n = blockIdx.x;
  const RowStatus options =
      options_status(w.temperature[n], w.top_k[n], w.top_p[n], w.min_p[n], w.positions[n]);
  if (options != kOk) {
    if (threadIdx.x == 0) refuse(w, n, options);
    return;
  }
  if (threadIdx.x == 0) shared.seed = static_cast<uint64_t>(*w.seed);  // there after the next barrier
  const bool greedy = w.temperature[n] == 0.0f;
  const T* const logits = static_cast<const T*>(w.logits) + n * w.stride;
  const Row<T> row{logits, w.vocabulary, greedy ? 1.0f : w.temperature[n],
                   reinterpret_cast<uintptr_t>(logits) % sizeof(Four<T>) == 0};
  float max = -INFINITY;
  bool bad = false;
  row.for_tokens([&](int64_t, float scaled) {
    max = fmaxf(max, scaled);
    bad |= isnan(scaled);
  });
  bad = __syncthreads_or(bad);
  max = block_max(max, shared);
  if (bad || !isfinite(max)) {
    if (threadIdx.x == 0) refuse(w, n, kBadLogits);
    return;
  }
  uint64_t last = 0;
  if (!greedy && w.top_k[n] > 0) last = select(row, max, w.top_k[n], 1.0, last, shared);
  if (!greedy && w.top_p[n] < 1.0f) last = select(row, max, 0, w.top_p[n], last, shared);
  Totals totals = run_race(row, max, greedy, last, w.min_p[n], static_cast<uint32_t>(w.positions[n]),
                           static_cast<uint64_t>(w.sample_ids[n]), shared);
  totals = block_totals(totals, shared);
  if (threadIdx.x != 0) return;
  const double below = static_cast<double>(row.scaled(totals.token)) - max, log_total = log(totals.total);
  w.statuses[n] = kOk;
  w.tokens[n] = totals.token;
  w.logps[n] = static_cast<float>(below - log(greedy ? totals.total : totals.mass));
  w.raw_logps[n] = static_cast<float>(below - log_total);
  w.entropies[n] = static_cast<float>(log_total - totals.moment / totals.total);
}

}  // namespace

cudaError_t launch_sample(const Sampling& w, Type type, cudaStream_t stream) {
  const dim3 grid = grid_of(w.rows);
  if (type == Type::kFloat) return launch(sample_kernel<float>, grid, kRowThreads, 0, stream, w);
  if (type == Type::kBFloat16) return launch(sample_kernel<__nv_bfloat16>, grid, kRowThreads, 0, stream, w);
  return launch(sample_kernel<__half>, grid, kRowThreads, 0, stream, w);
}

}  // namespace thinktwice::gpu
