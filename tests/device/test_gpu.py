"""What only a GPU can show: graphs, streams, no waiting for the host, memory, and the same bits under load."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from same import assert_same
from specified import mapped
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import cases, runner
from effattn import use_backend
from effattn.nn import LiteMLA, LocalWindowAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("backend"),
]


#: By the name of a form of an operator, what is measured of it, and a case.
CALLS = {
    measured.operator.name + form: (measured, shape)
    for measured in cases.MEASURED
    for form, shape in measured.on_a_gpu.items()
}
every_operator = pytest.mark.parametrize("name", CALLS)


def prepared(name, dtype=torch.bfloat16, device="cuda"):
    """The function, its arguments as leaves on the GPU, and those leaves."""
    measured, shape = CALLS[name]
    case = measured.case(shape, training=True, dtype=dtype)
    arguments = mapped(lambda t: t.requires_grad_(), runner.on(torch.device(device), case.make()))
    return case.ours, arguments, runner.tensors(arguments)


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
def test_same_bits_while_the_gpu_is_busy(name, backend):
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
def test_another_gpu_is_used(name, backend):
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

    assert peak(backend) < CALLS[name][0].memory * peak("reference")


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_faster_launches_are_looked_for_and_kept(tmp_path, monkeypatch):
    """On request; and what is found computes the same."""
    from effattn._triton import configs
    from effattn.backends.triton import _tuning

    file = tmp_path / "launches.json"
    monkeypatch.setattr(configs, "BY_GPU", {})
    monkeypatch.setattr("effattn._triton.autotune.BY_GPU", configs.BY_GPU)
    monkeypatch.setattr(_tuning, "_file", None)
    function, arguments, leaves = prepared(next(iter(CALLS)), torch.float32)
    with use_backend("triton"):
        expected = step(function, arguments, leaves)
        monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, str(file))
        results = step(function, arguments, leaves)
    assert torch.cuda.get_device_name() in file.read_text()
    for a, b in zip(results, expected, strict=True):
        assert_same(a, b)  # sums in another order


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
