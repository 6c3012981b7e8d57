// What the attention kernels of every instruction set work on.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace thinktwice {

constexpr int64_t kChunk = 64;        // keys per step of the online softmax; chunks start at its multiples
constexpr int64_t kRowsPerTile = 64;  // rows that share one reading of the keys
constexpr int64_t kAlignment = 16;    // floats; the widest vector, also what a row is padded to

struct Attention {
  const void* q;
  const void* k_cache;
  const void* v_cache;
  void* out;
  int64_t q_token_stride, q_head_stride;
  int64_t heads, kv_heads, group, dim, block_size;
  int64_t window;  // 0 = none
  float scale;
};

// `tokens` successive queries of one sequence under one KV head.
struct Tile {
  int64_t first_token;     // its row in q
  int64_t first_position;  // its place in the sequence
  int64_t tokens;
  int64_t kv_head;
  const int32_t* blocks;
};

// Successive sequences with one query each under one KV head that share their first keys.
struct Members {
  int64_t first_token;  // the row in q of the first
  int64_t count;
  int64_t kv_head;
  int64_t shared_keys;           // a multiple of kChunk
  const int32_t* context_lens;   // of each
  const int32_t* const* blocks;  // of each
};

// One thread's buffers; rows of `row_stride` floats.
struct Workspace {
  float *q, *out;            // [rows][row_stride]
  float* scores;             // [rows][kChunk]
  float *best, *total;       // [rows], running maximum and sum of weights
  float* keys;               // [row_stride][kChunk]
  float* values;             // [kChunk][row_stride]
  float* zero_row;           // [row_stride]
  const float** value_rows;  // [kChunk]
  int64_t* positions;        // [rows], place of the row's query in its sequence
  int64_t row_stride;
};

inline Workspace thread_workspace(int64_t rows, int64_t dim) {
  thread_local std::vector<float> floats;
  thread_local std::vector<const float*> pointers(kChunk);
  thread_local std::vector<int64_t> positions;
  Workspace work{};
  work.row_stride = (dim + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t padded_rows = (rows + kAlignment - 1) / kAlignment * kAlignment;
  const int64_t needed =
      padded_rows * (2 * work.row_stride + kChunk + 2) + work.row_stride * (2 * kChunk + 1) + kAlignment;
  if (static_cast<int64_t>(floats.size()) < needed) floats.resize(needed);
  void* start = floats.data();
  size_t space = floats.size() * sizeof(float);
  auto* next = static_cast<float*>(std::align(kAlignment * sizeof(float), sizeof(float), start, space));
  const auto take = [&next](int64_t n) {
    float* const taken = next;
    next += n;
    return taken;
  };
  work.q = take(padded_rows * work.row_stride);
  work.out = take(padded_rows * work.row_stride);
  work.scores = take(padded_rows * kChunk);
  work.keys = take(work.row_stride * kChunk);
  work.values = take(work.row_stride * kChunk);
  work.zero_row = take(work.row_stride);
  work.best = take(padded_rows);
  work.total = take(padded_rows);
  std::fill_n(work.zero_row, work.row_stride, 0.0f);
  work.value_rows = pointers.data();
  if (static_cast<int64_t>(positions.size()) < rows) positions.resize(rows);
  work.positions = positions.data();
  return work;
}

// The same buffers without the first `rows` rows.
inline Workspace rows_from(Workspace work, int64_t rows) {
  work.q += rows * work.row_stride;
  work.out += rows * work.row_stride;
  work.scores += rows * kChunk;
  work.best += rows;
  work.total += rows;
  work.positions += rows;
  return work;
}

// One tile on this thread; the cache holds `cache_type`, queries and results are float32.
void attend_in_float(torch::headeronly::ScalarType cache_type, const Attention& attention, const Tile& tile);
void attend_in_float(torch::headeronly::ScalarType cache_type, const Attention& attention,
                     const Members& tile);

}  // namespace thinktwice
