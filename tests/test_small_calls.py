"""Where both CUDA's and Triton's kernels could serve, small calls go to CUDA's; no GPU and no kernel is needed."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from specified import free_sizes, mapped
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import effattn
from effattn import registry
from effattn.__main__ import info
from effattn.backends import SMALL_CALL, is_small_call, triton
from effattn.ops import OPERATORS
from effattn.testing import make_arguments

GPU = torch.device("cuda")


@pytest.fixture
def both_serve(monkeypatch):
    """CUDA and Triton take everything that is not on the CPU."""
    for_cpu = registry._reasons

    def reasons(backend, op, device, *rest):
        return (
            [] if backend.name in ("cuda", "triton") and device.type != "cpu" else for_cpu(backend, op, device, *rest)
        )

    monkeypatch.setattr(registry, "_reasons", reasons)
    monkeypatch.setattr(registry, "_chosen", {})


@pytest.fixture
def asked(both_serve, monkeypatch):
    """Who was found, call after call."""
    chosen, find = [], registry._find

    def noting(*arguments, **options):
        backend = find(*arguments, **options)
        chosen.append(backend.name)
        return backend

    monkeypatch.setattr(registry, "_find", noting)
    return chosen


def arguments(operator, batch=None):
    """Of the operator's first case, with images of as many batches."""
    case = operator.cases[0]
    if batch is not None:
        case = case | {free_sizes(operator, case)[0]: batch}
    return make_arguments(operator, case)


def call(operator, batch=None):
    """On fake tensors; a machine without a GPU has no others on one."""
    operator(*mapped(lambda t: torch.empty(t.shape, dtype=t.dtype, device="cuda"), arguments(operator, batch)))


def elements(operator, batch):
    """Of the call's images."""
    return sum(t.numel() for t in arguments(operator, batch)[: operator.signature.num_activations])


@pytest.fixture
def small(monkeypatch):
    """Sets how many elements a small call may have."""

    def set_to(count):
        monkeypatch.setattr(sys.modules["effattn.backends"], "SMALL_CALL", count)

    return set_to


IN_BOTH = [pytest.param(op, id=op.name) for op in OPERATORS.values() if op.name in triton.LAUNCHERS]
FIRST = IN_BOTH[0].values[0]
OP = FIRST.name


@pytest.mark.parametrize("operator", IN_BOTH)
def test_the_elements_of_all_images_count_together(asked, small, operator):
    small(elements(operator, 7) + 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        call(operator, 7)
        call(operator, 8)
    assert asked == ["cuda", "triton"]


def test_choices_that_are_remembered_do_not_grow_with_sizes(asked, small):
    small(elements(FIRST, 50))
    with FakeTensorMode():
        for batch in range(1, 60):
            call(FIRST, batch)
    assert len(registry._chosen) == 2 and asked == ["cuda", "triton"]


def test_calls_on_the_cpu_are_never_small():
    assert not is_small_call([torch.empty(1)]) and is_small_call([torch.empty(1, device="meta")])


def test_a_backend_that_is_asked_for_wins(asked):
    with FakeTensorMode(), effattn.use_backend("triton"):
        call(FIRST)
    assert asked == ["triton"]


def test_the_next_serves_a_small_call_that_cuda_does_not_take(asked, monkeypatch):
    reasons = registry._reasons
    monkeypatch.setattr(registry, "_reasons", lambda b, *rest: ["no"] if b.name == "cuda" else reasons(b, *rest))
    with FakeTensorMode():
        call(FIRST)
    assert asked == ["triton"]


def test_symbols_that_do_not_tell_get_no_guard(asked):
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    made = mapped(lambda t: mode.from_tensor(torch.empty(t.shape, device="meta")), arguments(FIRST, 50))
    with mode:
        FIRST(*made)
    assert asked == ["triton"]
    assert not [guard for guard in environment.guards if str(SMALL_CALL) in str(guard.expr)]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "dynamic after the first"])
@pytest.mark.usefixtures("both_serve")
def test_a_compiled_call_serves_small_and_large(small, dynamic):
    namespaces = []

    def backend(graph, _):
        calls = (node.target for node in graph.graph.nodes if node.op == "call_function")
        namespaces.append([target.namespace for target in calls if OP in str(target)])
        return graph

    small(elements(FIRST, 100))
    count = FIRST.signature.num_activations
    rest = mapped(lambda t: t.to("meta"), arguments(FIRST)[count:])
    compiled = torch.compile(lambda *images: FIRST(*images, *rest), backend=backend, dynamic=dynamic, fullgraph=True)
    for batch in (50, 60, 200, 70):
        compiled(*(t.to("meta") for t in arguments(FIRST, batch)[:count]))
    assert namespaces == ([] if dynamic else [["effattn"]]) + [["effattn_triton"]]


def test_info_explains_it():
    assert "cuda is asked before triton, whose launches cost more, if a call's activations" in info()
    assert f"fewer than {SMALL_CALL} elements" in info()


def test_info_tells_of_each_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device.index])
    monkeypatch.setattr(registry.verdicts, "here", list)
    text = info()
    assert re.search(r"\n  cuda:0, GPU 0: .*triton needs .* compute capability 8.0, this one has 7.5", text)
    assert re.search(r"\n  cuda:1, GPU 1: .*triton serves", text)
