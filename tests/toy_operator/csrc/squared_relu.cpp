// The square of a ReLU as a torch operator: allocation, launch, registration.
#include <tuple>

#include "../kernels/params/squared_relu.h"
#include "images.h"
#include "signature.h"
#include "weights.h"
#include EFFATTN_KERNELS(squared_relu)

namespace effattn {
namespace {

const Signature kSignature("squared_relu");

// The params without results, and the tensors that they point into; of arguments that are right.
struct Call {
  SquaredReluParams p{};
  Tensors alive;

  Call(const Tensor& x, const Tensor& weight, double scale) {
    p.dtype = kernel_dtype(x);
    p.batch = x.size(0);
    p.channels = x.size(1);
    p.tokens = x.size(2) * x.size(3);
    p.scale = static_cast<float>(scale);
    p.weight = floats(weight, alive);
    alive.push_back(with_mergeable_rows(x));
    p.x = image(alive.back());
  }
};

std::vector<int64_t> shape_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

Tensor forward(const Tensor& x, const Tensor& weight, double scale) {
  kSignature.check({&x, &weight, scale});
  Call call(x, weight, scale);
  Tensor out = new_image(x, shape_of(x), call.p.out);
  kernels::squared_relu(call.p, execution(x));
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                    double scale) {
  kSignature.check_backward(grad_out, {&x, &weight, scale}, {});
  Call call(x, weight, scale);
  call.alive.push_back(with_mergeable_rows(grad_out));
  call.p.grad_out = image(call.alive.back());
  Tensor grad_x = new_image(x, shape_of(x), call.p.grad_x);
  Tensor grad_weight = new_floats(weight, call.p.grad_weight);
  kernels::squared_relu_backward(call.p, execution(x));
  return {grad_x, grad_weight};
}

}  // namespace

EFFATTN_OPERATORS(m) {
  m.impl("squared_relu", TORCH_BOX(&forward));
  m.impl("squared_relu_forward", TORCH_BOX(&forward));
  m.impl("squared_relu_backward", TORCH_BOX(&backward));
}

}  // namespace effattn
