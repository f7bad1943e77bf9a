// The operators' schemas, once for all backends. Backends register their kernels for their device.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(effattn, m) {
  // Inference: out only, no autograd formula, so that a call pays for nothing it does not use.
  m.def("relu_linear_attention(Tensor q, Tensor k, Tensor v, float eps) -> Tensor");
  // Training: also the sums (..., Dv + 1, D) in float32, sum v^T k and below it sum k, that the backward
  // needs.
  m.def(
      "relu_linear_attention_forward(Tensor q, Tensor k, Tensor v, float eps) -> (Tensor out, Tensor sums)");
  m.def(
      "relu_linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor sums, float eps)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
}
