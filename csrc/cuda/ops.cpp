// The CUDA side of the ops: checks, outputs and workspace. What would take a look at the GPU's memory is not
// checked: a wait for the GPU costs more than these ops, and a captured graph cannot hold one. The sampler
// says of each row whether it was refused.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "advance_op.h"
#include "common/tensor_utils.h"
#include "cuda/kernels.h"

namespace thinktwice::gpu {
namespace {

constexpr int64_t kPartBytes = 256 << 20;  // of the splits' results that exist at a time

// Makes a tensor's device the current one and knows its stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// Torch's own checks are macros that 2.10 and 2.11 do not have.
void check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // else torch's next look at it would report this one again
  check(false, op, ": CUDA error: ", cudaGetErrorString(error));
}

Tensor new_like(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_empty(like, shape, dtype);
}

bool same_device(const Tensor& a, const Tensor& b) {
  return b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// A contiguous tensor on the device of `like`; a size of -1 may be any.
void check_tensor(const Tensor& tensor, const std::string& name, const Tensor& like, ScalarType dtype,
                  std::initializer_list<int64_t> sizes) {
  bool ok = same_device(like, tensor) && tensor.dim() == static_cast<int64_t>(sizes.size()) &&
            tensor.scalar_type() == dtype && tensor.is_contiguous();
  int64_t d = 0;
  for (const int64_t size : sizes) {
    ok = ok && (size < 0 || tensor.size(d) == size);
    ++d;
  }
  if (ok) return;
  std::string shape;
  for (const int64_t size : sizes)
    shape += (shape.empty() ? "" : ", ") + (size < 0 ? "any" : std::to_string(size));
  check(false, name, " must be a contiguous ", torch::headeronly::toString(dtype), " tensor [", shape,
        "] on the GPU that the other tensors are on");
}

Type type_of(const char* op, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Type::kFloat;
  if (dtype == ScalarType::BFloat16) return Type::kBFloat16;
  check(dtype == ScalarType::Half, op, ": type ", torch::headeronly::toString(dtype),
        " is not one of float32, bfloat16, float16");
  return Type::kHalf;
}

void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache, int64_t dim) {
  bool same = k_cache.is_cuda() && same_device(k_cache, v_cache) && k_cache.dim() == dim &&
              v_cache.dim() == dim && k_cache.scalar_type() == v_cache.scalar_type() &&
              k_cache.is_contiguous() && v_cache.is_contiguous();
  for (int64_t d = 0; same && d < dim; ++d) same = k_cache.size(d) == v_cache.size(d);
  check(same, op, ": k_cache and v_cache must be contiguous tensors of ", dim,
        " dimensions on one GPU, equal in shape and type");
  type_of(op, k_cache);
}

// New queries, keys or values of `op`: [tokens, heads, the cache's head size], any strides but the last.
void check_rows(const char* op, const char* name, const Tensor& rows, const Tensor& cache, int64_t tokens,
                int64_t heads) {
  check(same_device(cache, rows) && rows.dim() == 3 && rows.scalar_type() == cache.scalar_type(), op, ": ",
        name, " must be a tensor [tokens, heads, head_dim] of the cache's type ",
        torch::headeronly::toString(cache.scalar_type()), " on its GPU");
  check(rows.size(0) == tokens && rows.size(1) == heads && rows.size(2) == cache.size(3), op, ": ", name,
        " is [", rows.size(0), ", ", rows.size(1), ", ", rows.size(2), "], expected [", tokens, ", ", heads,
        ", ", cache.size(3), "]");
  check(rows.stride(2) == 1 || rows.size(2) == 1, op, ": the last dimension of ", name,
        " must be contiguous");
}

void write_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slots) {
  check_caches("write_kv", k_cache, v_cache, 4);
  check_tensor(slots, "write_kv: slots", k_cache, ScalarType::Long, {-1});
  const int64_t tokens = slots.numel();
  check_rows("write_kv", "k", k, k_cache, tokens, k_cache.size(1));
  check_rows("write_kv", "v", v, k_cache, tokens, k_cache.size(1));
  const OnDevice device(k_cache);
  const CacheWrite work{k.const_data_ptr(),
                        v.const_data_ptr(),
                        k_cache.mutable_data_ptr(),
                        v_cache.mutable_data_ptr(),
                        slots.const_data_ptr<int64_t>(),
                        tokens,
                        k.stride(0),
                        k.stride(1),
                        v.stride(0),
                        v.stride(1),
                        k_cache.size(0),
                        k_cache.size(1),
                        k_cache.size(2),
                        k_cache.size(3),
                        static_cast<int64_t>(k_cache.element_size())};
  check_cuda("write_kv", launch_write_kv(work, device.stream));
}

