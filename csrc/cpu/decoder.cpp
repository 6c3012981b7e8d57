// A decoder-only transformer on the CPU: one forward pass without a line of Python.
//
// Small models go row block by row block through all layers, each block on one thread: nothing waits for
// another thread and the activations stay in the caches. Large ones go layer by layer with all threads on
// each product, so that a weight is read from memory once for all rows.
#include "cpu/decoder.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/parallel.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kCacheBytes = 16 << 20;   // weights of this size stay in a processor's last-level cache
constexpr int64_t kSmallBlock = 64;         // rows that one thread takes through all layers
constexpr int64_t kLargeBlock = 512;        // rows that all threads take through a layer together
constexpr int64_t kLogitBytes = 256 << 20;  // of logits that a thread makes room for at once
constexpr int64_t kSharedKeys = 64;         // keys that sequences must share to be read together

#define THINKTWICE_KERNELS "cpu/decoder_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

const float* floats(const std::optional<Tensor>& tensor) { return tensor ? floats(*tensor) : nullptr; }

template <typename T>
void store_as(void* to, int64_t offset, const float* from, int64_t n) {
  T* const out = static_cast<T*>(to) + offset;
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[i]);
}

void store_as(ScalarType type, void* to, int64_t offset, const float* from, int64_t n) {
  if (type == ScalarType::Float)
    std::memcpy(static_cast<float*>(to) + offset, from, n * sizeof(float));
  else if (type == ScalarType::BFloat16)
    store_as<BFloat16>(to, offset, from, n);
  else
    store_as<Half>(to, offset, from, n);
}

// Successive rows of the step, and which of them attend together.
struct Block {
  int64_t first = 0, rows = 0;
  std::vector<Tile> tiles;
  std::vector<Members> members;
};

// Row-major float buffers of a block, each row padded to whole panels.
struct Buffers {
  float *hidden, *normed, *qkv, *attended, *gate_up, *gated;
};

// One forward pass.
class Pass {
 public:
  Pass(const Decoder& decoder, const Step& step, const std::vector<int64_t>& select, Sink& sink)
      : d_(decoder),
        step_(step),
        select_(select),
        sink_(sink),
        hidden_stride_(padded(d_.hidden)),
        query_width_(d_.heads * d_.dim),
        key_width_(d_.kv_heads * d_.dim),
        qkv_stride_(padded(query_width_ + 2 * key_width_)),
        attended_stride_(padded(query_width_)) {
    for (const Layer& layer : d_.layers)
      gate_up_stride_ = std::max(gate_up_stride_, padded(layer.gate_up.outputs));
    for (const Run& run : step_.runs) {
      lengths_.push_back(static_cast<int32_t>(run.length));
      tables_.push_back(run.blocks);
    }
    for (const Run& run : step_.runs) longest_run_ = std::max(longest_run_, run.count);
  }

  void run() {
    const int64_t threads = torch::stable::get_num_threads(), rows = step_.rows();
    parallel_ = !d_.fits_caches() || longest_run_ * threads > rows;
    if (parallel_)
      run_layer_by_layer();
    else
      run_block_by_block(std::clamp<int64_t>(rows / threads, 1, kSmallBlock));
  }

 private:
  void run_block_by_block(int64_t block_rows) {
    std::vector<Block> blocks;
    for (size_t s = 0; s < step_.runs.size();) {
      size_t end = s;
      int64_t rows = 0;
      while (end < step_.runs.size() && (rows == 0 || rows + step_.runs[end].count <= block_rows))
        rows += step_.runs[end++].count;
      blocks.push_back(make_block(step_.runs[s].first, rows));
      s = end;
    }
    parallel_tasks(static_cast<int64_t>(blocks.size()), 1, [&](int64_t i) {
      thread_local std::vector<float> memory;
      const Block& block = blocks[i];
      const Buffers buffers = take_buffers(memory, block.rows);
      embed(block, buffers.hidden);
      for (size_t l = 0; l < d_.layers.size(); ++l) run_layer(l, block, buffers);
      finish(block, buffers);
    });
  }

  void run_layer_by_layer() {
    const int64_t rows = step_.rows();
    std::vector<Block> blocks;
    for (int64_t first = 0; first < rows; first += kLargeBlock)
      blocks.push_back(make_block(first, std::min(kLargeBlock, rows - first)));
    // Static: memory that the system hands out anew at every step costs more than some small models' layers.
    thread_local std::vector<float> memory, hidden;
    hidden.resize(rows * hidden_stride_);
    Buffers buffers = take_buffers(memory, std::min(kLargeBlock, rows));
    const auto at = [&](const Block& block) {
      buffers.hidden = hidden.data() + block.first * hidden_stride_;
      return buffers;
    };
    for (const Block& block : blocks) embed(block, at(block).hidden);
    for (size_t l = 0; l < d_.layers.size(); ++l)
      for (const Block& block : blocks) run_layer(l, block, at(block));
    for (const Block& block : blocks) finish(block, at(block));
  }

