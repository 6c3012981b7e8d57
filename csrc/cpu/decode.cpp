// The decoder as ops: built layer by layer, run once over a plan, or run on by itself, token after token.
#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "bookkeeping.h"
#include "cpu/decoder.h"
#include "cpu/sampler.h"

namespace thinktwice {
namespace {

using OptionalTensor = std::optional<Tensor>;

std::mutex mutex;
std::unordered_map<int64_t, std::unique_ptr<Decoder>> decoders;
int64_t next_decoder = 1;

Decoder& find(int64_t decoder) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = decoders.find(decoder);
  check(found != decoders.end(), "decoder ", decoder, " does not exist or was closed");
  return *found->second;
}

void check_floats(const Tensor& tensor, const char* name, int64_t size) {
  check(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
            tensor.numel() == size,
        "decoder: ", name, " must be ", size, " contiguous float32 numbers on the CPU");
}

void check_norm(const OptionalTensor& norm, const char* name, int64_t size) {
  if (norm) check_floats(*norm, name, size);
}

Linear make_linear(const char* name, const Tensor& packed, const OptionalTensor& bias, int64_t outputs,
                   int64_t inputs) {
  const ScalarType type = packed.scalar_type();
  check(packed.is_cpu() && packed.dim() == 3 && packed.is_contiguous() &&
            packed.size(0) == (outputs + kPanel - 1) / kPanel && packed.size(1) == inputs &&
            packed.size(2) == kPanel &&
            (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
        "decoder: ", name, " must be packed as [", (outputs + kPanel - 1) / kPanel, ", ", inputs, ", ",
        kPanel, "] in float32, bfloat16 or float16");
  if (bias) check_floats(*bias, name, packed.size(0) * kPanel);
  return {packed, bias, outputs};
}

int64_t create(Tensor embedding, Tensor norm, Tensor head, OptionalTensor head_bias, int64_t heads,
               int64_t kv_heads, int64_t dim, double scale, double eps, bool group_attention) {
  const ScalarType type = embedding.scalar_type();
  check(embedding.is_cpu() && embedding.dim() == 2 && embedding.stride(1) == 1 &&
            (type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half),
        "decoder: embedding must be a CPU tensor [vocabulary, hidden] in float32, bfloat16 or float16");
  check(kv_heads > 0 && heads % kv_heads == 0 && dim > 0 && dim % 2 == 0, "decoder: ", heads,
        " query heads of an even size ", dim, " must share ", kv_heads, " KV heads evenly");
  const int64_t hidden = embedding.size(1);
  check_floats(norm, "norm", hidden);
  auto decoder =
      std::make_unique<Decoder>(Decoder{embedding,
                                        norm,
                                        make_linear("head", head, head_bias, embedding.size(0), hidden),
                                        hidden,
                                        heads,
                                        kv_heads,
                                        dim,
                                        scale,
                                        eps,
                                        group_attention,
                                        {}});
  const std::lock_guard<std::mutex> lock(mutex);
  decoders.emplace(next_decoder, std::move(decoder));
  return next_decoder++;
}

void destroy(int64_t decoder) {
  const std::lock_guard<std::mutex> lock(mutex);
  decoders.erase(decoder);
}

void add_layer(int64_t decoder, OptionalTensor norm_before_attention, OptionalTensor norm_after_attention,
               OptionalTensor norm_before_mlp, OptionalTensor norm_after_mlp, OptionalTensor q_norm,
               OptionalTensor k_norm, Tensor qkv, OptionalTensor qkv_bias, Tensor attention_out,
               OptionalTensor attention_out_bias, Tensor gate_up, OptionalTensor gate_up_bias, Tensor down,
               OptionalTensor down_bias, OptionalTensor cos, OptionalTensor sin, int64_t window) {
  Decoder& d = find(decoder);
  check_norm(norm_before_attention, "norm_before_attention", d.hidden);
  check_norm(norm_after_attention, "norm_after_attention", d.hidden);
  check_norm(norm_before_mlp, "norm_before_mlp", d.hidden);
  check_norm(norm_after_mlp, "norm_after_mlp", d.hidden);
  const int64_t queries = d.heads * d.dim, keys = d.kv_heads * d.dim, inner = down.size(1);
  if (q_norm) check_floats(*q_norm, "q_norm", q_norm->numel() == d.dim ? d.dim : queries);
  if (k_norm) check_floats(*k_norm, "k_norm", k_norm->numel() == d.dim ? d.dim : keys);
  check(cos.has_value() == sin.has_value(), "decoder: cos and sin belong together");
  if (cos) {
    check_floats(*cos, "cos", cos->size(0) * d.dim);
    check_floats(*sin, "sin", cos->numel());
  }
  check(window >= 0, "decoder: window must not be negative");
  d.layers.push_back({norm_before_attention, norm_after_attention, norm_before_mlp, norm_after_mlp, q_norm,
                      k_norm, make_linear("qkv", qkv, qkv_bias, queries + 2 * keys, d.hidden),
                      make_linear("attention_out", attention_out, attention_out_bias, d.hidden, queries),
                      make_linear("gate_up", gate_up, gate_up_bias, 2 * inner, d.hidden),
                      make_linear("down", down, down_bias, d.hidden, inner), cos, sin, window});
}

void check_tokens(const char* op, const Decoder& d, const int64_t* tokens, const int64_t* positions,
                  int64_t n) {
  int64_t most = std::numeric_limits<int64_t>::max();
  for (const Layer& layer : d.layers)
    if (layer.cos) most = std::min(most, layer.cos->size(0));
  for (int64_t t = 0; t < n; ++t) {
    check(tokens[t] >= 0 && tokens[t] < d.embedding.size(0), op, ": token ", tokens[t], " of row ", t,
          " lies outside the vocabulary of ", d.embedding.size(0));
    check(positions[t] >= 0 && positions[t] < most, op, ": position ", positions[t], " of row ", t,
          " lies outside the ", most, " that the rotary tables hold");
  }
}

// Logits into a tensor.
class ToTensor final : public Sink {
 public:
  ToTensor(float* data, int64_t stride) : data_(data), stride_(stride) {}
  float* room(int64_t first) override { return data_ + first * stride_; }
  void take(int64_t, const float*) override {}

 private:
  float* data_;
  int64_t stride_;
};

Tensor forward(int64_t decoder, Tensor tokens, Tensor positions, Tensor slots, Tensor block_tables,
               Tensor context_lens, Tensor cu_seqlens_q, Tensor select, Tensor k_cache, Tensor v_cache) {
  const char* const op = "decoder_forward";
  const Decoder& d = find(decoder);
  check_cache(op, d, k_cache, v_cache);
  const int64_t n = tokens.numel(), sequences = context_lens.numel(), blocks = k_cache.size(1),
                size = k_cache.size(3);
  check_vector(tokens, "decoder_forward: tokens", ScalarType::Long, n);
  check_vector(positions, "decoder_forward: positions", ScalarType::Long, n);
  check_vector(slots, "decoder_forward: slots", ScalarType::Long, n);
  check_vector(context_lens, "decoder_forward: context_lens", ScalarType::Int, sequences);
  check_vector(cu_seqlens_q, "decoder_forward: cu_seqlens_q", ScalarType::Int, sequences + 1);
  check_vector(select, "decoder_forward: select", ScalarType::Long, select.numel());
  check(block_tables.is_cpu() && block_tables.dim() == 2 && block_tables.size(0) == sequences &&
            block_tables.is_contiguous() && block_tables.scalar_type() == ScalarType::Int,
        op, ": block_tables must be a contiguous int32 CPU tensor [sequences, blocks]");
  Step step{tokens.const_data_ptr<int64_t>(),
            positions.const_data_ptr<int64_t>(),
            slots.const_data_ptr<int64_t>(),
            {},
            k_cache,
            v_cache};
  check_tokens(op, d, step.tokens, step.positions, n);
  for (int64_t t = 0; t < n; ++t)
    check(step.slots[t] >= 0 && step.slots[t] < blocks * size, op, ": slot ", step.slots[t],
          " lies outside the cache of ", blocks * size, " slots");
  const auto* const starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const auto* const lens = context_lens.const_data_ptr<int32_t>();
  const int64_t width = block_tables.size(1);
  check(starts[0] == 0 && starts[sequences] == n, op, ": cu_seqlens_q must run from 0 to ", n);
  for (int64_t s = 0; s < sequences; ++s) {
    const auto* const table = block_tables.const_data_ptr<int32_t>() + s * width;
    const int64_t count = starts[s + 1] - starts[s], used = (lens[s] + size - 1) / size;
    check(count > 0 && count <= lens[s] && used <= width, op, ": sequence ", s, " has ", count,
          " new tokens, ", lens[s], " in all and a table of ", width, " blocks");
    for (int64_t b = 0; b < used; ++b)
      check(table[b] >= 0 && table[b] < blocks, op, ": block ", table[b], " of sequence ", s,
            " lies outside the cache of ", blocks, " blocks");
    step.runs.push_back({starts[s], count, lens[s], table});
  }
  const auto* const chosen = select.const_data_ptr<int64_t>();
  const std::vector<int64_t> rows(chosen, chosen + select.numel());
  for (size_t i = 0; i < rows.size(); ++i)
    check(rows[i] >= (i ? rows[i - 1] + 1 : 0) && rows[i] < n, op,
          ": select must name rows in ascending order");
  const int64_t stride = d.head.weights().panels() * kPanel;
  Tensor logits = new_tensor({static_cast<int64_t>(rows.size()), stride}, ScalarType::Float);
  ToTensor sink(logits.mutable_data_ptr<float>(), stride);
  run(d, step, rows, sink);
  return torch::stable::narrow(logits, 1, 0, d.head.outputs);
}

// A sequence that goes on drawing.
struct Drawing {
  int64_t handle, token, left;
  float temperature;
  Truncation truncation;
  Draw draw;
  int64_t drawn = 0;
  bool ended = false;
};

// Draws a token from each row of logits, and writes it down.
class ToDrawings final : public Sink {
 public:
  ToDrawings(std::vector<Drawing*>& live, std::vector<RowResult>& results, int64_t vocabulary)
      : live_(live), results_(results), vocabulary_(vocabulary) {}
  float* room(int64_t) override { return nullptr; }
  void take(int64_t row, const float* logits) override {
    const Drawing& drawing = *live_[row];
    results_[row] = sample_row(logits, vocabulary_, drawing.temperature, drawing.truncation, drawing.draw);
  }

 private:
  std::vector<Drawing*>& live_;
  std::vector<RowResult>& results_;
  int64_t vocabulary_;
};

// Says where the next token of every sequence goes, after reserving its place unless that is `reserved`
// already; false when blocks are missing. Nothing is reserved where a token or its position is refused.
bool find_places(const Decoder& d, int64_t cache, const std::vector<Drawing*>& live, int64_t version,
                 bool reserved, std::vector<int64_t>& positions, std::vector<int64_t>& slots, Step& step) {
  std::vector<int64_t> handles;
  for (const Drawing* drawing : live) handles.push_back(drawing->handle);
  const std::vector<int64_t> ones(live.size(), 1);
  bool done = false;
  with_cache(cache, [&](BlockManager& manager) {
    for (const int64_t handle : handles) positions.push_back(manager.length(handle) - (reserved ? 1 : 0));
    check_tokens("decoder_decode", d, step.tokens, positions.data(), static_cast<int64_t>(handles.size()));
    const int64_t size = manager.block_size();
    check(manager.num_blocks() == step.k_cache.size(1) && size == step.k_cache.size(3),
          "decoder_decode: k_cache holds ", step.k_cache.size(1), " blocks of ", step.k_cache.size(3),
          " tokens, the bookkeeping ", manager.num_blocks(), " of ", size);
    done = reserved ||
           manager.extend(handles.data(), ones.data(), static_cast<int64_t>(live.size()), version) == 0;
    if (!done) return;
    for (size_t i = 0; i < handles.size(); ++i) {
      const std::vector<int32_t>& blocks = manager.blocks(handles[i]);
      step.runs.push_back({static_cast<int64_t>(i), 1, positions[i] + 1, blocks.data()});
      slots.push_back(blocks[positions[i] / size] * size + positions[i] % size);
    }
  });
  return done;
}

using Decoded = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Decoded decode(int64_t decoder, int64_t cache, Tensor k_cache, Tensor v_cache, Tensor handles, Tensor tokens,
               Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, int64_t seed, Tensor sample_ids,
               Tensor positions, Tensor left, Tensor stop_ids, int64_t steps, int64_t enough_ended,
               int64_t version) {
  const char* const op = "decoder_decode";
  const Decoder& d = find(decoder);
  check_cache(op, d, k_cache, v_cache);
  const int64_t n = handles.numel();
  for (const auto& [tensor, name, dtype] :
       {std::tuple<const Tensor&, const char*, ScalarType>{handles, "handles", ScalarType::Long},
        {tokens, "tokens", ScalarType::Long},
        {temperature, "temperature", ScalarType::Float},
        {top_k, "top_k", ScalarType::Int},
        {top_p, "top_p", ScalarType::Float},
        {min_p, "min_p", ScalarType::Float},
        {sample_ids, "sample_ids", ScalarType::Long},
        {positions, "positions", ScalarType::Long},
        {left, "left", ScalarType::Long}})
    check_vector(tensor, (std::string(op) + ": " + name).c_str(), dtype, n);
  check_vector(stop_ids, "decoder_decode: stop_ids", ScalarType::Long, stop_ids.numel());
  check(steps > 0, op, ": steps must be at least 1");
  const RowOptions options{temperature.const_data_ptr<float>(),  top_p.const_data_ptr<float>(),
                           min_p.const_data_ptr<float>(),        top_k.const_data_ptr<int32_t>(),
                           sample_ids.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>()};
  for (int64_t i = 0; i < n; ++i)
    check(options_status(options, i) == kOk, op, ": a sampling option of row ", i, " is out of range");
  std::vector<Drawing> drawings;
  for (int64_t i = 0; i < n; ++i) {
    drawings.push_back(
        {handles.const_data_ptr<int64_t>()[i],
         tokens.const_data_ptr<int64_t>()[i],
         left.const_data_ptr<int64_t>()[i],
         temperature.const_data_ptr<float>()[i],
         {top_k.const_data_ptr<int32_t>()[i], top_p.const_data_ptr<float>()[i],
          min_p.const_data_ptr<float>()[i]},
         {static_cast<uint64_t>(seed), static_cast<uint64_t>(sample_ids.const_data_ptr<int64_t>()[i]),
          static_cast<uint32_t>(positions.const_data_ptr<int64_t>()[i])}});
    check(drawings[i].left > 0, op, ": sequence ", i, " has no token left to draw");
  }
  const auto* const stops = stop_ids.const_data_ptr<int64_t>();
  const auto* const stops_end = stops + stop_ids.numel();

  Tensor out_tokens = new_tensor({n, steps}, ScalarType::Long), counts = new_tensor({n}, ScalarType::Long);
  Tensor logps = new_tensor({n, steps}, ScalarType::Float),
         entropies = new_tensor({n, steps}, ScalarType::Float);
  auto* const to_token = out_tokens.mutable_data_ptr<int64_t>();
  auto* const to_logp = logps.mutable_data_ptr<float>();
  auto* const to_entropy = entropies.mutable_data_ptr<float>();
  int64_t ended = 0;
  bool broken = false;
  for (int64_t s = 0; s < steps && ended < std::min(n, enough_ended) && !broken; ++s) {
    std::vector<Drawing*> live;
    std::vector<int64_t> ids, select, at, slots;
    for (Drawing& drawing : drawings)
      if (!drawing.ended) {
        select.push_back(static_cast<int64_t>(live.size()));
        live.push_back(&drawing);
        ids.push_back(drawing.token);
      }
    Step step{ids.data(), nullptr, nullptr, {}, k_cache, v_cache};
    if (!find_places(d, cache, live, version, s == 0, at, slots, step)) break;
    step.positions = at.data();
    step.slots = slots.data();
    std::vector<RowResult> results(live.size());
    ToDrawings sink(live, results, d.head.outputs);
    run(d, step, select, sink);
    for (size_t r = 0; r < live.size(); ++r) {
      Drawing& drawing = *live[r];
      const RowResult& result = results[r];
      const int64_t to = (&drawing - drawings.data()) * steps + drawing.drawn++;
      to_token[to] = result.token;
      to_logp[to] = result.raw_logp;
      to_entropy[to] = result.entropy;
      drawing.token = result.token;
      ++drawing.draw.position;
      drawing.ended = --drawing.left == 0 || std::find(stops, stops_end, result.token) != stops_end;
      ended += drawing.ended;
      broken = broken || result.token < 0;
    }
  }
  for (int64_t i = 0; i < n; ++i) counts.mutable_data_ptr<int64_t>()[i] = drawings[i].drawn;
  return {out_tokens, logps, entropies, counts};
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CompositeExplicitAutograd, m) {
  m.impl("decoder_destroy", TORCH_BOX(&thinktwice::destroy));
}

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("decoder_create", TORCH_BOX(&thinktwice::create));
  m.impl("decoder_add_layer", TORCH_BOX(&thinktwice::add_layer));
  m.impl("decoder_forward", TORCH_BOX(&thinktwice::forward));
  m.impl("decoder_decode", TORCH_BOX(&thinktwice::decode));
}
