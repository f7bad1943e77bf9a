"""What only a card can show: graphs, streams, no waiting for the host, memory, and the same bits under load."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import effattn
from effattn import use_backend
from effattn.nn import LiteMLA, LocalWindowAttention
from effattn.testing import (
    FLOAT32_FORWARD_TOLERANCE,
    BiasedCase,
    CascadeCase,
    MultiScaleCase,
    allowed_error,
    error,
    make_tensor,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("backend"),
]


def _attention(dtype):
    def make(seed: int):
        return [make_tensor(1, 16, 16, 8192, dtype=dtype, seed=seed + i).mT for i in range(3)]

    return make, effattn.relu_linear_attention


def _multi_scale(dtype):
    case = MultiScaleCase(2, 8, 16, 32, 48)
    names = ("qkv", "dw_weights", "pw_weights")
    function = partial(effattn.multi_scale_linear_attention, head_dim=case.head_dim)
    return lambda seed: [case.inputs(dtype, seed=seed)[name] for name in names], function


def _cascade(dtype):
    case = CascadeCase(8, 128, 16, 14, 14, 7, (7, 5, 3, 3))
    return lambda seed: list(case.inputs(dtype).values()), partial(effattn.cascaded_group_attention, window_size=7)


def _biased(talking: bool, dtype):
    case = BiasedCase(16, 8, 49, 49, 32, 128, talking)

    def function(q, k, v, bias, mixing):
        return effattn.biased_attention(q, k, v, bias, talking_heads=mixing or None)

    return lambda seed: list(case.inputs(dtype).values()), function


OPERATORS: dict[str, Callable] = {
    "relu_linear_attention": _attention,
    "multi_scale_linear_attention": _multi_scale,
    "cascaded_group_attention": _cascade,
    "biased_attention": partial(_biased, False),
    "talking heads": partial(_biased, True),
}
#: Peak memory over plain PyTorch's, at most. The cascade's backward keeps what every head had, in float32.
MEMORY = {"cascaded_group_attention": 1.1}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def prepared(name, dtype=torch.bfloat16, device="cuda"):
    """The function, its arguments as leaves on the card, and those leaves."""
    make, function = OPERATORS[name](dtype)
    arguments = [
        [t.to(device).requires_grad_() for t in a] if isinstance(a, list) else a.to(device).requires_grad_()
        for a in make(0)
    ]
    leaves = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    return function, arguments, leaves


def step(function, arguments, leaves):
    out = function(*arguments)
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))


@every_operator
def test_graphs_replay_what_was_called(name, backend):
    """On inputs that change between the recording and the replay."""
    function, arguments, leaves = prepared(name)
    with torch.no_grad(), use_backend(backend):
        function(*arguments)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*arguments)
        leaves[0].mul_(0.5)
        graph.replay()
        assert torch.equal(out, function(*arguments))


@every_operator
def test_graphs_replay_a_training_step(name, backend):
    function, arguments, leaves = prepared(name)
    with use_backend(backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = step(function, arguments, leaves)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step(function, arguments, leaves)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@every_operator
def test_training_waits_for_nothing(name, backend):
    function, arguments, leaves = prepared(name)
    with use_backend(backend):
        step(function, arguments, leaves)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(function, arguments, leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_operator
def test_same_bits_while_the_card_is_busy(name, backend):
    function, arguments, leaves = prepared(name, torch.float32)
    noise, other = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    with use_backend(backend):
        first = step(function, arguments, leaves)
        for _ in range(20):
            with torch.cuda.stream(other):
                noise = (noise @ noise).tanh()
            for a, b in zip(step(function, arguments, leaves), first, strict=True):
                assert torch.equal(a, b)


@every_operator
def test_another_stream_is_used(name, backend):
    """Work is queued on the current stream: it sees what was queued there before."""
    function, arguments, leaves = prepared(name)
    with torch.no_grad(), use_backend(backend):
        expected = function(*arguments)
        kept = leaves[0].detach().clone()
        leaves[0].zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            leaves[0].copy_(kept)
            out = function(*arguments)
        stream.synchronize()
        assert torch.equal(out, expected)


@every_operator
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_card_is_used(name, backend):
    results = []
    for device in ("cuda:0", "cuda:1"):
        with use_backend(backend):
            results.append([t.cpu() for t in step(*prepared(name, device=device))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_operator
def test_a_training_step_takes_less_memory_than_plain_pytorch(name, backend):
    function, arguments, leaves = prepared(name)

    def peak(name):
        with use_backend(name):
            step(function, arguments, leaves)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(function, arguments, leaves)
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    assert peak(backend) < MEMORY.get(name, 0.7) * peak("reference")


def test_addresses_of_a_large_image(device):
    """More than 2^31 elements in one tensor; the last image is as right as the plain formulation."""
    qkv = torch.empty(12, 48, 2048, 2048, dtype=torch.float16, device="cuda")
    assert qkv.numel() > 2**31
    qkv[-1].normal_()
    dw = [torch.randn(48, 1, 3, 3, device="cuda") / 3]
    pw = [torch.randn(48, 16, 1, 1, device="cuda") / 4]
    with torch.no_grad():
        out = effattn.multi_scale_linear_attention(qkv, dw, pw, head_dim=16)[-1:]
        with use_backend("reference"):
            plain = effattn.multi_scale_linear_attention(qkv[-1:], dw, pw, head_dim=16)
            wide = [[t.double() for t in weights] for weights in (dw, pw)]
            truth = effattn.multi_scale_linear_attention(qkv[-1:].double(), *wide, head_dim=16)
    assert error(out, truth) <= allowed_error(plain, truth, FLOAT32_FORWARD_TOLERANCE)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_faster_launches_are_looked_for_and_kept(tmp_path, monkeypatch):
    """On request; and what is found computes the same."""
    from effattn._triton import configs
    from effattn.backends.triton import _tuning

    file = tmp_path / "launches.json"
    monkeypatch.setattr(configs, "BY_GPU", {})
    monkeypatch.setattr("effattn._triton.autotune.BY_GPU", configs.BY_GPU)
    monkeypatch.setattr(_tuning, "_file", None)
    function, arguments, leaves = prepared("biased_attention", torch.float32)
    with use_backend("triton"):
        expected = step(function, arguments, leaves)
        monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, str(file))
        results = step(function, arguments, leaves)
    assert torch.cuda.get_device_name() in file.read_text()
    for a, b in zip(results, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-5 * torch.linalg.vector_norm(b)


#: By module and memory format: launches of a call in half precision, at most (test_module_launches.py tells which).
LAUNCHES = {
    ("LiteMLA", torch.channels_last): 4,
    ("LiteMLA", torch.contiguous_format): 5,
    ("cascade", torch.channels_last): 4,
    ("cascade", torch.contiguous_format): 4,
}
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "LiteMLA": lambda: LiteMLA(128, 128, dim=16),
    "cascade": lambda: LocalWindowAttention(128, 16, num_heads=4, attn_ratio=2, resolution=28),
}


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "memory_format"), LAUNCHES, ids=str)
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="without clusters, sums over tokens are added up by a launch of their own",
)
def test_launches_of_a_module(name, memory_format, dtype, backend):
    module = MODULES[name]().to("cuda", dtype).eval()
    x = torch.randn(8, 128, 28, 28, device="cuda", dtype=dtype).to(memory_format=memory_format)
    with torch.no_grad():
        for _ in range(3):
            module(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            module(x)
            torch.cuda.synchronize()
    launched = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launched) <= LAUNCHES[name, memory_format], launched