// The weight's elements, null without one; `is_whole`: one mean over all heads.
const void* norm_weight(const char* name, const std::optional<Tensor>& norm, const Tensor& rows,
                        int& is_whole) {
  if (!norm) return nullptr;
  const int64_t dim = rows.size(2), size = norm->numel();
  check(size == dim || size == rows.size(1) * dim, "rotary_write_kv: ", name, " has ", size,
        " elements, expected ", dim, " or, over all heads, ", rows.size(1) * dim);
  check_tensor(*norm, std::string("rotary_write_kv: ") + name, rows, rows.scalar_type(), {size});
  is_whole = size != dim;
  return norm->const_data_ptr();
}

void rotary_write_kv(Tensor q, Tensor k, Tensor v, std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                     double eps, std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor positions,
                     Tensor slots, Tensor k_cache, Tensor v_cache) {
  const char* const op = "rotary_write_kv";
  check_caches(op, k_cache, v_cache, 4);
  const int64_t tokens = slots.numel(), dim = k_cache.size(3);
  check(dim % 8 == 0 && dim <= 256, op, ": a head of ", dim,
        " elements is not supported on CUDA, only multiples of 8 up to 256");
  check_tensor(slots, "rotary_write_kv: slots", k_cache, ScalarType::Long, {-1});
  check_tensor(positions, "rotary_write_kv: positions", k_cache, ScalarType::Long, {tokens});
  check(q.dim() == 3, op, ": q must have 3 dimensions");
  check_rows(op, "q", q, k_cache, tokens, q.size(1));
  check_rows(op, "k", k, k_cache, tokens, k_cache.size(1));
  check_rows(op, "v", v, k_cache, tokens, k_cache.size(1));
  check(cos.has_value() == sin.has_value(), op, ": cos and sin are given together or not at all");
  Rotary w{};
  w.q_norm = norm_weight("q_norm", q_norm, q, w.q_norm_is_whole);
  w.k_norm = norm_weight("k_norm", k_norm, k, w.k_norm_is_whole);
  if (cos) {
    check_tensor(*cos, "rotary_write_kv: cos", k_cache, ScalarType::Float, {-1, dim});
    check_tensor(*sin, "rotary_write_kv: sin", k_cache, ScalarType::Float, {cos->size(0), dim});
    w.cos = cos->const_data_ptr<float>();
    w.sin = sin->const_data_ptr<float>();
    w.table_rows = cos->size(0);
  }
  w.q = q.mutable_data_ptr();
  w.k = k.const_data_ptr();
  w.v = v.const_data_ptr();
  w.k_cache = k_cache.mutable_data_ptr();
  w.v_cache = v_cache.mutable_data_ptr();
  w.positions = positions.const_data_ptr<int64_t>();
  w.slots = slots.const_data_ptr<int64_t>();
  w.tokens = tokens;
  w.blocks = k_cache.size(0);
  w.block_size = k_cache.size(2);
  w.q_token_stride = q.stride(0);
  w.q_head_stride = q.stride(1);
  w.k_token_stride = k.stride(0);
  w.k_head_stride = k.stride(1);
  w.v_token_stride = v.stride(0);
  w.v_head_stride = v.stride(1);
  w.heads = static_cast<int>(q.size(1));
  w.kv_heads = static_cast<int>(k_cache.size(1));
  w.dim = static_cast<int>(dim);
  w.eps = static_cast<float>(eps);
  const OnDevice device(k_cache);
  check_cuda(op, launch_rotary_write_kv(w, type_of(op, k_cache), device.stream));
}

void copy_blocks(Tensor k_cache, Tensor v_cache, Tensor pairs) {
  check_caches("copy_blocks", k_cache, v_cache, 5);
  check_tensor(pairs, "copy_blocks: pairs", k_cache, ScalarType::Long, {-1, 2});
  const int64_t block_bytes =
      k_cache.size(2) * k_cache.size(3) * k_cache.size(4) * static_cast<int64_t>(k_cache.element_size());
  const OnDevice device(k_cache);
  const BlockCopy work{k_cache.mutable_data_ptr(),
                       v_cache.mutable_data_ptr(),
                       pairs.const_data_ptr<int64_t>(),
                       pairs.size(0),
                       k_cache.size(0),
                       k_cache.size(1),
                       block_bytes};
  check_cuda("copy_blocks", launch_copy_blocks(work, device.stream));
}