  // The rows first .. first + rows - 1: tiles of what each sequence has there, and groups of those with one
  // row that start with the same blocks.
  Block make_block(int64_t first, int64_t rows) const {
    Block block{first, rows, {}, {}};
    const int64_t group = d_.heads / d_.kv_heads, most = std::max<int64_t>(1, kRowsPerTile / group);
    for (size_t s = run_of(first); s < step_.runs.size() && step_.runs[s].first < first + rows;) {
      const Run& run = step_.runs[s];
      const int64_t shared = shared_keys(s);
      size_t end = s + 1;
      if (shared > 0) {
        while (end < step_.runs.size() && step_.runs[end].first < first + rows &&
               static_cast<int64_t>(end - s) < most && common_keys(s, end) >= shared)
          ++end;
        for (int64_t head = 0; head < d_.kv_heads; ++head)
          block.members.push_back({run.first - first, static_cast<int64_t>(end - s), head, shared,
                                   lengths_.data() + s, tables_.data() + s});
        s = end;
        continue;
      }
      const int64_t from = std::max(run.first, first), to = std::min(run.first + run.count, first + rows);
      for (int64_t t = from; t < to; t += most)
        for (int64_t head = 0; head < d_.kv_heads; ++head)
          block.tiles.push_back(
              {t - first, run.length - run.count + t - run.first, std::min(most, to - t), head, run.blocks});
      ++s;
    }
    return block;
  }

  size_t run_of(int64_t row) const {
    const auto after = std::upper_bound(step_.runs.begin(), step_.runs.end(), row,
                                        [](int64_t r, const Run& run) { return r < run.first; });
    return static_cast<size_t>(after - step_.runs.begin()) - 1;
  }

  // Keys that the sequences a and b, each with one new token, share at their start; whole chunks.
  int64_t common_keys(size_t a, size_t b) const {
    const Run &x = step_.runs[a], &y = step_.runs[b];
    if (x.count != 1 || y.count != 1) return 0;
    const int64_t size = step_.k_cache.size(3), most = std::min(x.length, y.length) / size;
    int64_t same = 0;
    while (same < most && x.blocks[same] == y.blocks[same]) ++same;
    return same * size / kChunk * kChunk;
  }

  // What the sequence shares with the next, where that is worth reading together.
  int64_t shared_keys(size_t s) const {
    const int64_t shared = d_.group_attention && s + 1 < step_.runs.size() ? common_keys(s, s + 1) : 0;
    return shared >= kSharedKeys ? shared : 0;
  }

  Buffers take_buffers(std::vector<float>& memory, int64_t rows) const {
    const int64_t widths[] = {hidden_stride_,   hidden_stride_,  qkv_stride_,
                              attended_stride_, gate_up_stride_, padded(gate_up_stride_ / 2)};
    int64_t needed = kAlignment;
    for (const int64_t width : widths) needed += rows * width;
    if (static_cast<int64_t>(memory.size()) < needed) memory.resize(needed);
    void* start = memory.data();
    size_t space = memory.size() * sizeof(float);
    auto* next = static_cast<float*>(std::align(kAlignment * sizeof(float), sizeof(float), start, space));
    float* taken[6];
    for (int i = 0; i < 6; ++i) {
      taken[i] = next;
      next += rows * widths[i];
    }
    return {taken[0], taken[1], taken[2], taken[3], taken[4], taken[5]};
  }

  template <typename Body>
  void each(int64_t n, int64_t grain, const Body& body) const {
    if (parallel_) return parallel_tasks(n, grain, body);
    for (int64_t i = 0; i < n; ++i) body(i);
  }

  template <typename Body>
  void each_row(int64_t rows, const Body& body) const {
    each(rows, 1 + 16384 / hidden_stride_, body);
  }

  void multiply_all(const Linear& linear, const Rows& rows, bool onto_output = false) const {
    const float* const bias = floats(linear.bias);
    const Start start = onto_output ? Start::kOutput : bias ? Start::kBias : Start::kZero;
    if (parallel_) return multiply_in_parallel(linear.weights(), rows, start, bias);
    multiply(linear.weights(), rows, 0, linear.weights().panels(), start, bias);
  }

