// The schema of every op of a decoder layer on the CPU, once. What each does:
// kernels/thinktwice_kernels/norm.py, gate.py and rotary.py. Everything is contiguous float32; rows of norms
// come flattened.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(thinktwice_layers, m) {
  m.def("rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor? besides, Tensor x, Tensor weight, float eps, bool want_weight)"
      " -> (Tensor of_x, Tensor of_weight)");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor");
  m.def(
      "rotary(Tensor qkv, Tensor cos, Tensor sin, int query_heads, int kv_heads, Tensor? q_norm,"
      " Tensor? k_norm, float eps) -> (Tensor q, Tensor k, Tensor v)");
  m.def(
      "rotary_backward(Tensor of_q, Tensor of_k, Tensor of_v, Tensor? qkv, Tensor cos, Tensor sin,"
      " Tensor? q_norm, Tensor? k_norm, float eps, bool want_q_norm, bool want_k_norm)"
      " -> (Tensor of_qkv, Tensor of_q_norm, Tensor of_k_norm)");
}
