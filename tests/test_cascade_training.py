"""The cascade with BatchNorm inside: the operator where tests/conformance does not reach, and the module.

Outputs and gradients of the module are compared with timm's in test_nn_softmax_attention.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from same import assert_same, is_same
from specified import check_against_float64, mapped
from tiers import full
from torch import nn

from effattn import use_backend
from effattn.nn import CascadedGroupAttention, LocalWindowAttention
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments, randomise_batch_norm
from effattn.tolerance import check_against

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

OPERATOR = OPERATORS["cascaded_group_attention_batch_norm"]


def sizes(batch, channels, key_dim, height, width, window=None, kernels=(5,)):
    """``window`` is a number for square ones, or None for the whole image."""
    rows, cols = (height, width) if window is None else (window, window) if isinstance(window, int) else window
    heads, d = len(kernels), channels // len(kernels)
    norms = (2 * key_dim + d,) * heads + (key_dim,) * heads
    case = {"B": batch, "heads": heads, "d": d, "key_dim": key_dim, "k": kernels, "w": norms, "b": norms}
    case |= {"down": height // rows, "across": width // cols, "window_height": rows, "window_width": cols}
    return case | {"eps": (1e-5,) * 2 * heads, "scale": key_dim**-0.5}


CASES = [
    sizes(2, 128, 16, 14, 14, 7, (7, 5, 3, 3)),  # m4 stage 1
    sizes(3, 96, 16, 7, 7, None, (7, 5, 3)),
    sizes(2, 48, 5, 4, 4, None, (7, 5, 3)),  # kernels larger than the window; padded channels
    sizes(1, 14, 3, 8, 9, (4, 3), (3, 9)),
    sizes(3, 8, 4, 5, 6, 1, (3, 3)),  # windows of one token
    sizes(2, 7, 3, 5, 4, None, (5,)),  # one head
    sizes(7, 30, 8, 9, 10, (3, 5), (3, 3, 5, 7, 9)),  # more windows than parts of sums
    sizes(2, 12, 4, 6, 4, (3, 4), (1, 3)),  # a number times q in front of a norm: its gradient is what eps leaves of it
]
SMALL = OPERATOR.cases[0]
all_cases = pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))


@pytest.mark.usefixtures("poisoned_allocations")
@pytest.mark.parametrize("order", ORDERS)
@all_cases
@pytest.mark.remainders
def test_against_float64(isa, case, order):
    check_against_float64(OPERATOR, case, order=order)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_reaches_everything_that_shares_its_statistics(isa, value):
    arguments = make_arguments(OPERATOR, SMALL)
    arguments[0][1, 2, 3, 1] = value
    out, _ = OPERATOR(*arguments)
    assert not out.isfinite().any()


@pytest.mark.usefixtures("poisoned_allocations")
@all_cases
def test_statistics(isa, case):
    arguments = make_arguments(OPERATOR, case)
    arguments[0] += 30  # means far from zero: squares minus the square of the mean would have lost five digits
    wide = mapped(torch.Tensor.double, arguments)

    def by_kind(statistics):
        return dict(zip(("means", "variances"), statistics.unbind(1), strict=True))

    results = by_kind(OPERATOR(*arguments)[1])
    check_against(lambda: by_kind(OPERATOR.plain(*wide)[1]), results, OPERATOR.longest_sum(case))


ERRORS = {
    "half windows": ("x", torch.ones(2, 8, 5, 4), "x: expected shape"),
    "empty": ("x", torch.ones(0, 8, 6, 4), "x: expected a positive B"),
    "dtype": ("x", torch.ones(2, 8, 6, 4).bfloat16(), "x: expected float32"),
    "norms": ("q_norm_weights", [torch.ones(4)], "q_norm_weights: expected heads = 2 tensors, got 1"),
    "norm shape": ("q_norm_biases", [torch.ones(12)] * 2, r"q_norm_biases\[0\]: expected shape \(key_dim\) with"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments(name):
    argument, value, message = ERRORS[name]
    arguments = make_arguments(OPERATOR, SMALL)
    arguments[[a.name for a in OPERATOR.signature.arguments].index(argument)] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.effattn.cascaded_group_attention_batch_norm_forward(*arguments)


# --- the module -------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the operator."""
    counted = []
    call = OPERATOR.__class__.__call__

    def count(self, *arguments):
        if self is OPERATOR:
            counted.append(self.name)
        return call(self, *arguments)

    monkeypatch.setattr(OPERATOR.__class__, "__call__", count)
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
        assert is_same(mine, theirs), key


def test_training_without_gradients_moves_the_statistics(calls):
    module = windows()
    before = [norm.running_mean.clone() for norm in norms(module)]
    with torch.no_grad():
        module(torch.randn(2, 24, 8, 8))
    assert calls
    assert all((norm.running_mean != mean).all() for norm, mean in zip(norms(module), before, strict=True))


@pytest.mark.registration
@pytest.mark.parametrize("backend", ["aot_eager", full("inductor")])
@pytest.mark.parametrize("size", [full((8, 8)), (7, 9)], ids=["whole windows", "windows that do not divide"])
def test_compiled_steps_move_the_statistics_too(calls, size, backend):
    module = windows()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for step in range(2):
        x = torch.randn(2, 24, *size, generator=torch.Generator().manual_seed(step))
        assert_same(compiled(x), eager(x))
    for (_, mine), (_, theirs) in zip(module.named_buffers(), eager.named_buffers(), strict=True):
        assert_same(mine, theirs)


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
    """Through the bicubic resizing."""
    module = windows()
    attn = CascadedGroupAttention(24, 4, 2, 3, resolution=3, kernels=(3, 5)).train()
    state = {k: v for k, v in module.attn.state_dict().items() if "attention_bias" not in k}
    attn.load_state_dict(state, strict=False)
    nn.init.normal_(attn.attention_biases)
    x = torch.randn(2, 24, 6, 5)
    exact = copy.deepcopy(attn).double()

    def gradient(module, image):
        return {"table": torch.autograd.grad(module(image).square().sum(), module.attention_biases)[0]}

    check_against(lambda: gradient(exact, x.double()), gradient(attn, x), x.numel() // 24)


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
    assert_same(module(x), expected)
    assert not calls


def test_one_number_a_channel_is_refused_as_torch_does():
    module = CascadedGroupAttention(24, 4, 2, 3, resolution=1, kernels=(3, 5))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(torch.randn(1, 24, 1, 1))