void check_attention(const char* op, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                     const Tensor& block_tables, const Tensor& context_lens, int64_t window) {
  check_caches(op, k_cache, v_cache, 4);
  const int64_t dim = k_cache.size(3);
  check(dim % 8 == 0 && dim <= 256, op, ": a head of ", dim,
        " elements is not supported on CUDA, only multiples of 8 up to 256");
  check(same_device(k_cache, q) && q.dim() == 3 && q.size(2) == dim && q.stride(2) == 1, op,
        ": q must be [tokens, heads, ", dim, "] on the cache's GPU, its last dimension contiguous");
  check(q.size(1) % k_cache.size(1) == 0, op, ": ", q.size(1), " query heads cannot share ", k_cache.size(1),
        " KV heads evenly");
  check(q.scalar_type() == k_cache.scalar_type(), op, ": q and the cache must have one type");
  check(window >= 0, op, ": window must not be negative");
  const std::string name(op);
  check_tensor(context_lens, name + ": context_lens", k_cache, ScalarType::Int, {-1});
  check_tensor(block_tables, name + ": block_tables", k_cache, ScalarType::Int, {context_lens.numel(), -1});
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(block_tables.size(1) * k_cache.size(2) <= kMost - kSplit && q.size(0) * q.size(1) <= kMost, op,
        ": a sequence, or the query heads of all tokens, are more than 2^31");
}

int rounded_window(int64_t window) {
  return static_cast<int>(std::min<int64_t>(window, std::numeric_limits<int32_t>::max()));
}

Attention describe(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, Tensor& out,
                   const Tensor& block_tables, const Tensor& context_lens, double scale, int64_t window) {
  Attention a{};
  a.q = q.const_data_ptr();
  a.k_cache = k_cache.const_data_ptr();
  a.v_cache = v_cache.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.block_tables = block_tables.const_data_ptr<int32_t>();
  a.context_lens = context_lens.const_data_ptr<int32_t>();
  a.q_token_stride = q.stride(0);
  a.q_head_stride = q.stride(1);
  a.tokens = static_cast<int>(q.size(0));
  a.sequences = static_cast<int>(context_lens.numel());
  a.heads = static_cast<int>(q.size(1));
  a.kv_heads = static_cast<int>(k_cache.size(1));
  a.group = a.heads / a.kv_heads;
  a.dim = static_cast<int>(q.size(2));
  a.num_blocks = static_cast<int>(k_cache.size(0));
  a.block_size = static_cast<int>(k_cache.size(2));
  a.table_width = static_cast<int>(block_tables.size(1));
  a.splits = (a.table_width * a.block_size + kSplit - 1) / kSplit;
  a.window = rounded_window(window);
  a.scale = static_cast<float>(scale);
  return a;
}

// The list of the parts of `all` items.
Tensor list_parts(const char* op, const Tensor& like, Attention a, Type type, bool single_queries, int all,
                  cudaStream_t stream) {
  a.items = all;
  Tensor parts = new_like(like, {1 + most_parts(a, type), 4}, ScalarType::Int);
  a.parts = static_cast<Part*>(parts.mutable_data_ptr());
  check_cuda(op, launch_list_parts(a, type, single_queries, stream));
  return parts;
}

// Decodes `all` items, as many at a time as there is memory for the results of the parts of.
void decode(const char* op, const Tensor& like, Attention a, Type type, bool single_queries, int all,
            const std::optional<Tensor>& given, cudaStream_t stream) {
  if (given) {
    a.items = all;
    check_tensor(*given, std::string(op) + ": parts", like, ScalarType::Int, {1 + most_parts(a, type), 4});
  }
  Tensor parts = given ? *given : list_parts(op, like, a, type, single_queries, all, stream);
  a.parts = static_cast<Part*>(parts.mutable_data_ptr());
  const int64_t item = int64_t{a.heads} * a.splits;
  const int most =
      static_cast<int>(std::clamp<int64_t>(kPartBytes / (item * (a.dim + 2) * 4), 1, std::max(1, all)));
  Tensor sums = new_like(like, {most, item, a.dim}, ScalarType::Float);
  Tensor states = new_like(like, {most, item, 2}, ScalarType::Float);
  a.part_sums = sums.mutable_data_ptr<float>();
  a.part_states = static_cast<float2*>(states.mutable_data_ptr());
  for (a.first_item = 0; a.first_item < all; a.first_item += a.items) {
    a.items = std::min(most, all - a.first_item);
    check_cuda(op, launch_decode(a, type, single_queries, stream));
  }
}

