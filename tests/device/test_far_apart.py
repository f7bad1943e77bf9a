"""Addresses beyond 2^31 elements: of small tensors whose first and last along a dimension lie so far apart."""

from __future__ import annotations

import pytest
import torch
from specified import expected, mapped, with_gradients

from effattn.backends.triton import LAUNCHERS
from effattn.ops import OPERATORS
from effattn.tolerance import GPU_ROUNDINGS, error

pytestmark = pytest.mark.usefixtures("device")

DTYPE = torch.bfloat16
FAR = 2**31 + 2**16  # elements: more than 32 bits can count
APART = 2**20  # from where one tensor begins to where the next does


def dimensions(operator):
    """Those that are taken apart; an image's pixels together, since its rows follow each other."""
    first = operator.signature.arguments[0]
    if first.kind == "image":
        return 0, 1, "pixels"
    return range(len(first.shapes[0].dims) + first.shapes[0].has_leading)


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


class LaidFarApart(torch.autograd.Function):
    """Lays the gradient of an output, which it leaves as it is, far apart."""

    @staticmethod
    def forward(ctx, out, lay):
        ctx.lay = lay
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad_out):
        return ctx.lay(grad_out), None


def calls():
    """In the short tier, of each operator the first and the last."""
    for name in LAUNCHERS:
        dims = dimensions(OPERATORS[name])
        for dim in dims:
            marks = () if dim in (dims[0], dims[-1]) else pytest.mark.full
            yield pytest.param(name, dim, id=f"{name}-{dim}", marks=marks)


@pytest.mark.parametrize(("name", "dim"), list(calls()))
def test_far_apart(device, memories, name, dim):
    operator = OPERATORS[name]
    if device not in memories:
        memories[device] = torch.empty(FAR + 8 * APART, dtype=DTYPE, device=device)
    case = dict(operator.cases[0])
    if dim == "pixels":  # of one image
        case[operator.signature.arguments[0].shapes[0].dims[0].text] = 1
    arguments, truth, allowed = expected(operator, case, DTYPE, roundings=GPU_ROUNDINGS)
    images = operator.signature.num_activations
    there = [far(t, dim, memories[device], number) for number, t in enumerate(arguments[:images])]
    there += mapped(lambda t: t.to(device), arguments[images:])

    def call(*arguments):
        return LaidFarApart.apply(operator(*arguments), lambda grad: far(grad, dim, memories[device], images))

    results = with_gradients(operator, call, there, DTYPE)
    ratios = {key: error(results[key].cpu(), t) / allowed[key] for key, t in truth.items()}
    assert all(ratio <= 1 for ratio in ratios.values()), ratios
