// The schema of every op, once. What each does, its shapes and its errors: thinktwice_fast/model/csrc.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(thinktwice, m) {
  // Bookkeeping of the paged cache (bookkeeping.cpp); its tensors live on the CPU.
  m.def("cache_create(int num_blocks, int block_size) -> int");
  m.def("cache_destroy(int cache) -> ()");
  m.def("cache_prefill(int cache) -> int");
  m.def(
      "cache_extend(int cache, Tensor handles, Tensor counts, int version, int shared_keys)"
      " -> (int missing_blocks, Tensor block_tables, Tensor context_lens, Tensor cu_seqlens_q,"
      " Tensor positions, Tensor slots, Tensor group_offsets, Tensor shared_blocks)");
  m.def(
      "cache_take_ahead(int cache, Tensor handles, Tensor counts, int version, int shared_keys)"
      " -> (int missing_blocks, Tensor block_tables, Tensor group_offsets, Tensor shared_blocks)");
  m.def("cache_trim(int cache, Tensor handles) -> ()");
  m.def("cache_fork(int cache, int handle, int n) -> (Tensor handles, Tensor pairs)");
  m.def("cache_release(int cache, Tensor handles) -> ()");
  m.def("cache_free_blocks(int cache) -> int");
  m.def("cache_ref_counts(int cache) -> Tensor");
  m.def("cache_sequence(int cache, int handle) -> (int length, int version, Tensor blocks)");

  // Memory of a GPU that comes and goes (cuda/arena_ops.cpp); without kernels in a build without CUDA.
  m.def("arena_create(int device, int bytes) -> int");
  m.def("arena_destroy(int arena) -> ()");
  m.def("arena_map(int arena) -> ()");
  m.def("arena_unmap(int arena) -> ()");
  m.def("arena_tensor(int arena) -> Tensor");

  // The data, one kernel family per file under cpu/ and cuda/.
  m.def("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def(
      "rotary_write_kv(Tensor(a!) q, Tensor k, Tensor v, Tensor? q_norm, Tensor? k_norm, float eps,"
      " Tensor? cos, Tensor? sin, Tensor positions, Tensor slots, Tensor(b!) k_cache, Tensor(c!) v_cache)"
      " -> ()");
  m.def("copy_blocks(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor pairs) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens,"
      " Tensor cu_seqlens_q, float scale, int window=0, Tensor? parts=None) -> Tensor");
  m.def(
      "grouped_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor "
      "context_lens,"
      " Tensor group_offsets, Tensor shared_blocks, float scale, int window=0, Tensor? parts=None) -> "
      "Tensor");
  // CUDA only: what the two decode, for all layers of a step.
  m.def(
      "list_parts(Tensor q, Tensor k_cache, Tensor block_tables, Tensor context_lens, Tensor? cu_seqlens_q,"
      " Tensor? group_offsets, Tensor? shared_blocks, int window=0) -> Tensor");
  m.def(
      "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,"
      " Tensor sample_ids, Tensor positions)"
      " -> (Tensor tokens, Tensor logps, Tensor raw_logps, Tensor entropy, Tensor statuses)");
  m.def(
      "advance(Tensor? drawn, Tensor? drawn_logps, Tensor? drawn_entropies, Tensor stop_ids,"
      " Tensor block_tables, int block_size, int spare_slot, Tensor(a!) state, Tensor(b!) context_lens,"
      " Tensor(c!) new_tokens, Tensor(d!) new_logps, Tensor(e!) new_entropies) -> ()");
  // Training's attention: thinktwice_fast/model/shared_prefix.py.
  m.def(
      "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor lengths, Tensor prefix, float scale, int "
      "window=0)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "prefix_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
      " Tensor lengths, Tensor prefix, float scale, int window=0) -> (Tensor dq, Tensor dk, Tensor dv)");

  m.def("pack_weight(Tensor weight, Tensor(a!) packed, int first) -> ()");
  m.def("packed_linear(Tensor x, Tensor packed, int outputs) -> Tensor");

  // A whole decoder (cpu/decode.cpp).
  m.def(
      "decoder_create(Tensor embedding, Tensor norm, Tensor head, Tensor? head_bias, int heads, int kv_heads,"
      " int head_dim, float scale, float eps, bool group_attention) -> int");
  m.def("decoder_destroy(int decoder) -> ()");
  m.def(
      "decoder_add_layer(int decoder, Tensor? norm_before_attention, Tensor? norm_after_attention,"
      " Tensor? norm_before_mlp, Tensor? norm_after_mlp, Tensor? q_norm, Tensor? k_norm, Tensor qkv,"
      " Tensor? qkv_bias, Tensor attention_out, Tensor? attention_out_bias, Tensor gate_up,"
      " Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor? cos, Tensor? sin, int window) -> ()");
  m.def(
      "decoder_forward(int decoder, Tensor tokens, Tensor positions, Tensor slots, Tensor block_tables,"
      " Tensor context_lens, Tensor cu_seqlens_q, Tensor select, Tensor(a!) k_cache, Tensor(b!) v_cache)"
      " -> Tensor");
  m.def(
      "decoder_decode(int decoder, int cache, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor handles,"
      " Tensor tokens, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, int seed,"
      " Tensor sample_ids, Tensor positions, Tensor left, Tensor stop_ids, int steps, int enough_ended,"
      " int version) -> (Tensor tokens, Tensor logps, Tensor entropies, Tensor counts)");
}