// As many tokens as sequences: decoding, most likely, which any token can go through. Otherwise the sequences
// with one query do, and the others are prefilled; which they are only the GPU knows.
bool decodes_tokens(const Attention& a, Type type) { return type == Type::kFloat || a.tokens == a.sequences; }

Tensor paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens,
                       Tensor cu_seqlens_q, double scale, int64_t window, std::optional<Tensor> parts) {
  const char* const op = "paged_attention";
  check_attention(op, q, k_cache, v_cache, block_tables, context_lens, window);
  check_tensor(cu_seqlens_q, "paged_attention: cu_seqlens_q", k_cache, ScalarType::Int,
               {context_lens.numel() + 1});
  const Type type = type_of(op, q);
  const OnDevice device(q);
  Tensor out = new_like(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Attention a = describe(q, k_cache, v_cache, out, block_tables, context_lens, scale, window);
  if (a.tokens == 0 || a.splits == 0) return out;
  a.starts = cu_seqlens_q.const_data_ptr<int32_t>();
  const bool by_token = decodes_tokens(a, type);
  decode(op, q, a, type, !by_token, by_token ? a.tokens : a.sequences, parts, device.stream);
  if (!by_token) check_cuda(op, launch_prefill(a, type, device.stream));
  return out;
}

void add_groups(const std::string& op, Attention& a, const Tensor& q, const Tensor& group_offsets,
                const Tensor& shared_blocks) {
  check_tensor(shared_blocks, op + ": shared_blocks", q, ScalarType::Int, {-1});
  check_tensor(group_offsets, op + ": group_offsets", q, ScalarType::Int, {shared_blocks.numel() + 1});
  check(a.tokens == a.sequences, op, ": q has ", a.tokens, " queries for ", a.sequences, " sequences");
  a.group_offsets = group_offsets.const_data_ptr<int32_t>();
  a.shared_blocks = shared_blocks.const_data_ptr<int32_t>();
  a.groups = static_cast<int>(shared_blocks.numel());
}

Tensor grouped_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables,
                                Tensor context_lens, Tensor group_offsets, Tensor shared_blocks, double scale,
                                int64_t window, std::optional<Tensor> parts) {
  const char* const op = "grouped_decode_attention";
  check_attention(op, q, k_cache, v_cache, block_tables, context_lens, window);
  const Type type = type_of(op, q);
  const OnDevice device(q);
  Tensor out = new_like(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Attention a = describe(q, k_cache, v_cache, out, block_tables, context_lens, scale, window);
  if (a.tokens == 0 || a.splits == 0) return out;
  add_groups(op, a, q, group_offsets, shared_blocks);
  decode(op, q, a, type, false, a.tokens, parts, device.stream);
  return out;
}

// Of paged_attention with cu_seqlens_q, or of grouped_decode_attention with groups.
Tensor list_parts_of(Tensor q, Tensor k_cache, Tensor block_tables, Tensor context_lens,
                     std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> group_offsets,
                     std::optional<Tensor> shared_blocks, int64_t window) {
  const char* const op = "list_parts";
  check_attention(op, q, k_cache, k_cache, block_tables, context_lens, window);
  check(cu_seqlens_q.has_value() != group_offsets.has_value() &&
            group_offsets.has_value() == shared_blocks.has_value(),
        op, ": takes cu_seqlens_q, or group_offsets and shared_blocks");
  const Type type = type_of(op, q);
  const OnDevice device(q);
  Attention a = describe(q, k_cache, k_cache, q, block_tables, context_lens, 1.0, window);
  if (group_offsets) {
    add_groups(op, a, q, *group_offsets, *shared_blocks);
    return list_parts(op, q, a, type, false, a.tokens, device.stream);
  }
  check_tensor(*cu_seqlens_q, "list_parts: cu_seqlens_q", q, ScalarType::Int, {context_lens.numel() + 1});
  a.starts = cu_seqlens_q->const_data_ptr<int32_t>();
  const bool by_token = decodes_tokens(a, type);
  return list_parts(op, q, a, type, !by_token, by_token ? a.tokens : a.sequences, device.stream);
}

using Sampled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Sampled sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,
               Tensor sample_ids, Tensor positions) {
  check(logits.dim() == 2 && logits.size(1) > 0 &&
            logits.size(1) <= std::numeric_limits<int32_t>::max() - 64 &&
            (logits.stride(1) == 1 || logits.size(1) == 1),
        "sample: logits must be [rows, vocabulary] with a contiguous last dimension");
  const int64_t rows = logits.size(0);
  check_tensor(temperature, "sample: temperature", logits, ScalarType::Float, {rows});
  check_tensor(top_k, "sample: top_k", logits, ScalarType::Int, {rows});
  check_tensor(top_p, "sample: top_p", logits, ScalarType::Float, {rows});
  check_tensor(min_p, "sample: min_p", logits, ScalarType::Float, {rows});
  check_tensor(seed, "sample: seed", logits, ScalarType::Long, {1});
  check_tensor(sample_ids, "sample: sample_ids", logits, ScalarType::Long, {rows});
  check_tensor(positions, "sample: positions", logits, ScalarType::Long, {rows});
  const Type type = type_of("sample", logits);
  const OnDevice device(logits);
  Tensor tokens = new_like(logits, {rows}, ScalarType::Long),
         logps = new_like(logits, {rows}, ScalarType::Float);
  Tensor raw_logps = new_like(logits, {rows}, ScalarType::Float),
         entropies = new_like(logits, {rows}, ScalarType::Float);
  Tensor statuses = new_like(logits, {rows}, ScalarType::Int);
  const int slices = slices_of(logits.size(1));
  static_assert(sizeof(SliceTotals) == 4 * sizeof(double));
  Tensor maxima = new_like(logits, {rows, slices}, ScalarType::Float),
         totals = new_like(logits, {rows, slices, 4}, ScalarType::Double),
         lowest = new_like(logits, {rows}, ScalarType::Long);
  const Sampling work{logits.const_data_ptr(),
                      rows,
                      logits.size(1),
                      logits.stride(0),
                      temperature.const_data_ptr<float>(),
                      top_p.const_data_ptr<float>(),
                      min_p.const_data_ptr<float>(),
                      top_k.const_data_ptr<int32_t>(),
                      sample_ids.const_data_ptr<int64_t>(),
                      positions.const_data_ptr<int64_t>(),
                      seed.const_data_ptr<int64_t>(),
                      tokens.mutable_data_ptr<int64_t>(),
                      logps.mutable_data_ptr<float>(),
                      raw_logps.mutable_data_ptr<float>(),
                      entropies.mutable_data_ptr<float>(),
                      statuses.mutable_data_ptr<int32_t>(),
                      maxima.mutable_data_ptr<float>(),
                      static_cast<SliceTotals*>(totals.mutable_data_ptr()),
                      static_cast<uint64_t*>(lowest.mutable_data_ptr())};
  check_cuda("sample", launch_sample(work, type, device.stream));
  return {tokens, logps, raw_logps, entropies, statuses};
}

