// Training attention on the CPU over a packed row whose segments may continue a shared prefix, and its
// gradients.
#include "cpu/prefix_attention.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

#define THINKTWICE_KERNELS "cpu/prefix_attention_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

// Where a row has few families, one with many members is divided until there are about so many tasks. Sums
// depend on the division, so it does not depend on the number of threads.
constexpr int64_t kEnoughTasks = 32;

// A segment without a prefix and those that continue it.
struct Family {
  Sequence root;
  std::vector<Sequence> members;
};

// Some members of a family under one KV head; the first slice has the root too.
struct Slice {
  const Family* family;
  int64_t kv_head;
  int64_t first, last;

  bool whole() const { return first == 0 && last == static_cast<int64_t>(family->members.size()); }
};

// What a slice adds to the gradients of its root's keys and values, in rows of `stride` floats.
struct RootSums {
  int64_t stride;
  std::vector<float> keys, values;
};

int64_t cost_of(const Sequence& s) { return s.length * (s.prefix_length + (s.length + 1) / 2); }

int64_t cost_of(const SegmentTile& tile) {
  return tile.tokens * (tile.sequence.prefix_length + tile.first + tile.tokens);
}

int64_t cost_of(const Slice& slice) {
  int64_t cost = slice.first == 0 ? cost_of(slice.family->root) : 0;
  for (int64_t m = slice.first; m < slice.last; ++m) cost += cost_of(slice.family->members[m]);
  return cost;
}

// Calls body(task) for every task; the costliest first, so that no thread is left with one when the others
// are done.
template <typename Task, typename Body>
void run_tasks(const std::vector<Task>& tasks, const Body& body) {
  std::vector<std::pair<int64_t, const Task*>> order;
  for (const Task& task : tasks) order.emplace_back(cost_of(task), &task);
  std::stable_sort(order.begin(), order.end(),
                   [](const auto& x, const auto& y) { return x.first > y.first; });
  parallel_tasks(static_cast<int64_t>(order.size()), 1, [&](int64_t i) { body(*order[i].second); });
}

std::vector<Sequence> make_sequences(const char* op, const Tensor& lengths, const Tensor& prefix,
                                     int64_t tokens) {
  const int64_t segments = lengths.numel();
  const auto* const length = lengths.const_data_ptr<int64_t>();
  const auto* const before = prefix.const_data_ptr<int64_t>();
  std::vector<Sequence> sequences;
  int64_t start = 0;
  for (int64_t s = 0; s < segments; ++s) {
    check(length[s] >= 0 && length[s] <= tokens - start, op, ": segment ", s, " of ", length[s],
          " tokens does not fit into the row of ", tokens);
    Sequence sequence{0, 0, start, length[s]};
    if (before[s] != -1) {
      check(before[s] >= 0 && before[s] < s && before[before[s]] == -1, op, ": the prefix of segment ", s,
            " is ", before[s], ", must be an earlier segment without a prefix, or -1");
      sequence.prefix_start = sequences[before[s]].start;
      sequence.prefix_length = sequences[before[s]].length;
    }
    sequences.push_back(sequence);
    start += length[s];
  }
  check(start == tokens, op, ": the segments have ", start, " tokens, the row has ", tokens);
  return sequences;
}

std::vector<Family> make_families(const std::vector<Sequence>& sequences, const Tensor& prefix) {
  const auto* const before = prefix.const_data_ptr<int64_t>();
  std::vector<Family> families;
  std::vector<size_t> family_of(sequences.size());
  for (size_t s = 0; s < sequences.size(); ++s) {
    if (before[s] == -1) {
      family_of[s] = families.size();
      families.push_back({sequences[s], {}});
    } else {
      families[family_of[before[s]]].members.push_back(sequences[s]);
    }
  }
  return families;
}

void check_heads(const char* op, const char* name, const Tensor& x, const Tensor& q, int64_t heads) {
  check(x.is_cpu() && x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == heads &&
            x.size(2) == q.size(2) && (x.stride(2) == 1 || x.size(2) == 1) &&
            x.scalar_type() == q.scalar_type(),
        op, ": ", name, " must be [", q.size(0), ", ", heads, ", ", q.size(2),
        "] of q's type, its last dimension contiguous");
}

