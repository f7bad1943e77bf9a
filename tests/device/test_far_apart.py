"""Addresses beyond 2^31 elements: of small tensors whose first and last along a dimension lie so far apart."""

from __future__ import annotations

import pytest
import torch

from effattn import (
    biased_attention,
    cascaded_group_attention,
    multi_scale_aggregation,
    multi_scale_linear_attention,
    relu_linear_attention,
    use_backend,
)
from effattn.testing import (
    BiasedCase,
    CascadeCase,
    MultiScaleCase,
    allowed_error,
    error,
    gradients_by_name,
    make_tensor,
)

pytestmark = pytest.mark.usefixtures("device")

DTYPE = torch.bfloat16
FAR = 2**31 + 2**16  # elements: more than 32 bits can count
APART = 2**20  # from where one tensor begins to where the next does


class Linear:
    """relu_linear_attention with its arguments by name, as the cases of the other functions have them."""

    images = ("q", "k", "v")

    def inputs(self, dtype):
        return {name: make_tensor(3, 5, 8, seed=seed, dtype=dtype) for seed, name in enumerate(self.images)}

    def call(self, function, inputs):
        return function(*inputs.values())


#: By function a case, and the dimensions that are taken apart.
CASES = {
    relu_linear_attention: (Linear(), (0, 1, 2)),
    multi_scale_aggregation: (MultiScaleCase(3, 1, 8, 3, 4, kernels=(3,)), (0, 1, "pixels")),
    multi_scale_linear_attention: (MultiScaleCase(3, 1, 8, 3, 4, kernels=(3,)), (0, 1, "pixels")),
    cascaded_group_attention: (CascadeCase(3, 8, 4, 3, 4, (3, 2), (3, 1)), (0, 1, "pixels")),
    biased_attention: (BiasedCase(3, 3, 5, 6, 8, 4), (0, 1, 2, 3)),
}


@pytest.fixture(scope="module")
def memories():
    """By device, more than 2^31 elements, of which few are ever touched."""
    return {}


def far(t, dim, memory, number):
    """The values of ``t``, the first and the last of ``dim`` FAR apart; or of all pixels, whose rows are contiguous."""
    strides = list(t.contiguous().stride())
    if dim == "pixels":
        strides[3] = FAR // (t.shape[2] * t.shape[3] - 1)
        strides[2] = t.shape[3] * strides[3]
    else:
        strides[dim] = FAR // (t.shape[dim] - 1)
    # By way of data: what is written for one tensor does not count as a change of another.
    return memory.data.as_strided(t.shape, strides, number * APART).copy_(t)


@pytest.mark.parametrize(
    ("function", "dim"),
    [pytest.param(f, dim, id=f"{f.__name__}-{dim}") for f, (_, dims) in CASES.items() for dim in dims],
)
def test_far_apart(device, backend, memories, function, dim):
    case = CASES[function][0]
    if device not in memories:
        memories[device] = torch.empty(FAR + 8 * APART, dtype=DTYPE, device=device)
    inputs = case.inputs(DTYPE)

    def results(name, dtype, place):
        weights = torch.promote_types(dtype, torch.float32)
        leaves = {}
        for number, (key, value) in enumerate(inputs.items()):
            images = key in case.images
            of = [value] if isinstance(value, torch.Tensor) else value
            leaves[key] = [
                (place(t.to(dtype), number) if images else t.to(weights).to(device)).detach().requires_grad_()
                for t in of
            ]
        arguments = {k: leaves[k][0] if isinstance(v, torch.Tensor) else leaves[k] for k, v in inputs.items()}
        flat = gradients_by_name(leaves)
        with use_backend(name):
            out = case.call(function, arguments)
        grad_out = place(make_tensor(*out.shape, seed=9).to(dtype), len(inputs))
        grads = torch.autograd.grad(out, list(flat.values()), grad_out)
        return {key: t.detach().cpu() for key, t in zip(("out", *flat), (out, *grads), strict=True)}

    near = [results("reference", dtype, lambda t, _: t.to(device)) for dtype in (torch.float64, DTYPE)]
    ours = results(backend, DTYPE, lambda t, number: far(t, dim, memories[device], number))
    for key, result in ours.items():
        truth, plain = (results[key] for results in near)
        assert error(result, truth) <= allowed_error(plain, truth, 1e-5), key
