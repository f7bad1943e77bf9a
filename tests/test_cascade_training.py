"""cascaded_group_attention with BatchNorm inside: the operator against float64, what torch asks of it, and the module.

Outputs and gradients of the module are compared with timm's in test_nn_softmax_attention.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from tiers import full
from torch import nn

from effattn import use_backend
from effattn.nn import CascadedGroupAttention, LocalWindowAttention
from effattn.ops import OPERATORS
from effattn.testing import (
    FLOAT32_FORWARD_TOLERANCE,
    FLOAT32_GRADIENT_TOLERANCE,
    CascadeCase,
    allowed_error,
    error,
    make_image,
    make_tensor,
    randomise_batch_norm,
    rounding_noise,
    with_gradients,
)

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

batch_norm = OPERATORS["cascaded_group_attention_batch_norm"]
OPS = torch.ops.effattn
EPS = 1e-5


class TrainingCase(CascadeCase):
    """A cascade with norms in place of biases."""

    def inputs(self, dtype=torch.float32, memory_format="nchw"):
        plain = super().inputs(dtype, memory_format)
        outputs, heads = len(plain["qkv_weights"][0]), len(self.kernels)
        sizes = [outputs] * heads + [self.key_dim] * heads
        return {
            "x": plain["x"],
            "qkv_weights": plain["qkv_weights"],
            "q_dw_weights": plain["q_dw_weights"],
            "norm_weights": [1 + make_tensor(1, size, seed=70 + i)[0] / 4 for i, size in enumerate(sizes)],
            "norm_biases": [make_tensor(1, size, seed=90 + i)[0] / 4 for i, size in enumerate(sizes)],
            "attention_bias": plain["attention_bias"],
        }

    def options(self):
        size = (self.window, self.window) if isinstance(self.window, int) else self.window or (self.height, self.width)
        return ([EPS] * 2 * len(self.kernels), self.key_dim**-0.5, *size)

    def call(self, function, inputs):
        return function(*inputs.values(), *self.options())


def out_of(*arguments):
    return batch_norm(*arguments)[0]


CASES = [
    TrainingCase(2, 128, 16, 14, 14, 7, (7, 5, 3, 3)),  # m4 stage 1
    TrainingCase(3, 96, 16, 7, 7, None, (7, 5, 3)),
    TrainingCase(2, 48, 5, 4, 4, None, (7, 5, 3)),  # kernels larger than the window; padded channels
    TrainingCase(1, 14, 3, 8, 9, (4, 3), (3, 9)),
    TrainingCase(3, 8, 4, 5, 6, 1, (3, 3)),  # windows of one token
    TrainingCase(2, 7, 3, 5, 4, None, (5,)),  # one head
    TrainingCase(7, 30, 8, 9, 10, (3, 5), (3, 3, 5, 7, 9)),  # more windows than parts of sums
]
#: A number times q in front of a norm: its gradient is what eps leaves of it.
ONE_TAP = TrainingCase(2, 12, 4, 6, 4, (3, 4), (1, 3))
SMALL = TrainingCase(2, 8, 4, 6, 4, (3, 4), (3, 5))
all_cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("memory_format", ["nchw", "channels_last", "channel slice", "crop"])
@all_cases
@pytest.mark.remainders
def test_against_float64(isa, case, memory_format):
    check(case, memory_format)


def test_one_tap(isa):
    vanishing = "grad q_dw_weights"
    results, truth = check(ONE_TAP, but=vanishing)
    scale = truth["grad q_dw_weights 1"].norm()
    assert truth[vanishing].norm() < 1e-3 * scale
    assert error(results[vanishing], truth[vanishing]) <= FLOAT32_GRADIENT_TOLERANCE * scale


def check(case, memory_format="nchw", but=None):
    inputs = case.inputs(memory_format=memory_format)
    truth = with_gradients(out_of, "reference", case, inputs, torch.float64)
    plain = with_gradients(out_of, "reference", case, inputs, torch.float32)
    results = with_gradients(out_of, "cpu", case, inputs, torch.float32)
    noise = rounding_noise(out_of, case, inputs)
    for name, expected in truth.items():
        tolerance = FLOAT32_FORWARD_TOLERANCE if name == "out" else FLOAT32_GRADIENT_TOLERANCE
        allowed = max(allowed_error(plain[name], expected, tolerance), noise.get(name, 0.0))
        assert name == but or error(results[name], expected) <= allowed, name
    return results, truth


@pytest.mark.parametrize("grad_format", ["channels_last", "crop", "transposed", "equal rows", "equal columns"])
@pytest.mark.parametrize("memory_format", ["nchw", "channels_last", "transposed", "equal rows", "equal columns"])
def test_any_strides(isa, memory_format, grad_format):
    inputs = SMALL.inputs()
    x = make_image(2, 8, 6, 4, memory_format)
    grad_out = make_image(2, 8, 6, 4, grad_format, seed=5)

    def gradient(image, grad):
        leaf = image.detach().requires_grad_()
        out = SMALL.call(out_of, {**inputs, "x": leaf})
        return out.detach(), torch.autograd.grad(out, leaf, grad)[0]

    for ours, expected in zip(gradient(x, grad_out), gradient(x.contiguous(), grad_out.contiguous()), strict=True):
        assert torch.equal(ours, expected)


def test_only_the_gradients_that_are_asked_for():
    inputs = SMALL.inputs()
    wanted = inputs["norm_biases"][3].requires_grad_()
    SMALL.call(out_of, inputs).sum().backward()
    assert wanted.grad is not None
    tensors = [t for v in inputs.values() for t in ([v] if torch.is_tensor(v) else v)]
    assert [t.grad is not None for t in tensors].count(True) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_reaches_everything_that_shares_its_statistics(isa, value):
    inputs = SMALL.inputs()
    inputs["x"][1, 2, 3, 1] = value
    out, _ = SMALL.call(batch_norm, inputs)
    assert not out.isfinite().any()


@pytest.mark.usefixtures("poisoned_allocations")
@all_cases
def test_statistics(isa, case):
    inputs = case.inputs()
    inputs["x"] += 30  # means far from zero: squares minus the square of the mean would have lost five digits
    _, got = case.call(batch_norm, inputs)
    with use_backend("reference"):
        wide = {k: v.double() if torch.is_tensor(v) else [t.double() for t in v] for k, v in inputs.items()}
        _, expected = case.call(batch_norm, wide)
        _, plain = case.call(batch_norm, inputs)
    assert got.shape == expected.shape
    for kind in range(2):
        allowed = allowed_error(plain[:, kind], expected[:, kind], FLOAT32_FORWARD_TOLERANCE)
        assert error(got[:, kind], expected[:, kind]) <= allowed


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_same_bits_every_run_and_every_thread_count(isa, threads, case):
    inputs = case.inputs()
    expected = with_gradients(out_of, "cpu", case, inputs, torch.float32)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        for name, result in with_gradients(out_of, "cpu", case, inputs, torch.float32).items():
            assert torch.equal(result, expected[name]), f"{name} with {count} threads"


def test_opcheck():
    arguments = (*SMALL.inputs().values(), *SMALL.options())
    forward = OPS.cascaded_group_attention_batch_norm_forward.default
    backward = OPS.cascaded_group_attention_batch_norm_backward.default
    tensors, options = arguments[:6], arguments[6:]
    out = forward(*arguments)
    torch.library.opcheck(backward, (out[0], *tensors, *out, *options))
    leaves = [t.requires_grad_() if torch.is_tensor(t) else [w.requires_grad_() for w in t] for t in tensors]
    torch.library.opcheck(forward, (*leaves, *options))


def test_gradcheck_of_the_reference():
    inputs = SMALL.inputs()
    lengths = [None if torch.is_tensor(v) else len(v) for v in inputs.values()]
    flat = [t.double().requires_grad_() for v in inputs.values() for t in ([v] if torch.is_tensor(v) else v)]

    def call(*tensors):
        rest, arguments = list(tensors), []
        for n in lengths:
            arguments.append(rest.pop(0) if n is None else [rest.pop(0) for _ in range(n)])
        return batch_norm(*arguments, *SMALL.options())[0]

    assert torch.autograd.gradcheck(call, flat, fast_mode=True)


def test_second_derivatives_run_through_the_reference():
    def second(backend, dtype=torch.float32):
        with use_backend(backend):
            inputs = {
                k: v.to(dtype) if torch.is_tensor(v) else [t.to(dtype) for t in v] for k, v in SMALL.inputs().items()
            }
            x = inputs["x"].requires_grad_()
            (grad,) = torch.autograd.grad(SMALL.call(out_of, inputs).square().sum(), x, create_graph=True)
            return torch.autograd.grad(grad.square().sum(), x)[0]

    truth = second("reference", torch.float64)
    assert error(second("cpu"), truth) <= allowed_error(second("reference"), truth, FLOAT32_GRADIENT_TOLERANCE)


ERRORS = {
    "half windows": ({"x": torch.ones(2, 8, 5, 4)}, "x: expected shape"),
    "empty": ({"x": torch.ones(0, 8, 6, 4)}, "x: expected a positive B"),
    "dtype": ({"x": torch.ones(2, 8, 6, 4).bfloat16()}, "x: expected float32"),
    "norms": ({"norm_weights": [torch.ones(12)] * 2}, "norm_weights: expected 2 . heads = 4 tensors, got 2"),
    "norm shape": ({"norm_biases": [torch.ones(12)] * 4}, r"norm_biases\[2\]: expected shape \(4\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments(name):
    change, message = ERRORS[name]
    inputs = {**SMALL.inputs(), **change}
    with pytest.raises(RuntimeError, match=message):
        OPS.cascaded_group_attention_batch_norm_forward(*inputs.values(), *SMALL.options())


def test_the_backward_refuses_what_the_forward_has_not_made():
    tensors, options = SMALL.inputs().values(), SMALL.options()
    out, statistics = OPS.cascaded_group_attention_batch_norm_forward(*tensors, *options)
    with pytest.raises(RuntimeError, match="statistics: expected shape"):
        OPS.cascaded_group_attention_batch_norm_backward(out, *tensors, out, statistics[:, :, 1:], *options)
    with pytest.raises(RuntimeError, match="grad_out: expected shape"):
        OPS.cascaded_group_attention_batch_norm_backward(out[:1], *tensors, out, statistics, *options)


# --- the module -------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operator."""
    counted = []
    operator = batch_norm.__class__.__call__

    def count(self, *arguments):
        if self is batch_norm:
            counted.append(self.name)
        return operator(self, *arguments)

    monkeypatch.setattr(batch_norm.__class__, "__call__", count)
    return counted