void advance(OptionalTensor drawn, OptionalTensor drawn_logps, OptionalTensor drawn_entropies,
             Tensor stop_ids, Tensor block_tables, int64_t block_size, int64_t spare_slot, Tensor state,
             Tensor context_lens, Tensor new_tokens, Tensor new_logps, Tensor new_entropies) {
  const OnDevice device(state);
  const Advance work =
      describe_advance(drawn, drawn_logps, drawn_entropies, stop_ids, block_tables, block_size, spare_slot,
                       state, context_lens, new_tokens, new_logps, new_entropies);
  check_cuda("advance", launch_advance(work, device.stream));
}

}  // namespace
}  // namespace thinktwice::gpu

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CUDA, m) {
  m.impl("write_kv", TORCH_BOX(&thinktwice::gpu::write_kv));
  m.impl("rotary_write_kv", TORCH_BOX(&thinktwice::gpu::rotary_write_kv));
  m.impl("copy_blocks", TORCH_BOX(&thinktwice::gpu::copy_blocks));
  m.impl("paged_attention", TORCH_BOX(&thinktwice::gpu::paged_attention));
  m.impl("grouped_decode_attention", TORCH_BOX(&thinktwice::gpu::grouped_decode_attention));
  m.impl("advance", TORCH_BOX(&thinktwice::gpu::advance));
  m.impl("list_parts", TORCH_BOX(&thinktwice::gpu::list_parts_of));
  m.impl("sample", TORCH_BOX(&thinktwice::gpu::sample));
}
