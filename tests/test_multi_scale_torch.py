"""multi_scale_* as citizens of torch: opcheck, autograd, autocast, compile, export, transforms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from effattn import multi_scale_aggregation, multi_scale_linear_attention, use_backend
from effattn.testing import MultiScaleCase

OPS = torch.ops.effattn
CASE = MultiScaleCase(2, 2, 4, 6, 7, kernels=(3, 5), biases=True)
FUNCTIONS = {"aggregation": multi_scale_aggregation, "linear_attention": multi_scale_linear_attention}

both = pytest.mark.parametrize("name", FUNCTIONS)


def flat(case=CASE, dtype=torch.float32, memory_format="nchw", requires_grad=True):
    """qkv and all weights in one list, and a function from such a list to the arguments."""
    inputs = case.inputs(memory_format=memory_format)
    tensors = [t for value in inputs.values() for t in ([value] if isinstance(value, torch.Tensor) else value)]
    return [t.detach().to(dtype).requires_grad_(requires_grad) for t in tensors]


def call(name, tensors, case=CASE, **options):
    n = len(case.kernels)
    parts = [list(tensors[1 + i * n : 1 + (i + 1) * n]) for i in range(4)]
    if name == "linear_attention":
        options = {"eps": 1.0, **options}
    return FUNCTIONS[name](tensors[0], *parts, head_dim=case.head_dim, **options)


def options_of(name):
    return (CASE.head_dim, 1e-5) if name == "linear_attention" else (CASE.head_dim,)


@both
@pytest.mark.parametrize("memory_format", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    "case",
    [CASE, MultiScaleCase(0, 1, 4, 3, 3), MultiScaleCase(1, 1, 4, 1, 1), MultiScaleCase(1, 1, 4, 5, 5, ())],
    ids=str,
)
def test_opcheck(name, case, memory_format):
    inputs = case.inputs(memory_format=memory_format)
    qkv, *weights = inputs.values()
    options = (case.head_dim, 1e-5) if name == "linear_attention" else (case.head_dim,)
    torch.library.opcheck(getattr(OPS, f"multi_scale_{name}").default, (qkv, *weights, *options))
    forward = getattr(OPS, f"multi_scale_{name}_forward").default
    out = forward(qkv, *weights, *options)
    kept = [] if isinstance(out, torch.Tensor) else [out[1]]
    grad_out = out if isinstance(out, torch.Tensor) else out[0]
    backward = getattr(OPS, f"multi_scale_{name}_backward").default
    torch.library.opcheck(backward, (grad_out, qkv, *weights, *kept, *options))
    leaves = [[w.requires_grad_() for w in part] for part in weights]
    torch.library.opcheck(forward, (qkv.requires_grad_(), *leaves, *options))


@both
def test_gradcheck(name):
    """Through the reference; the kernels' gradients are compared with it elsewhere."""
    tensors = flat(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *ts: call(name, ts), tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *ts: call(name, ts), tensors, fast_mode=True)


@both
@pytest.mark.parametrize("needed", [[0], [1], [0, 4, 8], list(range(9))], ids=str)
def test_second_derivatives(name, needed):
    """create_graph=True in float32 on the kernels, against the reference, for some of the inputs or all."""

    def second(backend):
        with use_backend(backend):
            tensors = [t.requires_grad_(i in needed) for i, t in enumerate(flat(requires_grad=False))]
            leaves = [tensors[i] for i in needed]
            grads = torch.autograd.grad(call(name, tensors).square().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for ours, expected in zip(second("cpu"), second("reference"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@both
def test_only_the_gradients_that_are_asked_for(name):
    tensors = flat(requires_grad=False)
    tensors[2].requires_grad_()
    out = call(name, tensors)
    out.sum().backward()
    assert tensors[2].grad is not None
    assert all(t.grad is None for i, t in enumerate(tensors) if i != 2)


@both
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.each_value
def test_compile_fullgraph_dynamic(name, training):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(lambda *ts: call(name, ts), backend=counter, fullgraph=True, dynamic=True)
    for size in ((2, 6, 7), (3, 9, 8), (4, 12, 5)):
        case = MultiScaleCase(size[0], 2, 4, *size[1:], kernels=(3, 5), biases=True)
        expected, got = (flat(case, requires_grad=training) for _ in range(2))
        out, out_compiled = call(name, expected), compiled(*got)
        assert torch.equal(out, out_compiled)
        if training:
            grads = [torch.autograd.grad(o.sum(), ts) for o, ts in ((out, expected), (out_compiled, got))]
            for eager, ours in zip(*grads, strict=True):
                torch.testing.assert_close(ours, eager)
    assert counter.frame_count == 1, "recompiled for another size"


@both
def test_export(name):
    class Module(torch.nn.Module):
        def forward(self, *ts):
            return call(name, ts)

    tensors = flat(requires_grad=False)
    program = torch.export.export(Module(), tuple(tensors))
    assert torch.equal(program.module()(*tensors), call(name, tensors))


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_weights_as_they_are(name, dtype):
    tensors = flat()
    with torch.autocast("cpu", dtype=dtype):
        out = call(name, [tensors[0].to(dtype), *tensors[1:]])
        assert out.dtype == dtype
        assert torch.equal(out, call(name, [tensors[0].detach().to(dtype), *(t.detach() for t in tensors[1:])]))
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@both
def test_transforms_run_through_the_reference(name):
    tensors = flat(requires_grad=False)
    batched = torch.stack([tensors[0], tensors[0] * 2])
    out = torch.func.vmap(lambda x: call(name, [x, *tensors[1:]]))(batched)
    torch.testing.assert_close(out[1], call(name, [tensors[0] * 2, *tensors[1:]]))
    tangent = torch.ones_like(tensors[0])
    _, forward_mode = torch.func.jvp(lambda x: call(name, [x, *tensors[1:]]), (tensors[0],), (tangent,))
    with use_backend("reference"):
        _, expected = torch.func.jvp(lambda x: call(name, [x, *tensors[1:]]), (tensors[0],), (tangent,))
    torch.testing.assert_close(forward_mode, expected)


@both
def test_float64_runs_through_the_reference(name):
    tensors = flat(dtype=torch.float64, requires_grad=False)
    with use_backend("reference"):
        expected = call(name, tensors)
    assert torch.equal(call(name, tensors), expected)


@both
def test_inputs_are_left_alone(name):
    tensors = flat()
    before = copy.deepcopy(tensors)
    call(name, tensors).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
