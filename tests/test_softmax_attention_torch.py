"""biased_attention and cascaded_group_attention as citizens of torch: opcheck, autograd, compile, transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from effattn import biased_attention, cascaded_group_attention, use_backend
from effattn.testing import FLOAT32_GRADIENT_TOLERANCE, BiasedCase, CascadeCase, allowed_error, error

OPS = torch.ops.effattn
BIASED = BiasedCase(2, 3, 6, 7, 4, 5)
CASES = {
    "biased": (BIASED, biased_attention),
    "talking": (BiasedCase(2, 3, 6, 7, 4, 5, talking=True), biased_attention),
    "cascade": (CascadeCase(2, 8, 4, 5, 6, (3, 4), (3, 5)), cascaded_group_attention),
}
all_cases = pytest.mark.parametrize("name", CASES)


def flat(inputs, dtype=torch.float32, requires_grad=True):
    tensors = [t for value in inputs.values() for t in ([value] if isinstance(value, torch.Tensor) else value)]
    return [t.detach().to(dtype).requires_grad_(requires_grad) for t in tensors]


LENGTHS = {
    name: {k: None if isinstance(v, torch.Tensor) else len(v) for k, v in case.inputs().items()}
    for name, (case, _) in CASES.items()
}


def call(name, tensors):
    """With all tensors in one list."""
    rest, inputs = list(tensors), {}
    for key, length in LENGTHS[name].items():
        inputs[key] = rest[0] if length is None else rest[:length]
        rest = rest[1 if length is None else length :]
    case, function = CASES[name]
    return case.call(function, inputs)


def operator(name):
    """The operator's name, and its options."""
    return ("cascaded_group_attention", (0.5, 3, 4)) if name == "cascade" else ("biased_attention", (0.5,))


@all_cases
def test_opcheck(name):
    op, options = operator(name)
    inputs = list(CASES[name][0].inputs().values())
    torch.library.opcheck(getattr(OPS, op).default, (*inputs, *options))
    forward = getattr(OPS, f"{op}_forward").default
    out = forward(*inputs, *options)
    torch.library.opcheck(getattr(OPS, f"{op}_backward").default, (out, *inputs, *options))
    leaves = [t.requires_grad_() if isinstance(t, torch.Tensor) else [w.requires_grad_() for w in t] for t in inputs]
    torch.library.opcheck(forward, (*leaves, *options))


@all_cases
def test_gradcheck(name):
    """Through the reference; the kernels' gradients are compared with it elsewhere."""
    tensors = flat(CASES[name][0].inputs(), torch.float64)
    assert torch.autograd.gradcheck(lambda *ts: call(name, ts), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *ts: call(name, ts), tensors, fast_mode=True)


