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

  // A tensor a scale in each list; lists of biases are empty where there are none. A list that may be empty
  // may be None too: AOTInductor hands that to an operator in place of an empty one. Weights are float32
  // whatever qkv is. Two names, of which the second carries the autograd formula.
#define EFFATTN_WEIGHTS \
  "Tensor[]? dw_weights, Tensor[]? pw_weights, Tensor[]? dw_biases, Tensor[]? pw_biases, "
#define EFFATTN_GRADIENTS                                                                              \
  " -> (Tensor grad_qkv, Tensor[] grad_dw_weights, Tensor[] grad_pw_weights, Tensor[] grad_dw_biases," \
  " Tensor[] grad_pw_biases)"
  m.def("multi_scale_aggregation(Tensor qkv, " EFFATTN_WEIGHTS "int head_dim) -> Tensor");
  m.def("multi_scale_aggregation_forward(Tensor qkv, " EFFATTN_WEIGHTS "int head_dim) -> Tensor");
  m.def("multi_scale_aggregation_backward(Tensor grad_out, Tensor qkv, " EFFATTN_WEIGHTS
        "int head_dim)" EFFATTN_GRADIENTS);
  m.def("multi_scale_linear_attention(Tensor qkv, " EFFATTN_WEIGHTS "int head_dim, float eps) -> Tensor");
  m.def("multi_scale_linear_attention_forward(Tensor qkv, " EFFATTN_WEIGHTS
        "int head_dim, float eps) -> (Tensor out, Tensor sums)");
  m.def("multi_scale_linear_attention_backward(Tensor grad_out, Tensor qkv, " EFFATTN_WEIGHTS
        "Tensor sums, int head_dim, float eps)" EFFATTN_GRADIENTS);

  // Inference of a module: 1x1 convolution, attention, 1x1 convolution.
  m.def("lite_mla(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, " EFFATTN_WEIGHTS
        "Tensor proj_weight, Tensor? proj_bias, int head_dim, float eps) -> Tensor");
#undef EFFATTN_WEIGHTS
#undef EFFATTN_GRADIENTS

  // Talking heads: no tensor, or the weights and biases of the two 1x1 convolutions over the heads, float32
  // like the bias. The backward recomputes everything.
#define EFFATTN_ATTENTION "Tensor q, Tensor k, Tensor v, Tensor bias, Tensor[]? talking_heads, float scale"
  m.def("biased_attention(" EFFATTN_ATTENTION ") -> Tensor");
  m.def("biased_attention_forward(" EFFATTN_ATTENTION ") -> Tensor");
  m.def("biased_attention_backward(Tensor grad_out, " EFFATTN_ATTENTION
        ") -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor[] grad_talking_heads)");
#undef EFFATTN_ATTENTION

  // A tensor a head in each list; lists of biases are empty where there are none.
#define EFFATTN_CASCADE                                                                                  \
  "Tensor x, Tensor[] qkv_weights, Tensor[]? qkv_biases, Tensor[] q_dw_weights, Tensor[]? q_dw_biases, " \
  "Tensor "                                                                                              \
  "attention_bias, "
#define EFFATTN_WINDOW "float scale, int window_height, int window_width"
  m.def("cascaded_group_attention(" EFFATTN_CASCADE EFFATTN_WINDOW ") -> Tensor");
  m.def("cascaded_group_attention_forward(" EFFATTN_CASCADE EFFATTN_WINDOW ") -> Tensor");
  m.def(
      "cascaded_group_attention_backward(Tensor grad_out, " EFFATTN_CASCADE EFFATTN_WINDOW
      ") -> (Tensor grad_x, Tensor[] grad_qkv_weights, Tensor[] grad_qkv_biases, Tensor[] grad_q_dw_weights,"
      " Tensor[] grad_q_dw_biases, Tensor grad_attention_bias)");
  // Inference of modules, with packed weights (effattn/backends/packed.py): the cascade, relu, 1x1
  // convolution; and a halving depthwise convolution of all or of the queries' image, 1x1 convolution,
  // attention, the values' depthwise convolution, enlargement, activation, 1x1 convolution.
  m.def(
      "cascaded_group_attention_projected(Tensor x, Tensor qkv, Tensor qkv_bias, Tensor taps, Tensor "
      "tap_bias, "
      "Tensor attention_bias, Tensor proj, Tensor proj_bias, int[] kernels, int key_dim, " EFFATTN_WINDOW
      ") -> Tensor");
  m.def(
      "projected_attention(Tensor x, Tensor? halving_taps, Tensor? halving_bias, Tensor? q, Tensor? q_bias, "
      "Tensor qkv, Tensor "
      "qkv_bias, "
      "Tensor bias, Tensor[]? talking_heads, Tensor? taps, Tensor? tap_bias, Tensor proj, Tensor proj_bias, "
      "int key_dim, "
      "int value_dim, float scale, int activation, int out_height, int out_width) -> Tensor");
  // With a BatchNorm behind each projection and each convolution, whose statistics are those of the batch:
  // means and variances of a head's outputs and of its convolved q. Norms of the projections, then those of
  // the convolutions.
#define EFFATTN_NORMED                                                                                   \
  "Tensor x, Tensor[] qkv_weights, Tensor[] q_dw_weights, Tensor[] norm_weights, Tensor[] norm_biases, " \
  "Tensor attention_bias, "
  m.def("cascaded_group_attention_batch_norm_forward(" EFFATTN_NORMED "float[] eps, " EFFATTN_WINDOW
        ") -> (Tensor out, Tensor statistics)");
  m.def("cascaded_group_attention_batch_norm_backward(Tensor grad_out, " EFFATTN_NORMED
        "Tensor out, Tensor statistics, float[] eps, " EFFATTN_WINDOW
        ") -> (Tensor grad_x, Tensor[] grad_qkv_weights, Tensor[] grad_q_dw_weights, "
        "Tensor[] grad_norm_weights, Tensor[] grad_norm_biases, Tensor grad_attention_bias)");
#undef EFFATTN_NORMED
#undef EFFATTN_CASCADE
#undef EFFATTN_WINDOW
}
