"""What torch asks of any operator on any backend: opcheck, autograd, autocast, transforms, compile, export, trace."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from same import assert_all_same, assert_same
from specified import REPRESENTATIVES, AsModule, first_of, flattened, mapped, of_other_sizes, publicly, with_gradients
from tiers import full
from torch import fx
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

import effattn
from effattn import use_backend
from effattn.ops import OPERATORS
from effattn.testing import ORDERS, make_arguments, moved

CALLS = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPERATORS.values() for i, case in enumerate(op.cases)]
FIRST = [pytest.param(op, op.cases[0], id=op.name) for op in OPERATORS.values()]
REPRESENTED = [call if call.id in REPRESENTATIVES else full(*call.values, id=call.id) for call in FIRST]
NARROW = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.each_value  # nothing here hangs on an instruction set

by_operator = pytest.mark.parametrize(("operator", "case"), FIRST)


def made(target, operator, case, dtype=torch.float32, order="first", requires_grad=False):
    arguments = make_arguments(operator, case, dtype, order)
    return mapped(lambda t: moved(t, target.device).detach().requires_grad_(requires_grad), arguments)


# --- opcheck ----------------------------------------------------------------------------------------------------


@pytest.mark.registration
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("operator", "case"), CALLS)
def test_opcheck(target, operator, case, order):
    arguments = made(target, operator, case, order=order)
    if operator.signature.out.kind != "kept":
        torch.library.opcheck(getattr(target.ops, operator.name).default, arguments)
    forward = getattr(target.ops, f"{operator.name}_forward").default
    out, *kept = torch.utils._pytree.tree_leaves(forward(*arguments))
    tensors, options = arguments[: operator.signature.num_tensors], arguments[operator.signature.num_tensors :]
    kept = [out, *kept] if operator.signature.out.kind == "kept" else kept
    torch.library.opcheck(getattr(target.ops, f"{operator.name}_backward").default, (out, *tensors, *kept, *options))
    torch.library.opcheck(forward, made(target, operator, case, order=order, requires_grad=True))


@by_operator
def test_fake_outputs_have_the_strides_of_real_ones(target, operator, case):
    """However the images lie: dimensions in any order, or one that is expanded."""
    first = made(target, operator, case)[0]
    dims = range(first.dim())
    orders = [(*dims,), (*reversed(dims),), (*dims[1:], 0), (*dims[:-2], *reversed(dims[-2:]))]
    laid = [first.permute([order.index(d) for d in dims]).contiguous().permute(order) for order in orders]
    laid += [first.narrow(d, 0, 1).expand_as(first) for d in dims]
    for t in laid:
        arguments = [t, *made(target, operator, case)[1:]]
        out = first_of(operator(*arguments))
        with torch._subclasses.FakeTensorMode() as mode:
            fake = first_of(operator(*mapped(mode.from_tensor, arguments)))
        assert (out.shape, out.stride()) == (fake.shape, fake.stride())


# --- autograd ---------------------------------------------------------------------------------------------------


@by_operator
def test_gradcheck_of_the_plain_formulation(operator, case):
    """What all others are compared with; in float64, and its second derivatives as well."""
    arguments = mapped(lambda t: t.double().requires_grad_(), make_arguments(operator, case))
    lengths = [len(a) if isinstance(a, list) else None for a in arguments[: operator.signature.num_tensors]]

    def call(*tensors):
        rest, grouped = list(tensors), []
        for length in lengths:
            grouped.append(rest.pop(0) if length is None else [rest.pop(0) for _ in range(length)])
        return first_of(operator(*grouped, *arguments[operator.signature.num_tensors :]))

    tensors = flattened(arguments)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@by_operator
def test_only_the_gradients_that_are_asked_for(target, operator, case):
    count = len(flattened(made(target, operator, case)))
    for asked in {0, count // 2, count - 1}:
        arguments = made(target, operator, case)
        tensors = flattened(arguments)
        tensors[asked].requires_grad_()
        first_of(operator(*arguments)).sum().backward()
        assert [i for i, t in enumerate(tensors) if t.grad is not None] == [asked]


@by_operator
def test_a_batch_of_gradients(target, operator, case):
    """autograd.grad(is_grads_batched=True), and with it functional.jacobian(vectorize=True): as one by one."""
    arguments = made(target, operator, case, requires_grad=True)
    out, tensors = first_of(operator(*arguments)), flattened(arguments)
    grads_out = torch.randn(3, *out.shape).to(out)
    batched = torch.autograd.grad(out, tensors, grads_out, retain_graph=True, is_grads_batched=True)
    with use_backend("reference"):
        out = first_of(operator(*arguments))
        one_by_one = [torch.autograd.grad(out, tensors, grad_out, retain_graph=True) for grad_out in grads_out]
    assert not any(t.requires_grad for t in batched)
    assert_all_same(batched, [torch.stack(single) for single in zip(*one_by_one, strict=True)])


@by_operator
def test_arguments_are_left_alone(target, operator, case):
    arguments = made(target, operator, case, requires_grad=True)
    before = copy.deepcopy(flattened(arguments))
    first_of(operator(*arguments)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(flattened(arguments), before, strict=True))


@by_operator
def test_nothing_is_kept_but_arguments_and_what_the_signature_says(target, operator, case):
    arguments, saved = made(target, operator, case, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(*arguments)
    own = {t.data_ptr() for t in flattened(arguments)}
    kept = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    sizes = operator.signature.sizes(arguments)
    assert kept == [r.shape.sizes(sizes) for r in operator.signature.backward_takes]


@pytest.mark.registration
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@by_operator
def test_autocast_takes_weights_as_they_are(target, operator, case, dtype):
    """Images in the narrow type, weights and their gradients in float32; the same bits as without autocast."""
    arguments = made(target, operator, case, dtype, requires_grad=True)
    with torch.autocast(target.device.type, dtype=dtype):
        out = operator(*arguments)
    assert out.dtype == dtype and torch.equal(out, operator(*arguments))
    out.float().sum().backward()
    images = len(flattened(arguments[: operator.signature.num_activations]))
    assert [t.grad.dtype for t in flattened(arguments)] == [t.dtype for t in flattened(arguments)]
    assert all(t.dtype == torch.float32 for t in flattened(arguments)[images:])


@by_operator
def test_the_plain_formulation_knows_no_autocast(operator, case):
    arguments = make_arguments(operator, case)
    with torch.autocast("cpu", dtype=torch.bfloat16), use_backend("reference"):
        out = operator(*arguments)
    assert torch.equal(first_of(out), first_of(operator.plain(*arguments)))


@by_operator
def test_float64_goes_to_the_plain_formulation(operator, case):
    arguments = mapped(torch.Tensor.double, make_arguments(operator, case))
    assert torch.equal(first_of(operator(*arguments)), first_of(operator.plain(*arguments)))


@pytest.mark.registration
@pytest.mark.parametrize(("operator", "case"), REPRESENTED)
def test_transforms_run_through_the_plain_formulation(target, operator, case):
    """torch.func and forward mode, eager and compiled; to the bit, for they are the same operations."""
    image, *rest = made(target, operator, case)
    tangent = torch.ones_like(image)

    def loss(f):
        return lambda x: first_of(f(x, *rest)).square().sum()

    def forward_mode(f):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(image, tangent)
            return torch.autograd.forward_ad.unpack_dual(first_of(f(dual, *rest))).tangent

    transforms = (
        lambda f: torch.func.grad(loss(f))(image),
        lambda f: torch.func.jvp(lambda x: first_of(f(x, *rest)), (image,), (tangent,))[1],
        lambda f: torch.func.vmap(lambda x: first_of(f(x, *rest)))(torch.stack([image, 2 * image])),
        lambda f: torch.func.vmap(torch.func.grad(loss(f)))(torch.stack([image, 2 * image])),
        forward_mode,
    )
    for transform in transforms:
        assert torch.equal(transform(operator), transform(operator.plain))
    for transform in (transforms[0], forward_mode):
        compiled = torch.compile(transform, backend="aot_eager")(operator)
        assert_same(compiled, transform(operator.plain))


@pytest.mark.registration
@by_operator
def test_torch_counts_the_flops_of_the_plain_formulation(target, operator, case):
    """Forward and backward."""
    counts = []
    for backend in (target.backend, "reference"):
        for requires_grad in (False, True):
            arguments = made(target, operator, case, requires_grad=requires_grad)
            with use_backend(backend), FlopCounterMode(display=False) as counter:
                out = first_of(operator(*arguments))
                if requires_grad:
                    out.sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:] and (counts[0] == 0 or counts[0] < counts[1])


# --- compile, export, trace -------------------------------------------------------------------------------------


@pytest.mark.registration
@by_operator
# Or sizes of two tensors that happen to be equal in the first call are one size for good.
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_compile_without_graph_breaks(target, operator, case):
    """Sizes that change, in one graph, which holds the kernels; their gradients too."""
    tensors, options = operator.signature.num_tensors, make_arguments(operator, case)[operator.signature.num_tensors :]
    cases = of_other_sizes(operator, case, 2, few=target.backend != "cpu")
    for requires_grad in (False, True):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(
            lambda *a: first_of(operator(*a, *options)), fullgraph=True, dynamic=True, backend=counter
        )
        graphs = 0  # torch may call the backend twice for one graph, when it meets a float argument
        for sizes in cases:
            arguments = made(target, operator, sizes, requires_grad=requires_grad)
            results = []
            for call in (lambda *a, compiled=compiled: compiled(*a[:tensors]), operator):
                if requires_grad:
                    results.append(with_gradients(operator, call, arguments, torch.float32))
                else:
                    results.append({"out": first_of(call(*arguments))})
            for name, result in results[0].items():
                assert torch.equal(result, results[1][name]), name
                assert result.stride() == results[1][name].stride(), name
            graphs = graphs or counter.frame_count
        assert counter.frame_count == graphs, "recompiled for another size"
        kind = "_forward" if requires_grad or operator.signature.out.kind == "kept" else ""
        called = {node.target for graph in counter.graphs for node in graph.graph.nodes}
        assert getattr(target.ops, operator.name + kind).default in called


@pytest.mark.registration
@by_operator
def test_export(target, operator, case):
    arguments = made(target, operator, case)
    images = tuple(arguments[: operator.signature.num_activations])
    module = AsModule(operator, arguments)
    program = torch.export.export(module, images)
    assert torch.equal(program.module()(*images), module(*images))


class SizesOfTheImage(torch.nn.Module):
    """A public function whose options are computed from sizes, which a trace makes tensors of."""

    def __init__(self, operator, arguments):
        super().__init__()
        self.inner = AsModule(operator, arguments, publicly(operator) or operator)
        self.options = self.inner.options

    def forward(self, *images):
        size = images[0].shape[0]
        self.inner.options = [
            o * size // size if isinstance(o, int) else o * size / size if isinstance(o, float) else o
            for o in self.options
        ]
        return self.inner(*images)


@pytest.mark.registration
@by_operator
def test_trace(target, operator, case):
    """torch.jit.trace, without gradients; the graph holds the kernels, can be differentiated, and takes more images."""
    arguments = made(target, operator, case)
    images = tuple(arguments[: operator.signature.num_activations])
    module = SizesOfTheImage(operator, arguments)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(module, images)
    assert f"{operator.name}_forward" in str(traced.inlined_graph)
    others = [torch.cat([t, t]) for t in images]
    grads = []
    for call in (traced, module):
        leaves = [t.detach().requires_grad_() for t in others]
        grads.append(torch.autograd.grad(call(*leaves).square().sum(), leaves))
    assert all(map(torch.equal, *grads))


@by_operator
def test_wrong_arguments_in_a_trace(operator, case):
    arguments = make_arguments(operator, case)
    images = arguments[: operator.signature.num_activations]
    module = AsModule(operator, arguments)
    with pytest.raises(ValueError, match=r"^\w+: expected .* got "):
        torch.jit.trace(module, (images[0][0], *images[1:]))


@by_operator
def test_public_functions_are_nodes_of_fx(operator, case):
    """One node a call, with its weights; copied, printed, pickled, trained."""
    function = publicly(operator)
    if function is None:
        assert operator.name not in effattn.__all__
        return
    image, *rest = make_arguments(operator, case)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.ParameterList(flattened(rest))

        def forward(self, x):
            weights = iter(self.weights)
            return function(x, *mapped(lambda _: next(weights), rest))

    model = Model()
    graph = fx.symbolic_trace(model)
    assert getattr(effattn, operator.name) in [n.target for n in graph.graph.nodes if n.op == "call_function"]
    for run in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(run(image), model(image))
    run(image).sum().backward()
    assert all(p.grad is not None for p in run.parameters()) and all(p.grad is None for p in graph.parameters())
    assert f"{operator.name}(" in graph.code


@by_operator
def test_scripting_names_the_alternatives(operator, case):
    function = getattr(effattn, operator.name, None)
    if function is None:
        assert operator.name not in effattn.__all__
        return
    message = r"effattn cannot be compiled by torch.jit.script: use torch.compile, "
    with pytest.raises(RuntimeError, match=message) as raised:
        torch.jit.script(function)
    assert "torch.jit.trace, or undo effattn.accelerate with effattn.restore(model) first" in str(raised.value)