def windows(**options):
    module = LocalWindowAttention(24, 4, 2, 3, resolution=8, window_resolution=4, kernels=(3, 5), **options)
    randomise_batch_norm(module)
    return module.train()


def norms(module):
    return [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def differ(norm, i):
    norm.momentum, norm.eps = 0.3 + i / 100, 0.01 * (i + 1)


def keep_nothing(norm, i):
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


#: What is done to every norm of a module.
NORMS = {
    "as they are": lambda norm, i: None,
    "an average of all batches": lambda norm, i: setattr(norm, "momentum", None),
    "momentum and eps differ": differ,
    "no statistics kept": keep_nothing,
    "no count": lambda norm, i: setattr(norm, "num_batches_tracked", None),
}


@pytest.mark.parametrize("size", [(8, 8), (7, 9)], ids=["whole windows", "windows that do not divide"])
@pytest.mark.parametrize("name", NORMS)
def test_running_statistics(calls, name, size):
    """Those of torch's own BatchNorm on the same numbers, over three steps."""
    module = windows()
    for i, norm in enumerate(norms(module)):
        NORMS[name](norm, i)
    layers = copy.deepcopy(module)
    for step in range(3):
        x = torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(step))
        module(x)
        with use_backend("reference"):
            layers(x)
    assert len(calls) == 3
    for (key, mine), (_, theirs) in zip(module.named_buffers(), layers.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=key)