  void embed(const Block& block, float* hidden) const {
    const int64_t n = d_.hidden;
    const auto* const from = static_cast<const char*>(d_.embedding.const_data_ptr());
    const int64_t row_bytes = d_.embedding.stride(0) * static_cast<int64_t>(d_.embedding.element_size());
    const ScalarType type = d_.embedding.scalar_type();
    each_row(block.rows, [&](int64_t r) {
      const char* const row = from + step_.tokens[block.first + r] * row_bytes;
      float* const to = hidden + r * hidden_stride_;
      if (type == ScalarType::Float)
        std::memcpy(to, row, n * sizeof(float));
      else if (type == ScalarType::BFloat16)
        ISA_DISPATCH(widen_row<BFloat16>)(reinterpret_cast<const BFloat16*>(row), n, to);
      else
        ISA_DISPATCH(widen_row<Half>)(reinterpret_cast<const Half*>(row), n, to);
    });
  }

  void norm_rows(const float* x, const Tensor& weight, int64_t rows, float* to) const {
    const auto norm = ISA_DISPATCH(norm_row);
    each_row(rows, [&](int64_t r) {
      norm(x + r * hidden_stride_, floats(weight), d_.hidden, static_cast<float>(d_.eps),
           to + r * hidden_stride_);
    });
  }

  // hidden += norm(x W^T + bias), with the norm where the architecture has one.
  void add_branch(const Linear& linear, const float* x, int64_t x_stride,
                  const std::optional<Tensor>& norm_after, int64_t rows, const Buffers& b) const {
    if (!norm_after && !linear.bias)
      return multiply_all(linear, {x, x_stride, b.hidden, hidden_stride_, rows}, true);
    multiply_all(linear, {x, x_stride, b.normed, hidden_stride_, rows});
    if (norm_after) norm_rows(b.normed, *norm_after, rows, b.normed);
    each_row(rows, [&](int64_t r) {
      ISA_DISPATCH(add_row)(b.normed + r * hidden_stride_, d_.hidden, b.hidden + r * hidden_stride_);
    });
  }

  const float* norm_before(const std::optional<Tensor>& norm, int64_t rows, const Buffers& b) const {
    if (!norm) return b.hidden;
    norm_rows(b.hidden, *norm, rows, b.normed);
    return b.normed;
  }

  void run_layer(size_t index, const Block& block, const Buffers& b) const {
    const Layer& layer = d_.layers[index];
    const float* x = norm_before(layer.norm_before_attention, block.rows, b);
    multiply_all(layer.qkv, {x, hidden_stride_, b.qkv, qkv_stride_, block.rows});
    each_row(block.rows, [&](int64_t r) { finish_token(index, block.first + r, b.qkv + r * qkv_stride_); });
    attend(index, block, b);
    add_branch(layer.attention_out, b.attended, query_width_, layer.norm_after_attention, block.rows, b);

    x = norm_before(layer.norm_before_mlp, block.rows, b);
    multiply_all(layer.gate_up, {x, hidden_stride_, b.gate_up, gate_up_stride_, block.rows});
    const int64_t inner = layer.gate_up.outputs / 2, gated_stride = padded(inner);
    each(block.rows, 1 + 16384 / inner, [&](int64_t r) {
      const float* const gate = b.gate_up + r * gate_up_stride_;
      ISA_DISPATCH(gate_row)(gate, gate + inner, inner, b.gated + r * gated_stride);
    });
    add_branch(layer.down, b.gated, gated_stride, layer.norm_after_mlp, block.rows, b);
  }

  // Norms and rotates a token's queries and keys, and puts its keys and values into the cache.
  void finish_token(size_t index, int64_t row, float* qkv) const {
    const Layer& layer = d_.layers[index];
    float *const k = qkv + query_width_, *const v = k + key_width_;
    norm_heads(layer.q_norm, qkv, query_width_);
    norm_heads(layer.k_norm, k, key_width_);
    if (layer.cos) {
      const int64_t at = step_.positions[row] * d_.dim;
      for (int64_t h = 0; h < d_.heads + d_.kv_heads; ++h)
        ISA_DISPATCH(rotate_head)(qkv + h * d_.dim, floats(layer.cos) + at, floats(layer.sin) + at, d_.dim);
    }
    const Tensor &k_cache = step_.k_cache, &v_cache = step_.v_cache;
    const int64_t size = k_cache.size(3), slot = step_.slots[row], block = slot / size;
    for (int64_t h = 0; h < d_.kv_heads; ++h) {
      const int64_t to = layer_offset(index) + ((block * d_.kv_heads + h) * size + slot % size) * d_.dim;
      store_as(k_cache.scalar_type(), const_cast<void*>(k_cache.const_data_ptr()), to, k + h * d_.dim,
               d_.dim);
      store_as(v_cache.scalar_type(), const_cast<void*>(v_cache.const_data_ptr()), to, v + h * d_.dim,
               d_.dim);
    }
  }

