"""Where both CUDA's and Triton's kernels could serve, small calls go to CUDA's; no GPU and no kernel is needed."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import effattn
from effattn import registry
from effattn.__main__ import info
from effattn.backends import SMALL_CALL, cuda, is_small_call, order
from effattn.testing import BiasedCase, CascadeCase, MultiScaleCase

OP, GPU = "relu_linear_attention", torch.device("cuda")


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
    chosen, find = [], registry.find

    def noting(*arguments, **options):
        backend = find(*arguments, **options)
        chosen.append(backend.name)
        return backend

    monkeypatch.setattr(registry, "find", noting)
    return chosen


def linear_attention(tokens):
    t = torch.empty(1, 4, tokens, 16, device="cuda", dtype=torch.bfloat16)
    return effattn.relu_linear_attention(t, t, t)


def on_gpu(inputs):
    """Fake tensors of these sizes; a machine without a GPU has no others."""
    return [[fake(t) for t in a] if isinstance(a, list) else fake(a) for a in inputs.values()]


def fake(t):
    return torch.empty(t.shape, dtype=t.dtype, device="cuda")


CASES = {
    "multi_scale_linear_attention": lambda: effattn.multi_scale_linear_attention(
        *on_gpu(MultiScaleCase(1, 1, 4, 2, 3).inputs()), head_dim=4
    ),
    "multi_scale_aggregation": lambda: effattn.multi_scale_aggregation(
        *on_gpu(MultiScaleCase(1, 1, 4, 2, 3).inputs()), head_dim=4
    ),
    "biased_attention": lambda: effattn.biased_attention(*on_gpu(BiasedCase(1, 2, 3, 3, 4, 4).inputs())[:4]),
    "cascaded_group_attention": lambda: effattn.cascaded_group_attention(
        *on_gpu(CascadeCase(1, 8, 4, 3, 3, None, (3, 3)).inputs())
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_operator_tells_its_size(asked, monkeypatch, name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        CASES[name]()
        monkeypatch.setattr(sys.modules["effattn.backends"], "SMALL_CALL", 1)
        CASES[name]()
    assert asked == ["cuda", "triton"]


def test_the_elements_of_q_k_and_v_count_together(asked):
    most = SMALL_CALL // (3 * 4 * 16)
    with FakeTensorMode():
        linear_attention(most)
        linear_attention(most + 1)
    assert 3 * 4 * 16 * most < SMALL_CALL <= 3 * 4 * 16 * (most + 1)
    assert asked == ["cuda", "triton"]


def test_choices_that_are_remembered_do_not_grow_with_sizes(asked):
    with FakeTensorMode():
        for tokens in (*range(1, 50), SMALL_CALL, SMALL_CALL + 1):
            linear_attention(tokens)
    assert len(registry._chosen) == 2 and asked == ["cuda", "triton"]


def test_calls_on_the_cpu_are_never_small():
    assert not is_small_call([torch.empty(1)]) and is_small_call([torch.empty(1, device="meta")])


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize(("ratio", "first"), [(1.2, "cuda"), (0.8, "triton")])
def test_a_measurement_wins(monkeypatch, ratio, first, is_small):
    monkeypatch.setattr(cuda, "_card", lambda device: "a card")
    monkeypatch.setattr(cuda, "MEASURED", (cuda.Measurement(OP, "a card", "2026-01-01", ratio),))
    assert [backend.name for backend in order(OP, GPU, is_small=is_small)][1] == first
    of_another = order("biased_attention", GPU, is_small=is_small)
    monkeypatch.setattr(cuda, "_card", lambda device: "another card")
    for backends in (of_another, order(OP, GPU, is_small=is_small)):
        assert backends[1].name == ("cuda" if is_small else "triton")


def test_a_backend_that_is_asked_for_wins(asked):
    with FakeTensorMode(), effattn.use_backend("triton"):
        linear_attention(1)
    assert asked == ["triton"]


def test_the_next_serves_a_small_call_that_cuda_does_not_take(asked, monkeypatch):
    reasons = registry._reasons
    monkeypatch.setattr(registry, "_reasons", lambda b, *rest: ["no"] if b.name == "cuda" else reasons(b, *rest))
    with FakeTensorMode():
        linear_attention(1)
    assert asked == ["triton"]


def test_symbols_that_do_not_tell_get_no_guard(asked):
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    t = mode.from_tensor(torch.empty(2, 4, 50, 16, device="meta"))
    with mode:
        effattn.relu_linear_attention(t, t, t)
    assert asked == ["triton"]
    assert not [guard for guard in environment.guards if str(SMALL_CALL) in str(guard.expr)]


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "dynamic after the first"])
@pytest.mark.usefixtures("both_serve")
def test_a_compiled_call_serves_small_and_large(dynamic):
    namespaces = []

    def backend(graph, _):
        calls = (node.target for node in graph.graph.nodes if node.op == "call_function")
        namespaces.append([target.namespace for target in calls if OP in str(target)])
        return graph

    compiled = torch.compile(
        lambda q: effattn.relu_linear_attention(q, q, q), backend=backend, dynamic=dynamic, fullgraph=True
    )
    for tokens in (50, 60, SMALL_CALL, 70):
        compiled(torch.empty(1, 4, tokens, 16, device="meta"))
    assert namespaces == ([] if dynamic else [["effattn"]]) + [["effattn_triton"]]


def test_info_explains_it():
    assert "cuda is asked before triton, whose launches cost more, if a call's images" in info()
    assert f"fewer than {SMALL_CALL} elements" in info()


def test_info_tells_of_each_gpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((7, 5), (9, 0))[device.index])
    monkeypatch.setattr(registry.verdicts, "here", list)
    text = info()
    assert re.search(r"\n  cuda:0, card 0: .*triton needs .* compute capability 8.0, this one has 7.5", text)
    assert re.search(r"\n  cuda:1, card 1: .*triton serves", text)