def test_training_without_gradients_moves_the_statistics(calls):
    module = windows()
    before = [norm.running_mean.clone() for norm in norms(module)]
    with torch.no_grad():
        module(torch.randn(2, 24, 8, 8))
    assert calls
    assert all((norm.running_mean != mean).all() for norm, mean in zip(norms(module), before, strict=True))


@pytest.mark.parametrize("size", [full((8, 8)), (7, 9)], ids=["whole windows", "windows that do not divide"])
def test_compiled_steps_move_the_statistics_too(calls, size):
    module = windows()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True)
    for step in range(2):
        x = torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(step))
        torch.testing.assert_close(compiled(x), eager(x))
    for (key, mine), (_, theirs) in zip(module.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=key)


def test_relu_in_place():
    module = windows()
    module.attn.proj[0].inplace = True
    other = copy.deepcopy(module)
    other.attn.proj[0].inplace = False
    x = torch.randn(2, 24, 8, 8)
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (module, other)]
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    module = windows()
    other = copy.deepcopy(module)
    x = torch.randn(2, 24, 8, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
    other(x).square().sum().backward()
    for ours, expected in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_gradients_of_a_table_of_another_resolution():
    """Through the bicubic resizing: no further from float64 than layers one by one are.

    Eight modules together: of one, whose nine numbers a head are what nearly cancels, either may be nearer by luck.
    """

    def gradient(module, image):
        return torch.autograd.grad(module(image).square().sum(), module.attention_biases)[0]

    results = []
    for _ in range(8):
        module = windows()
        attn = CascadedGroupAttention(24, 4, 2, 3, resolution=3, kernels=(3, 5)).train()
        state = {k: v for k, v in module.attn.state_dict().items() if "attention_bias" not in k}
        attn.load_state_dict(state, strict=False)
        nn.init.normal_(attn.attention_biases)
        x = torch.randn(2, 24, 6, 5)
        ours = gradient(attn, x)
        with use_backend("reference"):
            results.append((ours, gradient(attn, x), gradient(copy.deepcopy(attn).double(), x.double())))
    ours, plain, truth = (torch.stack(kind) for kind in zip(*results, strict=True))
    assert error(ours, truth) <= allowed_error(plain, truth, FLOAT32_GRADIENT_TOLERANCE)


def freeze_one(module):
    module.attn.dws[1].bn.eval()


LAYERS = {
    "one in evaluation": freeze_one,
    "a hook": lambda module: module.attn.qkvs[0].conv.register_forward_hook(lambda *_: None),
    "no affine": lambda module: setattr(module.attn.qkvs[1].bn, "weight", None),
    "SyncBatchNorm": lambda module: setattr(module.attn.qkvs[1], "bn", type("Sync", (nn.BatchNorm2d,), {})(20)),
    "a bias": lambda module: setattr(module.attn.qkvs[1].conv, "bias", nn.Parameter(torch.ones(20))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_by_layer_where_the_operator_cannot_stand_for_it(calls, name):
    module = windows()
    LAYERS[name](module)
    other = copy.deepcopy(module)
    x = torch.randn(2, 24, 8, 8)
    with use_backend("reference"):
        expected = other(x)
    torch.testing.assert_close(module(x), expected)
    assert not calls


def test_one_number_a_channel_is_refused_as_torch_does():
    module = CascadedGroupAttention(24, 4, 2, 3, resolution=1, kernels=(3, 5))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(torch.randn(1, 24, 1, 1))