void check_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                  const Tensor& prefix, int64_t window) {
  check(q.dim() == 3 && k.dim() == 3 && k.size(1) > 0 && q.size(1) % k.size(1) == 0, op,
        ": q and k must be [tokens, heads, head_dim], with query heads that share the KV heads evenly");
  check_heads(op, "q", q, q, q.size(1));
  check_heads(op, "k", k, q, k.size(1));
  check_heads(op, "v", v, q, k.size(1));
  check(window >= 0, op, ": window must not be negative");
  check_vector(lengths, "prefix attention: lengths", ScalarType::Long, lengths.numel());
  check_vector(prefix, "prefix attention: prefix", ScalarType::Long, lengths.numel());
}

Attention describe(const Tensor& q, const Tensor& k, Tensor& out, double scale, int64_t window) {
  Attention a{};
  a.q = q.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.q_token_stride = q.stride(0);
  a.q_head_stride = q.stride(1);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.group = a.heads / a.kv_heads;
  a.dim = q.size(2);
  a.window = window;
  a.scale = static_cast<float>(scale);
  return a;
}

Heads heads_of(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }

int64_t tile_tokens(const Attention& a) { return std::max<int64_t>(1, kRowsPerTile / a.group); }

template <typename Body>
void for_each_tile(const Attention& a, const Sequence& sequence, int64_t kv_head, const Body& body) {
  for (int64_t t = 0; t < sequence.length; t += tile_tokens(a))
    body(SegmentTile{sequence, t, std::min(tile_tokens(a), sequence.length - t), kv_head});
}

template <typename T>
void forward(const PrefixForward& f, const std::vector<Sequence>& sequences) {
  const Attention& a = f.attention;
  std::vector<SegmentTile> tiles;
  for (const Sequence& sequence : sequences)
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for_each_tile(a, sequence, head, [&](const SegmentTile& tile) { tiles.push_back(tile); });
  const auto attend_tile = ISA_DISPATCH(attend_segment<T>);
  run_tasks(tiles, [&](const SegmentTile& tile) {
    attend_tile(f, tile, thread_workspace(tile_tokens(a) * a.group, a.dim));
  });
}

// Rounds the rows of `sums` into those from `token` on of `to`.
template <typename T>
void store_sums(const Attention& a, const float* sums, int64_t stride, int64_t token, int64_t count,
                int64_t kv_head, void* to) {
  for (int64_t i = 0; i < count; ++i) {
    T* const row = static_cast<T*>(to) + ((token + i) * a.kv_heads + kv_head) * a.dim;
    for (int64_t d = 0; d < a.dim; ++d) row[d] = static_cast<T>(sums[i * stride + d]);
  }
}

template <typename T>
RootSums backward_slice(const PrefixBackward& b, const Slice& slice) {
  const Attention& a = b.attention;
  const auto add_tile = ISA_DISPATCH(backward_tile<T>);
  const BackwardWorkspace work = backward_workspace(tile_tokens(a) * a.group, a.dim);
  const int64_t stride = work.weights.row_stride;
  const Sequence& root = slice.family->root;
  int64_t positions = root.length;
  for (int64_t m = slice.first; m < slice.last; ++m)
    positions = std::max(positions, slice.family->members[m].end());
  const int64_t own = root.length * stride;  // where a member's own rows start
  RootSums sums{stride, std::vector<float>(positions * stride), std::vector<float>(positions * stride)};
  const auto add = [&](const SegmentTile& tile) {
    add_tile(b, tile, work, sums.keys.data(), sums.values.data());
  };
  if (slice.first == 0) for_each_tile(a, root, slice.kv_head, add);
  for (int64_t m = slice.first; m < slice.last; ++m) {
    const Sequence& member = slice.family->members[m];
    std::fill(sums.keys.begin() + own, sums.keys.end(), 0.0f);
    std::fill(sums.values.begin() + own, sums.values.end(), 0.0f);
    for_each_tile(a, member, slice.kv_head, add);
    store_sums<T>(a, sums.keys.data() + own, stride, member.start, member.length, slice.kv_head, b.dk);
    store_sums<T>(a, sums.values.data() + own, stride, member.start, member.length, slice.kv_head, b.dv);
  }
  sums.keys.resize(own);
  sums.values.resize(own);
  return sums;
}

// Of every family and KV head, one after another.
std::vector<Slice> make_slices(const Attention& a, const std::vector<Family>& families) {
  const int64_t tasks = static_cast<int64_t>(families.size()) * a.kv_heads;
  const int64_t wanted = tasks ? (kEnoughTasks + tasks - 1) / tasks : 1;
  std::vector<Slice> slices;
  for (const Family& family : families) {
    const auto members = static_cast<int64_t>(family.members.size());
    const int64_t step = std::max<int64_t>(1, (members + wanted - 1) / wanted);
    for (int64_t head = 0; head < a.kv_heads; ++head)
      for (int64_t first = 0; first == 0 || first < members; first += step)
        slices.push_back({&family, head, first, std::min(members, first + step)});
  }
  return slices;
}

