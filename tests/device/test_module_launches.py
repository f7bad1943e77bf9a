"""What a module's call hands to torch, counted without a GPU: launches, casts, and the kernels that training reaches.

tests/device/test_gpu.py counts the launches themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from same import assert_as_near
from specified import check_gradients, module_results
from torch.utils._python_dispatch import TorchDispatchMode

from effattn import use_backend
from effattn.backends.triton import NAMESPACE
from effattn.nn import (
    CascadedGroupAttention,
    EfficientFormerAttention,
    EfficientFormerV2Attention,
    EfficientFormerV2AttentionDownsample,
    LiteMLA,
    LocalWindowAttention,
    fold_cache,
    lite_mla,
    projection,
)
from effattn.testing import randomise_batch_norm, randomise_what_starts_at_zero

pytestmark = pytest.mark.each_value

NARROW = [torch.float16, torch.bfloat16]
MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last]


def _v2(cls):
    return lambda: cls(dim=16, resolution=6, num_heads=2, key_dim=4)


MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "LiteMLA": (lambda: LiteMLA(16, 16, dim=8, scales=(3,), use_bias=(True, False)), (16, 4, 4)),
    "LiteMLA of two scales": (lambda: LiteMLA(16, 16, dim=8, scales=(3, 1), use_bias=(True, False)), (16, 4, 4)),
    "CascadedGroupAttention": (
        lambda: CascadedGroupAttention(16, 4, num_heads=2, attn_ratio=2, resolution=4, kernels=(3, 5)),
        (16, 4, 4),
    ),
    "LocalWindowAttention": (
        lambda: LocalWindowAttention(
            16, 4, num_heads=2, attn_ratio=2, resolution=4, window_resolution=2, kernels=(3, 3)
        ),
        (16, 4, 4),
    ),
    "EfficientFormerAttention": (lambda: EfficientFormerAttention(16, 4, 2, resolution=6), (36, 16)),
    "EfficientFormerV2Attention": (_v2(EfficientFormerV2Attention), (16, 6, 6)),
    "EfficientFormerV2AttentionDownsample": (_v2(EfficientFormerV2AttentionDownsample), (16, 6, 6)),
}


@pytest.fixture
def as_on_a_gpu(device, monkeypatch):
    """What modules do on a GPU, on a host that stands in for one, and with a mode that looks on."""
    if device.type == "cpu":
        monkeypatch.setattr(projection, "_is_on_cpu", lambda x: False)
    monkeypatch.setattr(fold_cache, "_is_plain_call", lambda: True)


class Operations(TorchDispatchMode):
    """Records operations with their arguments; what an operator of effattn does inside is not among them."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((function.name().partition(".")[0], args))
        return function(*args, **(kwargs or {}))

    @property
    def names(self):
        return [name for name, _ in self.calls]


def prepared(name, device, dtype=torch.float32, memory_format=torch.contiguous_format, batch=1):
    """A module and an input."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make()
    randomise_batch_norm(module, 0)
    randomise_what_starts_at_zero(module, 0)
    x = torch.randn(batch, *shape).to(device, dtype)
    return module.to(device, dtype).eval(), x.to(memory_format=memory_format) if x.dim() == 4 else x


def operations_of_a_later_call(module, x):
    with torch.no_grad():
        module(x)
        with Operations() as operations:
            out = module(x)
    return operations, out


# --- inference: launches ---------------------------------------------------------------------------------------------

VIEWS = ("_unsafe_view", "detach", "expand", "permute", "t", "transpose", "unsqueeze", "view")


def _launches_of_addmm(bias, *_):
    """cuBLASLt adds a bias of one dimension in the product's launch; others are copied to where the result will be."""
    return 1 if bias.dim() == 1 else 2


#: Of the operations of a module's inference on CUDA. Convolutions are not among them: with a bias they are two
#: launches, and in NCHW cuDNN may convert the image before and the result behind.
LAUNCHES: dict[str, Callable[..., int]] = {
    **{f"aten::{view}": lambda *_: 0 for view in VIEWS},
    "aten::promote_types": lambda *_: 0,
    **{f"aten::{name}": lambda *_: 1 for name in ("add_", "bmm", "mm", "relu")},
    "aten::addmm": _launches_of_addmm,
}
#: At most, beside those of one operator of ours. In NCHW no operation of torch adds a bias to the rows of a product in
#: the product's launch.
MOST_LAUNCHES = {
    ("LiteMLA", torch.contiguous_format): 3,
    ("LiteMLA", torch.channels_last): 2,
    ("LiteMLA of two scales", torch.contiguous_format): 3,
    ("LiteMLA of two scales", torch.channels_last): 2,
    ("CascadedGroupAttention", torch.contiguous_format): 3,
    ("CascadedGroupAttention", torch.channels_last): 3,
    ("LocalWindowAttention", torch.contiguous_format): 3,
    ("LocalWindowAttention", torch.channels_last): 3,
}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("name", "memory_format"), MOST_LAUNCHES, ids=str)
def test_launches_of_inference(device, backend, name, memory_format, dtype, batch):
    module, x = prepared(name, device, dtype, memory_format, batch)
    if name.startswith("LiteMLA"):  # as in the published models: without a bias in front
        module.qkv.conv.bias = None
    operations, out = operations_of_a_later_call(module, x)
    of_torch = [call for call in operations.calls if not call[0].startswith("effattn::")]
    assert len(operations.calls) == len(of_torch) + 1
    assert sum(LAUNCHES[called](*arguments) for called, arguments in of_torch) <= MOST_LAUNCHES[name, memory_format]
    assert out.is_contiguous(memory_format=memory_format)
    with torch.no_grad(), use_backend("reference"):
        truth, plain = module.double()(x.double()), module.to(dtype)(x)
    assert_as_near(out, plain, truth)