@all_cases
def test_second_derivatives(name):
    """create_graph=True on the kernels, for all inputs and for some: no further from float64 than the reference is.

    Of all of them together, since some vanish: a softmax does not change when its inputs move together.
    """

    def second(backend, needed, dtype=torch.float32):
        with use_backend(backend):
            tensors = flat(CASES[name][0].inputs(), dtype, requires_grad=False)
            leaves = [t.requires_grad_() for t in tensors[:needed]]
            grads = torch.autograd.grad(call(name, tensors).square().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
            return torch.cat([t.flatten() for t in second])

    for needed in (1, 3, None):
        truth = second("reference", needed, torch.float64)
        allowed = allowed_error(second("reference", needed), truth, FLOAT32_GRADIENT_TOLERANCE)
        assert error(second("cpu", needed), truth) <= allowed


@all_cases
def test_only_the_gradients_that_are_asked_for(name):
    tensors = flat(CASES[name][0].inputs(), requires_grad=False)
    tensors[2].requires_grad_()
    call(name, tensors).sum().backward()
    assert tensors[2].grad is not None
    assert all(t.grad is None for i, t in enumerate(tensors) if i != 2)


def other_sizes(name):
    if name == "cascade":
        return [CascadeCase(b, 8, 4, h, w, (3, 4), (3, 5)) for b, h, w in ((6, 10, 11), (7, 13, 14), (9, 15, 16))]
    talking = name == "talking"
    return [BiasedCase(b, 3, n, m, 4, 5, talking) for b, n, m in ((2, 6, 7), (3, 9, 8), (4, 12, 5))]


@all_cases
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.each_value
def test_compile_fullgraph_dynamic(name, training):
    counter = CompileCounterWithBackend("inductor")
    options = {"window_size": (3, 4)} if name == "cascade" else {}

    def compute(inputs):
        inputs = dict(inputs)
        talking_heads = inputs.pop("talking_heads", None) or None
        with_options = options if name == "cascade" else {"talking_heads": talking_heads}
        return CASES[name][1](*inputs.values(), **with_options)

    compiled = torch.compile(compute, backend=counter, fullgraph=True, dynamic=True)
    for case in other_sizes(name):
        expected, got = (
            {
                k: v.requires_grad_(training)
                if isinstance(v, torch.Tensor)
                else [w.requires_grad_(training) for w in v]
                for k, v in case.inputs().items()
            }
            for _ in range(2)
        )
        out, out_compiled = compute(expected), compiled(got)
        assert torch.equal(out, out_compiled)
        if training:
            leaves = [
                [t for v in inputs.values() for t in ([v] if isinstance(v, torch.Tensor) else v)]
                for inputs in (expected, got)
            ]
            grads = [torch.autograd.grad(o.sum(), ts) for o, ts in zip((out, out_compiled), leaves, strict=True)]
            for eager, ours in zip(*grads, strict=True):
                torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1, "recompiled for another size"


@all_cases
def test_export(name):
    class Module(torch.nn.Module):
        def forward(self, *ts):
            return call(name, ts)

    tensors = flat(CASES[name][0].inputs(), requires_grad=False)
    program = torch.export.export(Module(), tuple(tensors))
    assert torch.equal(program.module()(*tensors), call(name, tensors))


@all_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_weights_as_they_are(name, dtype):
    case, function = CASES[name]
    inputs = case.inputs()
    leaves = {
        k: v.requires_grad_() if isinstance(v, torch.Tensor) else [w.requires_grad_() for w in v]
        for k, v in inputs.items()
    }
    narrow = {k: v.to(dtype) if k in case.images else v for k, v in leaves.items()}
    with torch.autocast("cpu", dtype=dtype):
        out = case.call(function, narrow)
        assert out.dtype == dtype
    out.float().sum().backward()
    for value in leaves.values():
        for t in [value] if isinstance(value, torch.Tensor) else value:
            assert t.grad is not None and t.grad.dtype == torch.float32


def test_autocast_promotes_to_the_widest():
    inputs = BIASED.inputs()
    mixed = {**inputs, "v": inputs["v"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = BIASED.call(biased_attention, mixed)
    assert out.dtype == torch.float32
    assert torch.equal(out, BIASED.call(biased_attention, {**mixed, "v": mixed["v"].float()}))


@all_cases
def test_transforms_run_through_the_reference(name):
    tensors = flat(CASES[name][0].inputs(), requires_grad=False)
    out = torch.func.vmap(lambda x: call(name, [x, *tensors[1:]]))(torch.stack([tensors[0], tensors[0] * 2]))
    torch.testing.assert_close(out[1], call(name, [tensors[0] * 2, *tensors[1:]]))
    tangent = torch.ones_like(tensors[0])
    _, forward_mode = torch.func.jvp(lambda x: call(name, [x, *tensors[1:]]), (tensors[0],), (tangent,))
    with use_backend("reference"):
        _, expected = torch.func.jvp(lambda x: call(name, [x, *tensors[1:]]), (tensors[0],), (tangent,))
    torch.testing.assert_close(forward_mode, expected)


@all_cases
def test_float64_runs_through_the_reference(name):
    tensors = flat(CASES[name][0].inputs(), torch.float64, requires_grad=False)
    with use_backend("reference"):
        expected = call(name, tensors)
    assert torch.equal(call(name, tensors), expected)


@all_cases
def test_inputs_are_left_alone(name):
    tensors = flat(CASES[name][0].inputs())
    before = copy.deepcopy(tensors)
    call(name, tensors).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_the_scale_by_default():
    inputs = BIASED.inputs()
    arguments = [inputs[name] for name in ("q", "k", "v", "bias")]
    assert torch.equal(biased_attention(*arguments), biased_attention(*arguments, scale=0.5))
    assert not torch.allclose(biased_attention(*arguments, scale=0.0), biased_attention(*arguments))
    case = CASES["cascade"][0]
    arguments = case.inputs().values()
    assert torch.equal(
        cascaded_group_attention(*arguments, window_size=(3, 4)),
        cascaded_group_attention(*arguments, scale=0.5, window_size=(3, 4)),
    )


def test_one_number_is_a_square_window():
    arguments = CascadeCase(1, 8, 4, 6, 6, 3, (3, 5)).inputs().values()
    assert torch.equal(
        cascaded_group_attention(*arguments, window_size=3), cascaded_group_attention(*arguments, window_size=(3, 3))
    )
