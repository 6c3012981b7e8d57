// A decoder-only transformer on the CPU, layer by layer over the paged cache.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor_utils.h"
#include "cpu/attention.h"
#include "cpu/matmul.h"

namespace thinktwice {

struct Linear {
  Tensor packed;               // [panels, inputs, kPanel]
  std::optional<Tensor> bias;  // float32 [panels * kPanel]
  int64_t outputs;

  PackedWeights weights() const {
    return {packed.const_data_ptr(), packed.scalar_type(), outputs, packed.size(1)};
  }
};

// Norm weights are float32; a norm that the architecture lacks is missing. H hidden size, D head size.
struct Layer {
  std::optional<Tensor> norm_before_attention, norm_after_attention, norm_before_mlp, norm_after_mlp;  // [H]
  std::optional<Tensor> q_norm, k_norm;  // [D]: each head by itself; [heads * D]: all at once
  Linear qkv, attention_out, gate_up, down;
  std::optional<Tensor> cos, sin;  // float32 [positions, D]
  int64_t window;                  // 0 = none
};

struct Decoder {
  Tensor embedding;  // [V, H] in the model's type
  Tensor norm;       // float32 [H]
  Linear head;
  int64_t hidden, heads, kv_heads, dim;
  double scale, eps;
  bool group_attention;  // keys that sequences share are read once for all of them
  std::vector<Layer> layers;

  bool fits_caches() const;  // all weights stay in the processor's caches from one row block to the next
};

// New tokens of one sequence: `count` rows from `first` on; its last one is at position length - 1.
struct Run {
  int64_t first, count, length;
  const int32_t* blocks;
};

// The tokens of one forward pass, and where their keys and values go.
struct Step {
  const int64_t *tokens, *positions, *slots;
  std::vector<Run> runs;
  Tensor k_cache, v_cache;  // [L, B, Hkv, bs, D]

  int64_t rows() const { return runs.empty() ? 0 : runs.back().first + runs.back().count; }
};

// What becomes of the logits of the rows that are asked for. Calls come from several threads, each for its
// own rows; `first` counts the rows asked for, not all.
class Sink {
 public:
  virtual ~Sink() = default;
  // Room for `count` rows of `stride` floats; nullptr: a buffer of the decoder's own.
  virtual float* room(int64_t first) = 0;
  virtual void take(int64_t row, const float* logits) = 0;
};

// Runs the step and hands the logits of rows `select` (ascending) to the sink. The bits of a row do not
// depend on the others nor on the number of threads.
void run(const Decoder& decoder, const Step& step, const std::vector<int64_t>& select, Sink& sink);

// Throws unless the tensors are a cache of this decoder's shape.
void check_cache(const char* op, const Decoder& decoder, const Tensor& k_cache, const Tensor& v_cache);

}  // namespace thinktwice
