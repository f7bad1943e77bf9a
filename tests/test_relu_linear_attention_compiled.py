"""relu_linear_attention in a module that torch compiles, exports and packages; autocast, tracing."""

from __future__ import annotations

import copy

import pytest
import torch
from exported_to_onnx import export, run
from same import assert_all_same, assert_same
from specified import AsModule, with_gradients
from tiers import full
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from effattn import registry, relu_linear_attention, use_backend
from effattn.ops import OPERATORS
from effattn.testing import make_tensor
from effattn.tolerance import check_against

OPERATOR = OPERATORS["relu_linear_attention"]


def qkv(layout="token_major", dtype=torch.float32, requires_grad=False, lead=(2,), sizes=(12, 14, 8, 10)):
    queries, keys, head_dim, value_dim = sizes
    tensors = (
        make_tensor(*lead, queries, head_dim, layout=layout, dtype=dtype, seed=1),
        make_tensor(*lead, keys, head_dim, layout=layout, dtype=dtype, seed=2),
        make_tensor(*lead, keys, value_dim, layout=layout, dtype=dtype, seed=3),
    )
    return tuple(t.requires_grad_(requires_grad) for t in tensors)


# --- autograd -------------------------------------------------------------------------------------------


def test_create_graph_is_accurate_under_autocast():
    leaves = qkv(requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = relu_linear_attention(*leaves)
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    arguments = (*(t.detach().double() for t in leaves), 1e-15)
    ones = torch.ones_like(out).double()
    names = ("grad_q", "grad_k", "grad_v")
    results = {"out": out.detach(), **dict(zip(names, (t.detach() for t in grads), strict=True))}
    check_against(
        lambda: with_gradients(OPERATOR, OPERATOR.plain, arguments, torch.float32, grad_out=ones), results, 14
    )


def test_create_graph_does_not_hide_a_nan():
    q, k, v = qkv()
    q[..., 3, 2] = float("nan")
    k[..., 1, 1] = float("nan")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = relu_linear_attention(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=True)
    kernel = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for mine, fused in zip(grads, kernel, strict=True):
        assert torch.equal(mine.isfinite(), fused.isfinite())


def test_flops_by_hand():
    """Keys with values and queries with both sums, two FLOPs a multiply-add."""
    q, k, v = qkv(lead=(2, 3), sizes=(9, 7, 8, 5))
    with FlopCounterMode(display=False) as counter:
        relu_linear_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 3 * (7 * 8 * 5 + 9 * 8 * 5 + 9 * 8)


# --- autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_accuracy_of_float32_sums(dtype):
    """As accurate as upcasting everything to float32 and rounding the result; no float32 copies."""
    q, k, v = qkv("channel_major", dtype, sizes=(3000, 3000, 16, 16))
    wide = [t.double() for t in (q, k, v)]
    with torch.autocast("cpu", dtype=dtype):
        out = relu_linear_attention(q, k, v)
    assert out.dtype == dtype
    check_against(lambda: {"out": OPERATOR.plain(*wide, 1e-15)}, {"out": out}, longest_sum=3000)


@pytest.mark.parametrize("compiled", [False, full(True)], ids=["eager", "compiled"])
def test_autocast_promotes_mixed_dtypes(compiled):
    q, k, v = qkv()
    function = torch.compile(relu_linear_attention, fullgraph=True) if compiled else relu_linear_attention
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(q.bfloat16(), k, v)
    assert out.dtype == torch.float32
    assert torch.equal(out, relu_linear_attention(q.bfloat16().float(), k, v))


# --- compile, export ------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """A projection before and after, so that there is something to fuse and something to train."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Conv2d(8, 3 * 16, 1)
        self.proj = torch.nn.Conv2d(16, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        heads = self.qkv(x).reshape(batch, 2, 24, height * width).transpose(-1, -2)
        out = relu_linear_attention(*heads.chunk(3, dim=-1))
        return self.proj(out.transpose(-1, -2).reshape(batch, 16, height, width))


@pytest.mark.parametrize("backend", ["aot_eager", full("inductor")])
def test_compile_fullgraph_forward_and_backward(backend):
    torch.manual_seed(0)
    eager = Attention()
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        assert_same(compiled(x), eager(x))
    for model in (compiled, eager):
        model(x).square().sum().backward()
    assert_all_same(*([p.grad for p in model.parameters()] for model in (module, eager)))


def test_the_compiled_backward_is_the_kernel():
    """The joint graph holds the fused backward, not the differentiable formula."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    names = []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    function = torch.compile(
        relu_linear_attention, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record)
    )
    function(*qkv(requires_grad=True)).sum().backward()
    assert "effattn.relu_linear_attention_forward.default" in names
    assert "effattn.relu_linear_attention_backward.default" in names


def test_recompiles_only_for_what_shapes_require():
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(relu_linear_attention, fullgraph=True, backend=counter)
    with torch.no_grad():
        for tokens in (20, 30, 40, 77, 500):
            q, k, v = qkv("channel_major", sizes=(tokens, tokens, 8, 8))
            assert torch.equal(function(q, k, v), relu_linear_attention(q, k, v))
        # One for the first size, one that leaves it open.
        assert counter.frame_count == 2
        for _ in range(3):
            relu_linear_attention(*qkv(dtype=torch.bfloat16))  # eager calls must not disturb the guards
            function(*qkv("channel_major", sizes=(60, 60, 8, 8)))
        assert counter.frame_count == 2


@pytest.mark.full
def test_dynamic_shapes_in_one_graph():
    counter = CompileCounterWithBackend("inductor")
    function = torch.compile(relu_linear_attention, fullgraph=True, dynamic=True, backend=counter)
    graphs = None  # torch may call the backend twice for one graph, when it meets a float argument
    for lead, sizes in (((2, 3), (12, 14, 8, 10)), ((4, 2), (31, 5, 16, 12)), ((5, 7), (64, 64, 9, 33))):
        leaves = qkv("channel_major", lead=lead, sizes=sizes, requires_grad=True)
        out = function(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
        expected = relu_linear_attention(*leaves)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()
        for a, b in zip(grads, torch.autograd.grad(expected.sum(), leaves), strict=True):
            assert torch.equal(a, b)
        assert graphs is None or counter.frame_count == graphs
        graphs = counter.frame_count


def test_backend_choice_is_seen_by_compile():
    function = torch.compile(relu_linear_attention, fullgraph=True, backend="aot_eager")
    q, k, v = qkv()
    with torch.no_grad():
        assert torch.equal(function(q, k, v), relu_linear_attention(q, k, v))
        with use_backend("reference"):
            assert torch.equal(function(q, k, v), OPERATOR.plain(q, k, v, 1e-15))


def test_errors_inside_of_compile_are_named():
    function = torch.compile(relu_linear_attention, backend="aot_eager")
    q, k, v = qkv()
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=r"k: expected shape \(\.\.\., M, D\) with"):
        function(q, k[..., :3], v)


def test_export_with_dynamic_shapes():
    dim = torch.export.Dim
    module = Attention().eval()
    program = torch.export.export(
        module,
        (torch.randn(2, 8, 9, 7),),
        dynamic_shapes=({0: dim("batch"), 2: dim("height", min=2), 3: dim("width", min=2)},),
    )
    assert any("effattn" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(3, 8, 5, 11)
    assert_same(program.module()(x), module(x))


@pytest.mark.parametrize("exporter", ["traced", full("dynamo")])
def test_the_smallest_eps_stays_in_an_onnx_graph(exporter):
    """The output of queries without a positive channel is 0, not 0 / 0."""
    images = qkv()
    images[0][:, 4] = -1
    module = AsModule(OPERATOR, (*images, 1e-15))
    assert (run(export(module, images, exporter), *images)[:, 4] == 0).all()


def test_inference_mode_and_no_grad():
    leaves = qkv(requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = relu_linear_attention(*leaves)
            assert not out.requires_grad
            assert torch.equal(out, relu_linear_attention(*(t.detach() for t in leaves)))


def test_symbolic_tracing():
    """Sizes are symbols there, or tensors: the table of chosen backends must not meet them."""
    from torch.fx.experimental.proxy_tensor import make_fx

    q = torch.randn(2, 5, 4)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda q: relu_linear_attention(q, q, q), tracing_mode=mode)(q)
        assert torch.equal(graph(q), relu_linear_attention(q, q, q))
    before = len(registry._chosen)
    for _ in range(3):
        traced = torch.jit.trace(lambda q: relu_linear_attention(q, q, q), (q,), check_trace=False)
    assert torch.equal(traced(q), relu_linear_attention(q, q, q)) and len(registry._chosen) == before
