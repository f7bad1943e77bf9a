"""Operators of modules' inference take images however they lie (of all others, tests/conformance).

Also run under sanitizers.
"""

from __future__ import annotations

import pytest
import torch
from inference_calls import CALLS, CHANNELS, HEIGHT, WIDTH

from effattn.testing import make_image
from effattn.tolerance import check_against

pytestmark = [pytest.mark.arguments, pytest.mark.pairwise]

FORMATS = ("channels_last", "channel slice", "crop", "transposed", "equal rows", "equal columns")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_any_strides(isa, name, memory_format, dtype):
    x = make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format).to(dtype)
    assert dtype != torch.float32 or x.stride() == make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format).stride()
    out = CALLS[name](x)
    assert out.dtype == dtype
    check_against(lambda: {"out": CALLS[name](x.double())}, {"out": out}, HEIGHT * WIDTH)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", CALLS)
def test_fake_tensors_say_the_same_strides(name, memory_format):
    x = make_image(2, CHANNELS, HEIGHT, WIDTH, memory_format)
    with torch.no_grad():
        real = CALLS[name](x)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = CALLS[name](mode.from_tensor(x))
    assert fake.shape == real.shape and fake.stride() == real.stride()


def test_more_elements_than_can_be_counted():
    """A fake tensor has no memory that would run out first."""
    x, bias = torch.empty(0, 2, 2, 2, device="meta"), torch.empty(4, device="meta")
    weights = [None] * 4 + [bias] * 3 + [[], None, None, bias, bias]
    with pytest.raises(RuntimeError, match="elements can be counted, not one of shape"):
        torch.ops.effattn.projected_attention(x, *weights, 1, 1, 1.0, 0, 2**40, 2**40)


def test_taps_of_more_than_can_be_counted():
    """A square whose side would be looked for until an int64 overflows."""
    taps, weights = torch.empty(0, 1, 1).expand(0, 2**63 - 1, 1), torch.empty(4)
    arguments = [taps, weights, None, None, weights, weights, torch.empty(1, 1, 1), [], None, None, weights, weights]
    with pytest.raises(RuntimeError, match=r"halving_taps: expected shape \(blocks, k \* k, 32\) with an odd k"):
        torch.ops.effattn.projected_attention(torch.empty(1, 2, 2, 2), *arguments, 1, 1, 1.0, 0, 2, 2)
