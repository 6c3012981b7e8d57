// What stands between two steps of decoding: a row's draw is noted down, and its next token gets its place.
// Written once for the CPU's loop and the GPU's kernel.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ADVANCE_INLINE __host__ __device__ __forceinline__
#else
#define ADVANCE_INLINE inline
#endif

namespace thinktwice {

// One entry per row but where a shape is given.
struct Advance {
  const int64_t* drawn;  // -1 = refused; null = nothing was drawn, only places are wanted
  const float *drawn_logps, *drawn_entropies;
  const int64_t* stop_ids;      // [stop_count]
  const int32_t* block_tables;  // [rows, table_width]
  int64_t rows, steps, stop_count, table_width, block_size, spare_slot;
  int64_t* tokens;     // that the next step feeds
  int64_t* positions;  // of it in the row's sequence
  int64_t* draws;      // tokens drawn so far
  int64_t* left;       // that may still be drawn; 0 = the row has ended
  int64_t* slots;      // where its keys and values go
  int64_t* counts;     // tokens noted down
  int32_t* context_lens;
  int64_t* new_tokens;  // [steps, rows], as the next two: what was noted down
  float *new_logps, *new_entropies;
};

// An ended row stays as it was: it goes on reading its own keys, so that its group still starts with the same
// blocks, and a refused draw reaches no embedding.
ADVANCE_INLINE void note_draw(const Advance& a, int64_t row) {
  const int64_t token = a.drawn[row], place = a.counts[row];
  if (a.left[row] == 0 || place == a.steps) return;
  a.new_tokens[place * a.rows + row] = token;
  a.new_logps[place * a.rows + row] = a.drawn_logps[row];
  a.new_entropies[place * a.rows + row] = a.drawn_entropies[row];
  a.counts[row] = place + 1;
  ++a.draws[row];
  bool ends = token < 0 || a.left[row] == 1;
  for (int64_t i = 0; i < a.stop_count; ++i) ends = ends || token == a.stop_ids[i];
  a.left[row] = ends ? 0 : a.left[row] - 1;
  if (ends) return;
  a.tokens[row] = token;
  ++a.positions[row];
}

// An ended row writes to the spare slot. So does one whose place lies beyond the table, for which nothing was
// reserved: it is not fed again before it has another table.
ADVANCE_INLINE void find_place(const Advance& a, int64_t row) {
  const int64_t position = a.positions[row], block = position / a.block_size;
  a.context_lens[row] = static_cast<int32_t>(position + 1);
  const bool fed = a.left[row] > 0 && block < a.table_width;
  a.slots[row] = fed ? a.block_tables[row * a.table_width + block] * a.block_size + position % a.block_size
                     : a.spare_slot;
}

ADVANCE_INLINE void advance_row(const Advance& a, int64_t row) {
  if (a.drawn) note_draw(a, row);
  find_place(a, row);
}

}  // namespace thinktwice
