"""The tolerance itself: what it must let pass, and what it must find."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from effattn.tolerance import check_against


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CONTRACTIONS = {
    "mm": (lambda a, b: a.flatten(1) @ b.flatten(1).T, (4, 3, 8, 8), (2, 3, 8, 8)),
    "bmm": (lambda a, b: a @ b.mT, (3, 8, 25), (3, 6, 25)),
    "convolution": (functional.conv2d, (4, 3, 8, 8), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_torch_passes_where_products_cancel(name):
    """Sums of a size of 1e-5 of terms of a size of 1: the first half of a sum is minus the second, nearly."""
    call, *shapes = CONTRACTIONS[name]
    a, b = (numbers(*shape, seed=i) for i, shape in enumerate(shapes))
    dim = -1 if name == "bmm" else 1
    a, b = torch.cat([a, a + 1e-5 * numbers(*a.shape, seed=2)], dim), torch.cat([b, -b], dim)
    wide = a.double(), b.double()  # here, where nothing is rounded
    check_against(lambda: {"out": call(*wide)}, {"out": call(a, b)}, longest_sum=400)


def test_gradients_of_a_convolution_pass_where_products_cancel():
    x, weight = numbers(2, 3, 9, 9), numbers(4, 3, 5, 5, seed=1)
    x = torch.cat([x, x])
    grad = numbers(2, 4, 5, 5, seed=2)
    grad = torch.cat([grad, -grad + 1e-5 * numbers(*grad.shape, seed=3)])

    def gradient(*tensors):
        x, weight, grad = tensors
        weight = weight.detach().requires_grad_()
        return {"grad": torch.autograd.grad(functional.conv2d(x, weight), weight, grad)[0]}

    wide = [t.double() for t in (x, weight, grad)]
    check_against(lambda: gradient(*wide), gradient(x, weight, grad), longest_sum=100)


def test_one_chain_of_sums_is_found():
    terms = numbers(64, 1 << 16).abs()
    wide = terms.double()
    check_against(lambda: {"out": wide.sum(1)}, {"out": terms.sum(1)}, terms.shape[1])
    chain = torch.zeros(64)
    for column in terms.unbind(1):
        chain = chain + column
    with pytest.raises(AssertionError, match="out"):
        check_against(lambda: {"out": wide.sum(1)}, {"out": chain}, terms.shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_intermediate_is_found(dtype):
    a, b, c = (numbers(32, 32, seed=i) for i in range(3))
    wide = [t.double() for t in (a, b, c)]

    def truth():
        return {"out": wide[0] @ wide[1] @ wide[2]}

    check_against(truth, {"out": a @ b @ c}, longest_sum=32)
    with pytest.raises(AssertionError, match="out"):
        check_against(truth, {"out": (a @ b).to(dtype).float() @ c}, longest_sum=32)
