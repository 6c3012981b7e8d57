// The sampler: two passes over a row's logits (the maximum; everything else), each by a thread block per
// slice of the row, and some more by one block where top-k or top-p ask for them. The arithmetic of a token
// is the CPU's, bit for bit; sums are in double and in an order that the vocabulary alone fixes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/sampler_math.h"
#include "cuda/selection.h"
#include "philox.h"

namespace thinktwice::gpu {
namespace {

constexpr int kSliceThreads = 256;
constexpr int kSliceWarps = kSliceThreads / 32;
constexpr int kRowThreads = 512;     // where a block has a whole row
constexpr int kFinishThreads = 128;  // with a row each
constexpr int kWords = 4;            // tokens that one counter of the random generator serves

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <typename T>
struct alignas(kWords * sizeof(T)) Four {
  T values[kWords];
};

// One row's logits over its temperature, of the ids from `first`, a multiple of kWords, up to `end`.
template <typename T>
struct Row {
  const T* logits;
  int64_t first, end;
  float temperature;
  int threads;  // of the block

  __device__ float scaled(int64_t id) const { return __fdiv_rn(to_float(logits[id]), temperature); }

  // Calls body(id, logit / temperature) for the tokens of this thread, four successive ids at a time.
  template <typename Body>
  __device__ void for_tokens(const Body& body) const {
    const bool aligned = reinterpret_cast<uintptr_t>(logits) % sizeof(Four<T>) == 0;
    const int64_t begin = first / kWords, whole = aligned ? end / kWords : begin;
#pragma unroll 2
    for (int64_t group = begin + threadIdx.x; group < whole; group += threads) {
      const auto four = reinterpret_cast<const Four<T>*>(logits)[group];
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        body(group * kWords + i, __fdiv_rn(to_float(four.values[i]), temperature));
    }
    for (int64_t group = whole + threadIdx.x; group * kWords < end; group += threads)
      for (int i = 0; i < kWords; ++i)
        if (group * kWords + i < end) body(group * kWords + i, scaled(group * kWords + i));
  }
};

__device__ bool is_greedy(const Sampling& w, int64_t n) { return w.temperature[n] == 0.0f; }

// Whether only some of the row's tokens may be drawn, those from `lowest` on.
__device__ bool is_cut(const Sampling& w, int64_t n) {
  return !is_greedy(w, n) && (w.top_k[n] > 0 || w.top_p[n] < 1.0f);
}

template <typename T>
__device__ Row<T> whole_row(const Sampling& w, int64_t n) {
  const T* const logits = static_cast<const T*>(w.logits) + n * w.stride;
  return {logits, 0, w.vocabulary, is_greedy(w, n) ? 1.0f : w.temperature[n], kRowThreads};
}

template <typename T>
__device__ Row<T> row_slice(const Sampling& w, int64_t n, int slice) {
  const int slices = slices_of(w.vocabulary);
  const int64_t groups = (w.vocabulary + kWords - 1) / kWords;
  Row<T> row = whole_row<T>(w, n);
  row.first = groups * slice / slices * kWords;
  row.end = min(groups * (slice + 1) / slices * kWords, w.vocabulary);
  row.threads = kSliceThreads;
  return row;
}

__device__ RowStatus option_status(const Sampling& w, int64_t n) {
  return options_status(w.temperature[n], w.top_k[n], w.top_p[n], w.min_p[n], w.positions[n]);
}

// The highest of a row's scaled logits; NaN or infinite where they are refused.
__device__ float row_max(const Sampling& w, int64_t n) {
  const int slices = slices_of(w.vocabulary);
  float max = -INFINITY;
  for (int s = 0; s < slices; ++s) {
    const float part = w.maxima[n * slices + s];
    max = isnan(part) ? part : isnan(max) ? max : fmaxf(max, part);
  }
  return max;
}

// What a row comes to, over the tokens of one thread, then of a slice, then of all.
struct Totals : SliceTotals {
  __device__ Totals() : SliceTotals{0.0, 0.0, 0.0, -1.0f, 0xffffffffu} {}
  __device__ void offer(float other, uint32_t id) {
    if (other > score || (other == score && id < token)) {
      score = other;
      token = id;
    }
  }
  __device__ void add(const SliceTotals& other) {
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

struct SliceShared {
  SliceTotals totals[kSliceWarps];
  float best[kSliceWarps];
};

struct Shared {
  unsigned long long masses[kBins];
  unsigned int counts[kBins];
  Selection selection;
};

// The whole slice's totals, for thread 0.
__device__ Totals block_totals(Totals totals, SliceShared& shared) {
  for (int step = 16; step > 0; step /= 2) totals.add(totals.from_lane(step));
  if (threadIdx.x % 32 == 0) shared.totals[threadIdx.x / 32] = totals;
  __syncthreads();
  Totals all;
  for (int warp = 0; warp < kSliceWarps; ++warp) all.add(shared.totals[warp]);
  return all;
}

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
  const int units = unit_bits(row.end);
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

// Tokens whose computed score stays below the best are told from u alone: -ln(1 - u) >= u, and the rounding
// of a score is under 2^-21 of it. Whatever the draw, the likeliest token scores kLeast, so lower ones may be
// left out; that also keeps products that would lose bits (below 2^-126) out of the comparison.
constexpr float kLeast = 0.06f;  // under 1 / -ln(2^-24), the score of weight 1 at the highest u

__device__ bool may_win(float weight, float uniform, float best) {
  return gpu::multiply(gpu::multiply(uniform, 1.0f - 0x1p-20f), fmaxf(best, kLeast)) <= weight;
}

template <typename T>
__device__ Totals run_race(const Row<T>& row, float max, bool greedy, uint64_t last, float min_p,
                           uint32_t position, uint64_t sample_id, uint64_t seed) {
  Totals totals;
  Philox4 words{};
  row.for_tokens([&](int64_t id, float scaled) {
    const float below = add(scaled, -max), weight = sampler_exp(below);
    totals.total += weight;
    if (below >= -87.0f) totals.moment += __fmul_rn(weight, below);
    const auto token = static_cast<uint32_t>(id);
    const int word = static_cast<int>(token % kWords);
    if (word == 0 && !greedy) words = token_words(token / kWords, position, sample_id, seed);
    if (greedy) {
      if (below == 0.0f) totals.offer(1.0f, token);
    } else if (rank_key(weight, token) >= last && weight >= min_p) {
      totals.mass += weight;
      const float uniform = uniform_of(words, word);
      if (may_win(weight, uniform, totals.score)) totals.offer(race_score(weight, uniform), token);
    }
  });
  return totals;
}

// Blocks: (slice, row), as of sample_race_kernel.
template <typename T>
__global__ void __launch_bounds__(kSliceThreads) sample_max_kernel(Sampling w) {
  __shared__ SliceShared shared;
  const int64_t n = blockIdx.y;
  if (option_status(w, n) != kOk) return;
  float max = -INFINITY;
  bool bad = false;
  row_slice<T>(w, n, blockIdx.x).for_tokens([&](int64_t, float scaled) {
    max = fmaxf(max, scaled);
    bad |= isnan(scaled);
  });
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, step));
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = max;
  bad = __syncthreads_or(bad);
  if (threadIdx.x != 0) return;
  for (int warp = 0; warp < kSliceWarps; ++warp) max = fmaxf(max, shared.best[warp]);
  w.maxima[n * slices_of(w.vocabulary) + blockIdx.x] = bad ? NAN : max;
}

// A block per row; those that are not cut have nothing to do. Two blocks leave each thread 64 registers:
// without that word ptxas aims at three on some GPUs, and spills.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) sample_cut_kernel(Sampling w) {
  __shared__ Shared shared;
  const int64_t n = blockIdx.x;
  if (option_status(w, n) != kOk || !is_cut(w, n)) return;
  const float max = row_max(w, n);
  if (!isfinite(max)) return;
  const Row<T> row = whole_row<T>(w, n);
  uint64_t lowest = 0;
  if (w.top_k[n] > 0) lowest = select(row, max, w.top_k[n], 1.0, lowest, shared);
  if (w.top_p[n] < 1.0f) lowest = select(row, max, 0, w.top_p[n], lowest, shared);
  if (threadIdx.x == 0) w.lowest[n] = lowest;
}

template <typename T>
__global__ void __launch_bounds__(kSliceThreads) sample_race_kernel(Sampling w) {
  __shared__ SliceShared shared;
  const int64_t n = blockIdx.y;
  if (option_status(w, n) != kOk) return;
  const float max = row_max(w, n);
  if (!isfinite(max)) return;
  const uint64_t lowest = is_cut(w, n) ? w.lowest[n] : 0;
  Totals totals = run_race(row_slice<T>(w, n, blockIdx.x), max, is_greedy(w, n), lowest, w.min_p[n],
                           static_cast<uint32_t>(w.positions[n]), static_cast<uint64_t>(w.sample_ids[n]),
                           static_cast<uint64_t>(*w.seed));
  totals = block_totals(totals, shared);
  if (threadIdx.x == 0) w.totals[n * slices_of(w.vocabulary) + blockIdx.x] = totals;
}

// A thread per row puts its slices together, in their order.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads) sample_finish_kernel(Sampling w) {
  const int64_t n = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (n >= w.rows) return;
  const RowStatus options = option_status(w, n);
  if (options != kOk) return refuse(w, n, options);
  const float max = row_max(w, n);
  if (!isfinite(max)) return refuse(w, n, kBadLogits);
  const int slices = slices_of(w.vocabulary);
  Totals totals;
  for (int s = 0; s < slices; ++s) totals.add(w.totals[n * slices + s]);
  const double below = static_cast<double>(whole_row<T>(w, n).scaled(totals.token)) - max,
               log_total = log(totals.total);
  w.statuses[n] = kOk;
  w.tokens[n] = totals.token;
  w.logps[n] = static_cast<float>(below - log(is_greedy(w, n) ? totals.total : totals.mass));
  w.raw_logps[n] = static_cast<float>(below - log_total);
  w.entropies[n] = static_cast<float>(log_total - totals.moment / totals.total);
}

template <typename T>
cudaError_t sample(const Sampling& w, cudaStream_t stream) {
  const dim3 slices = grid_of(slices_of(w.vocabulary), w.rows);
  const dim3 rows = grid_of((w.rows + kFinishThreads - 1) / kFinishThreads);
  return in_turn([&] { return launch(sample_max_kernel<T>, slices, kSliceThreads, 0, stream, w); },
                 [&] { return launch(sample_cut_kernel<T>, grid_of(w.rows), kRowThreads, 0, stream, w); },
                 [&] { return launch(sample_race_kernel<T>, slices, kSliceThreads, 0, stream, w); },
                 [&] { return launch(sample_finish_kernel<T>, rows, kFinishThreads, 0, stream, w); });
}

}  // namespace

cudaError_t launch_sample(const Sampling& w, Type type, cudaStream_t stream) {
  if (type == Type::kFloat) return sample<float>(w, stream);
  if (type == Type::kBFloat16) return sample<__nv_bfloat16>(w, stream);
  return sample<__half>(w, stream);
}

}  // namespace thinktwice::gpu