  void norm_heads(const std::optional<Tensor>& weight, float* x, int64_t width) const {
    if (!weight) return;
    const int64_t size = weight->numel();
    for (int64_t i = 0; i < width; i += size)
      ISA_DISPATCH(norm_row)(x + i, floats(*weight), size, static_cast<float>(d_.eps), x + i);
  }

  int64_t layer_offset(size_t index) const { return static_cast<int64_t>(index) * step_.k_cache.stride(0); }

  void attend(size_t index, const Block& block, const Buffers& b) const {
    const ScalarType type = step_.k_cache.scalar_type();
    const auto at = [&](const Tensor& cache) {
      return static_cast<const char*>(cache.const_data_ptr()) +
             layer_offset(index) * static_cast<int64_t>(cache.element_size());
    };
    const Attention a{b.qkv,
                      at(step_.k_cache),
                      at(step_.v_cache),
                      b.attended,
                      qkv_stride_,
                      d_.dim,
                      d_.heads,
                      d_.kv_heads,
                      d_.heads / d_.kv_heads,
                      d_.dim,
                      step_.k_cache.size(3),
                      d_.layers[index].window,
                      static_cast<float>(d_.scale)};
    const auto members = static_cast<int64_t>(block.members.size());
    each(members + static_cast<int64_t>(block.tiles.size()), 1, [&](int64_t i) {
      if (i < members)
        attend_in_float(type, a, block.members[i]);
      else
        attend_in_float(type, a, block.tiles[i - members]);
    });
  }

  // The logits of those rows of the block that are asked for.
  void finish(const Block& block, const Buffers& b) const {
    auto next = std::lower_bound(select_.begin(), select_.end(), block.first);
    const auto end = std::lower_bound(next, select_.end(), block.first + block.rows);
    thread_local std::vector<float> normed, logits;
    const int64_t stride = padded(d_.head.outputs), row_bytes = stride * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::max<int64_t>(1, kLogitBytes / row_bytes);
    while (next != end) {
      const int64_t count = std::min<int64_t>(most, end - next), first = next - select_.begin();
      if (static_cast<int64_t>(normed.size()) < count * hidden_stride_) normed.resize(count * hidden_stride_);
      float *const to = normed.data(), *y = sink_.room(first);
      if (!y) {
        if (static_cast<int64_t>(logits.size()) < count * stride) logits.resize(count * stride);
        y = logits.data();
      }
      for (int64_t i = 0; i < count; ++i) ISA_DISPATCH(norm_row)
      (b.hidden + (next[i] - block.first) * hidden_stride_, floats(d_.norm), d_.hidden,
       static_cast<float>(d_.eps), to + i * hidden_stride_);
      multiply_all(d_.head, {to, hidden_stride_, y, stride, count});
      each(count, 1 + 16384 / stride, [&](int64_t i) { sink_.take(first + i, y + i * stride); });
      next += count;
    }
  }

  const Decoder& d_;
  const Step& step_;
  const std::vector<int64_t>& select_;
  Sink& sink_;
  const int64_t hidden_stride_, query_width_, key_width_, qkv_stride_, attended_stride_;
  int64_t gate_up_stride_ = 0, longest_run_ = 0;
  std::vector<int32_t> lengths_;
  std::vector<const int32_t*> tables_;
  bool parallel_ = true;
};

}  // namespace

bool Decoder::fits_caches() const {
  int64_t bytes = 0;
  const auto add = [&](const Linear& linear) {
    bytes += linear.packed.numel() * static_cast<int64_t>(linear.packed.element_size());
  };
  for (const Layer& layer : layers)
    for (const Linear* linear : {&layer.qkv, &layer.attention_out, &layer.gate_up, &layer.down}) add(*linear);
  add(head);
  return bytes <= kCacheBytes;
}

void check_cache(const char* op, const Decoder& d, const Tensor& k_cache, const Tensor& v_cache) {
  bool same = k_cache.dim() == 5 && v_cache.dim() == 5 && k_cache.is_cpu() && v_cache.is_cpu() &&
              k_cache.is_contiguous() && v_cache.is_contiguous() &&
              k_cache.scalar_type() == v_cache.scalar_type();
  for (int64_t i = 0; same && i < 5; ++i) same = k_cache.size(i) == v_cache.size(i);
  check(same && k_cache.size(0) == static_cast<int64_t>(d.layers.size()) && k_cache.size(2) == d.kv_heads &&
            k_cache.size(4) == d.dim,
        op, ": k_cache and v_cache must be contiguous CPU tensors [", d.layers.size(), ", blocks, ",
        d.kv_heads, ", block_size, ", d.dim, "] of one type");
}

void run(const Decoder& decoder, const Step& step, const std::vector<int64_t>& select, Sink& sink) {
  if (step.rows() > 0) Pass(decoder, step, select, sink).run();
}

}  // namespace thinktwice
