// The schema of every op of thinktwice_kernels on the CPU, once. What each does, its shapes and its errors:
// kernels/thinktwice_kernels/rows.py. Vectors of numbers beside the logits are float64.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(thinktwice_loss, m) {
  m.def(
      "row_statistics(Tensor logits, Tensor targets, Tensor? bias, Tensor temperature, float softcap,"
      " bool want_entropy) -> (Tensor logps, Tensor lse, Tensor entropy)");
  m.def(
      "row_gradient(Tensor logits, Tensor targets, Tensor? bias, Tensor temperature, float softcap,"
      " Tensor lse, Tensor? entropy, Tensor? d_logps, Tensor? d_entropy, Tensor? rows, Tensor(a!) out) -> "
      "()");
}