# --- inference: casts ------------------------------------------------------------------------------------------------


def assert_nothing_is_cast_again(module, x):
    with torch.no_grad():
        with Operations() as first:
            module(x)
        with Operations() as second:
            module(x)
    assert "aten::_to_copy" in first.names, "weights are kept in float32"
    assert not {"aten::_to_copy", "aten::copy_", "aten::clone", "aten::zeros", "aten::new_zeros"} & {*second.names}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_weights_of_narrow_modules_are_cast_once(device, backend, name, dtype):
    assert_nothing_is_cast_again(*prepared(name, device, dtype))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", [name for name in MODULES if name != "EfficientFormerAttention"])
def test_folded_weights_are_cast_once_under_autocast(device, backend, name):
    """EfficientFormerAttention calls linear layers, whose weights autocast casts. Of a single image a bias that is not
    folded is cast at every call: the product that adds it takes one type."""
    module, x = prepared(name, device, batch=2)
    with torch.autocast(device.type, torch.bfloat16):
        assert_nothing_is_cast_again(module, x.bfloat16())


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", MODULES)
def test_casts_follow_the_weights(device, backend, name):
    module, x = prepared(name, device, torch.bfloat16)
    with torch.no_grad():
        before = module(x)
        for parameter in module.parameters():
            parameter.mul_(0.75)
        after = module(x)
        fold_cache.invalidate(module)
        for part in module.modules():
            fold_cache.invalidate(part)
        assert torch.equal(after, module(x)) and not torch.equal(after, before)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_is_folded_for_an_operator_that_no_kernel_has(device, backend, monkeypatch):
    """Inference as one operator is for the CPU alone."""

    def fold(self):
        raise AssertionError("weights of an operator that does not serve")

    monkeypatch.setattr(lite_mla.LiteMLA, "_all_weights", fold)
    for module in (EfficientFormerAttention, EfficientFormerV2Attention, EfficientFormerV2AttentionDownsample):
        monkeypatch.setattr(module, "_packed", fold)
    monkeypatch.setattr(CascadedGroupAttention, "_packed", fold)
    for name in MODULES:
        module, x = prepared(name, device)
        with torch.no_grad():
            module(x)


# --- training --------------------------------------------------------------------------------------------------------


def of_kernels(operations, backend, suffix):
    """Calls of operators of the backend whose names end so."""
    begin = f"{NAMESPACE if backend == 'triton' else 'effattn'}::"
    return [name for name in operations.names if name.startswith(begin) and name.endswith(suffix)]


def traced_step(module, x, grad_out, autocast=None):
    """Operations of the forward and the backward, the output and all gradients."""
    cast = torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None)
    with Operations() as operations, cast:
        results = module_results(module, x, grad_out)
    return operations, results


@pytest.mark.parametrize("autocast", [None, *NARROW], ids=str)
@pytest.mark.parametrize("memory_format", MEMORY_FORMATS, ids=str)
@pytest.mark.parametrize("name", ["CascadedGroupAttention", "LocalWindowAttention"])
def test_training_with_batch_norm_reaches_the_attention_kernels(device, backend, name, memory_format, autocast):
    """Forward and backward, once a head, on views of what the convolutions made."""
    module, x = prepared(name, device, memory_format=memory_format)
    operations, _ = traced_step(module.train(), x, torch.randn_like(x), autocast)
    heads = len(module.qkvs if name == "CascadedGroupAttention" else module.attn.qkvs)
    for suffix in ("forward", "backward"):
        found = of_kernels(operations, backend, f"_{suffix}")
        assert len(found) == heads and len(set(found)) == 1
    assert "aten::slice_backward" not in operations.names
    # What cuts an image into windows and puts it together again, each with its gradient.
    copies = 0 if name == "CascadedGroupAttention" else 4
    assert operations.names.count("aten::clone") <= copies


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["CascadedGroupAttention", "LocalWindowAttention"])
def test_training_with_frozen_batch_norm_is_one_operator(device, backend, name, autocast):
    """Fine-tuning: the norms are affine maps, and fold into weights that get gradients."""
    module, x = prepared(name, device)
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.eval()
    grad_out = torch.randn_like(x)
    operations, results = traced_step(module, x, grad_out, autocast)
    for suffix in ("forward", "backward"):
        assert len(of_kernels(operations, backend, f"_{suffix}")) == 1
    if autocast is None:
        check_gradients(results, module, x, grad_out)