template <typename T>
void backward(const PrefixBackward& b, const std::vector<Family>& families) {
  const Attention& a = b.attention;
  const std::vector<Slice> slices = make_slices(a, families);
  std::vector<RootSums> left(slices.size());  // by the slices that are not whole families
  const auto store_root = [&](const Slice& slice, const RootSums& sums) {
    const Sequence& root = slice.family->root;
    store_sums<T>(a, sums.keys.data(), sums.stride, root.start, root.length, slice.kv_head, b.dk);
    store_sums<T>(a, sums.values.data(), sums.stride, root.start, root.length, slice.kv_head, b.dv);
  };
  run_tasks(slices, [&](const Slice& slice) {
    RootSums sums = backward_slice<T>(b, slice);
    if (slice.whole())
      store_root(slice, sums);
    else
      left[&slice - slices.data()] = std::move(sums);
  });
  parallel_tasks(static_cast<int64_t>(slices.size()), 1, [&](int64_t i) {
    if (slices[i].first != 0 || slices[i].whole()) return;
    for (size_t other = i + 1; other < slices.size() && slices[other].first != 0; ++other) {
      std::transform(left[i].keys.begin(), left[i].keys.end(), left[other].keys.begin(), left[i].keys.begin(),
                     std::plus<float>());
      std::transform(left[i].values.begin(), left[i].values.end(), left[other].values.begin(),
                     left[i].values.begin(), std::plus<float>());
    }
    store_root(slices[i], left[i]);
  });
}

// Calls run(T()) with the tensors' element type T.
template <typename Run>
void in_type(const char* op, ScalarType dtype, const Run& run) {
  if (dtype == ScalarType::Float) return run(float());
  if (dtype == ScalarType::BFloat16) return run(BFloat16());
  check(dtype == ScalarType::Half, op, ": type ", torch::headeronly::toString(dtype),
        " is not one of float32, bfloat16, float16");
  run(Half());
}

std::tuple<Tensor, Tensor> prefix_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor prefix,
                                            double scale, int64_t window) {
  const char* const op = "prefix_attention";
  check_inputs(op, q, k, v, lengths, prefix, window);
  const std::vector<Sequence> sequences = make_sequences(op, lengths, prefix, q.size(0));
  Tensor out = new_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = new_tensor({q.size(0), q.size(1)}, ScalarType::Float);
  const PrefixForward f{describe(q, k, out, scale, window), heads_of(k), heads_of(v),
                        lse.mutable_data_ptr<float>()};
  in_type(op, q.scalar_type(), [&](auto type) { forward<decltype(type)>(f, sequences); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> prefix_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v,
                                                             Tensor out, Tensor lse, Tensor lengths,
                                                             Tensor prefix, double scale, int64_t window) {
  const char* const op = "prefix_attention_backward";
  check_inputs(op, q, k, v, lengths, prefix, window);
  check_heads(op, "grad", grad, q, q.size(1));
  check_heads(op, "out", out, q, q.size(1));
  check(lse.is_cpu() && lse.is_contiguous() && lse.scalar_type() == ScalarType::Float && lse.dim() == 2 &&
            lse.size(0) == q.size(0) && lse.size(1) == q.size(1),
        op, ": lse must be contiguous float32 [", q.size(0), ", ", q.size(1), "]");
  const std::vector<Family> families = make_families(make_sequences(op, lengths, prefix, q.size(0)), prefix);
  Tensor dq = new_tensor({q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor dk = new_tensor({k.size(0), k.size(1), k.size(2)}, q.scalar_type());
  Tensor dv = new_tensor({k.size(0), k.size(1), k.size(2)}, q.scalar_type());
  const PrefixBackward b{describe(q, k, dq, scale, window),
                         heads_of(k),
                         heads_of(v),
                         heads_of(out),
                         heads_of(grad),
                         lse.const_data_ptr<float>(),
                         dk.mutable_data_ptr(),
                         dv.mutable_data_ptr()};
  in_type(op, q.scalar_type(), [&](auto type) { backward<decltype(type)>(b, families); });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("prefix_attention", TORCH_BOX(&thinktwice::prefix_attention));
  m.impl("prefix_attention_backward", TORCH_BOX(&thinktwice::prefix_attention_backward));
}
