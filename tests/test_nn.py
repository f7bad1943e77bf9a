"""effattn.nn: the modules of timm, their state dicts and their answers; folded weights that are never stale."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from same import assert_all_same, assert_as_near, assert_same, is_same
from specified import check_gradients, module_results
from tiers import full
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune

import effattn
from effattn.nn import LiteMLA, lite_mla, projection
from effattn.nn.projection import fold_batch_norm, pointwise_convolution
from effattn.testing import import_timm, randomise_batch_norm
from effattn.tolerance import CPU_ROUNDINGS

import_timm()
from timm.models import efficientvit_mit  # noqa: E402  (after the import that makes it loadable)

OPTIONS = {
    "plain": {},
    "dim 16": {"dim": 16, "heads_ratio": 0.5},
    "biases": {"use_bias": (True, True)},
    "three scales": {"scales": (3, 5, 7)},
    "no scale": {"scales": ()},
    "norm and act": {"norm_layer": (nn.BatchNorm2d, nn.BatchNorm2d), "act_layer": (nn.Hardswish, nn.ReLU6)},
    "group norm": {"norm_layer": (None, lambda num_features, **_: nn.GroupNorm(4, num_features)), "eps": 1e-5},
}


def pair(name="plain", seed=0):
    """timm's module and ours with its state dict."""
    options = {"norm_layer": (None, nn.BatchNorm2d), "eps": 1e-15, **OPTIONS[name]}
    torch.manual_seed(seed)
    stock = efficientvit_mit.LiteMLA(32, 40, **options)
    if name == "group norm":
        options["norm_layer"] = (None, lambda channels: nn.GroupNorm(4, channels))
    ours = LiteMLA(32, 40, **options)
    randomise_batch_norm(stock, seed)
    ours.load_state_dict(stock.state_dict())
    return stock.eval(), ours.eval()


def attention_in_its_dtype(self, q, k, v):
    """timm's, without the cast to float32."""
    out = q @ (k.transpose(-1, -2) @ v)
    return out[..., :-1] / (out[..., -1:] + self.eps)


def image(batch=2, size=9, memory_format=torch.contiguous_format):
    torch.manual_seed(1)
    return torch.randn(batch, 32, size, size + 2).to(memory_format=memory_format)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_more_scales_than_the_kernels_take(grad):
    """Also where the whole module would be one operator."""
    module, x = LiteMLA(32, 32, dim=8, scales=(3,) * 9).eval(), image()
    with torch.set_grad_enabled(grad):
        out = module(x)
        with effattn.use_backend("reference"):
            assert_same(out, module(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation(name, batch, memory_format):
    stock, ours = pair(name)
    x = image(batch, memory_format=memory_format)
    with torch.no_grad():
        expected, out = stock(x), ours(x)
    assert_same(out, expected)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, batch, training, memory_format):
    """In float64, so that nothing but the formula is compared; and statistics move alike."""
    stock, ours = pair(name)
    stock._attn = MethodType(attention_in_its_dtype, stock)
    results = []
    for module in (stock, ours):
        module.double().train(training)
        x = image(batch, memory_format=memory_format).double().requires_grad_()
        out = module(x)
        grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        results.append([out, *grads, *module.buffers()])
    theirs, mine = results
    assert_all_same(mine, theirs)


@pytest.mark.parametrize("name", ["plain", "biases"])
def test_training_on_the_kernels(name):
    """Against float64, where they are timm's (test_gradients)."""
    ours, x = pair(name)[1].train(), image()
    grad_out = torch.randn(ours(x).shape)
    check_gradients(module_results(ours, x, grad_out), ours, x, grad_out, CPU_ROUNDINGS)


class Adapted(nn.Module):
    """What a LoRA library puts in a layer's place: it has the layer's weight, and computes something else."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("part", ["qkv.conv", "aggreg.0.0", "aggreg.1.1", "proj.conv"])
def test_adapters_put_in_afterwards_count(part):
    stock, ours = pair("three scales")
    parent, _, name = part.rpartition(".")
    for module in (stock, ours):
        setattr(module.get_submodule(parent), name, Adapted(module.get_submodule(part)))
    with torch.no_grad():
        assert_same(ours(image()), stock(image()))


@pytest.mark.parametrize("part", ["qkv", "qkv.conv", "aggreg.1", "aggreg.0.0", "aggreg.1.1", "proj", "proj.norm"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_hooks_on_parts_run(part, grad):
    stock, ours = pair("three scales")
    for module in (stock, ours):
        module.get_submodule(part).register_forward_hook(lambda module, args, out: out * 1.5)
    with torch.set_grad_enabled(grad):
        assert_same(ours(image()), stock(image()))


@pytest.mark.parametrize("hook", ["register_full_backward_pre_hook", "register_full_backward_hook"])
def test_backward_hooks_on_parts_run(hook):
    _, ours = pair()
    calls = []
    getattr(ours.aggreg[0][1], hook)(lambda *_: calls.append(1))
    ours(image()).sum().backward()
    assert calls == [1]


def test_weights_made_by_hooks_train():
    """Pruning and the older parametrizations compute the weight in a hook of the convolution."""
    _, ours = pair()
    prune.l1_unstructured(ours.qkv.conv, "weight", 0.5)
    for _ in range(2):
        ours(image()).sum().backward()
    assert ours.qkv.conv.weight_orig.grad.any()


def test_timm_modules_load_our_state_dict_too():
    stock, ours = pair("biases")
    assert list(stock.state_dict()) == list(ours.state_dict())
    stock.load_state_dict(ours.state_dict())


# --- folded weights ---------------------------------------------------------------------------------------


def by_state_dict(module):
    module.load_state_dict(pair(seed=5)[1].state_dict())


def by_assignment(module):
    module.load_state_dict(pair(seed=5)[1].state_dict(), assign=True)


def by_an_optimiser(module, **options):
    out = module(image())
    out.square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=0.5, **options).step()


def by_a_fused_optimiser(module):
    """It does not count the versions of what it changes."""
    by_an_optimiser(module, fused=True)


def by_a_change_of_mode(module):
    """Even what torch does not count, since weights are mostly changed in training."""
    module.train()
    module.proj.norm.running_mean.data.add_(1.0)
    module.eval()


def by_statistics(module):
    module.train()
    with torch.no_grad():
        module(image() * 3)
    module.eval()


def by_the_norm_alone(module):
    module.proj.norm.train()
    with torch.no_grad():
        module(image() * 3)
    module.proj.norm.eval()


def in_place(module):
    with torch.no_grad():
        module.proj.norm.weight.mul_(2.0)


def by_a_new_parameter(module):
    module.proj.norm.bias = nn.Parameter(torch.ones(40))


def by_eps(module):
    module.proj.norm.eps = 0.5


def by_conversion(module):
    module.double().float()
    with torch.no_grad():
        module.proj.conv.weight.mul_(2.0)


def by_a_part_replaced(module):
    module.proj = copy.deepcopy(module.proj)
    with torch.no_grad():
        module.proj.conv.weight.mul_(2.0)


CHANGES = [
    by_state_dict,
    by_assignment,
    by_an_optimiser,
    by_a_fused_optimiser,
    by_a_change_of_mode,
    by_statistics,
    by_the_norm_alone,
    in_place,
    by_a_new_parameter,
    by_eps,
    by_conversion,
    by_a_part_replaced,
]


@pytest.mark.parametrize("size", [9, 21])  # where one operator takes the module, and where torch projects
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_folded_weights_are_never_stale(change, size):
    stock, ours = pair()
    x = image(size=size)
    with torch.no_grad():
        before = ours(x)
        assert ours.__dict__["_effattn_fold_cache"], "nothing was kept, so nothing can be stale"
    change(ours)
    with torch.no_grad():
        out = ours(x)
        stock.load_state_dict(ours.state_dict())
        stock.proj.norm.eps = ours.proj.norm.eps
        assert_same(out, stock(x))
    assert not is_same(out, before)


def test_conversion_to_a_narrow_type_after_a_call():
    _, ours = pair()
    x = image()
    with torch.no_grad():
        expected = ours(x)
        out = ours.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_same(out, expected.to(out.dtype))


@pytest.mark.parametrize(("size", "name"), [(7, "at once"), (21, ("proj", torch.float32))])
def test_weights_are_folded_once(size, name):
    """Where one operator takes the module, and where the projection is a call of its own."""
    _, ours = pair()
    x = image(size=size)
    with torch.no_grad():
        ours(x)
        kept = ours.__dict__["_effattn_fold_cache"][name]
        ours(x)
        assert ours.__dict__["_effattn_fold_cache"][name] is kept


def test_converted_there_and_back():
    """Weights may come to lie where they lay before the conversion, with the version that they had."""
    _, ours = pair()
    with torch.no_grad():
        ours(image())
        ours.proj.half().float()  # a part alone: the module does not hear of it
        rounded = ours(image())
        fresh = pair()[1]
        fresh.load_state_dict(ours.state_dict())
        assert torch.equal(rounded, fresh(image()))


def test_gradients_reach_the_weights_behind_a_folded_call():
    _, ours = pair()
    with torch.no_grad():
        ours(image())
    ours(image()).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_inference_mode_and_inference_tensors():
    stock, ours = pair()
    with torch.inference_mode():
        assert_same(ours(image()), stock(image()))
        ours.load_state_dict({k: v.clone() for k, v in stock.state_dict().items()}, assign=True)
        assert_same(ours(image()), stock(image()))


def test_copies_and_pickles_carry_no_folded_weights():
    _, ours = pair()
    with torch.no_grad():
        expected = ours(image())
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert "_effattn_fold_cache" not in twin.__dict__
            assert torch.equal(twin(image()), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_fold_batch_norm(bias, affine):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(6, 5, 1, bias=bias).double(), nn.BatchNorm2d(5, affine=affine).double()
    randomise_batch_norm(norm)
    norm.eval()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    assert_same(nn.functional.conv2d(x, *fold_batch_norm(conv, norm)), norm(conv(x)))


@pytest.mark.parametrize("bias", [None, torch.arange(5.0)], ids=["no bias", "bias"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("size", [(1, 6, 3, 4), (2, 6, 3, 4), (0, 6, 3, 4), (2, 6, 1, 1), (1, 6, 0, 4)], ids=str)
@pytest.mark.parametrize("change", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("slow_products", [False, True])
def test_pointwise_convolution(size, change, grad, bias, slow_products, monkeypatch):
    monkeypatch.setattr(projection, "_PRODUCTS_ARE_SLOW", slow_products)
    torch.manual_seed(0)
    x = torch.randn(size)
    if change == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif change == "slice":
        x = torch.randn(size[0], 8, *size[2:])[:, 1:7]
    weight = torch.randn(5, 6, 1, 1)
    with torch.set_grad_enabled(grad):
        out = pointwise_convolution(x, weight, bias)
    assert_same(out, nn.functional.conv2d(x, weight, bias) if x.numel() else x.new_empty(out.shape))
    assert out.shape == (size[0], 5, *size[2:])


# --- torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training, dtype):
    stock, ours = pair()
    x = image()
    truth = copy.deepcopy(stock).double().train(training)(x.double())
    with torch.autocast("cpu", dtype=dtype):
        expected, out = stock.train(training)(x), ours.train(training)(x)
    assert out.dtype == expected.dtype
    assert_as_near(out, expected, truth)


@pytest.mark.parametrize("backend", ["aot_eager", full("inductor")])
@pytest.mark.parametrize("training", [True, full(False)], ids=["train", "eval"])
def test_compile_fullgraph(training, backend):
    _, ours = pair()
    ours.train(training)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        expected, out = ours(image()), compiled(image())
    assert_same(out, expected)
    if training:
        out.square().sum().backward()
        expected.square().sum().backward()
        for theirs, mine in zip(ours.parameters(), compiled.parameters(), strict=True):
            assert_same(mine.grad, theirs.grad)


@pytest.mark.full
def test_compiled_weights_are_not_stale_either():
    _, ours = pair()
    compiled = torch.compile(ours, fullgraph=True)
    with torch.no_grad():
        compiled(image())
        ours.load_state_dict(pair(seed=5)[1].state_dict())
        assert_same(compiled(image()), ours(image()))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(dynamic):
    _, ours = pair()
    with torch.no_grad():
        sizes = {i: torch.export.Dim(name, min=2, max=200) for i, name in ((2, "height"), (3, "width"))}
        program = torch.export.export(ours, (image(),), dynamic_shapes={"x": sizes} if dynamic else None)
        for size in (9, 40) if dynamic else (9,):
            assert_same(program.module()(image(size=size)), ours(image(size=size)))


def test_jit_trace():
    _, ours = pair()
    with torch.no_grad():
        ours(image())  # keeps its folded weights
        traced = torch.jit.trace(ours, (image(),))
        assert_same(traced(image()), ours(image()))


def test_vmap():
    stock, ours = pair()
    x = image(3).unsqueeze(1)
    with torch.no_grad():
        assert_same(torch.func.vmap(ours)(x), torch.func.vmap(stock)(x))


def test_forward_mode_by_the_weights():
    _, ours = pair()
    x, names = image(), [name for name, _ in ours.named_parameters()]
    primals = tuple(p.detach() for p in ours.parameters())
    tangents = tuple(torch.randn_like(p) for p in primals)

    def call(*weights):
        return torch.func.functional_call(ours, dict(zip(names, weights, strict=True)), (x,))

    with torch.no_grad():
        ours(x)  # keeps its folded weights
        _, expected = torch.func.jvp(call, primals, tangents)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(primals, tangents, strict=True)]
            assert_same(forward_ad.unpack_dual(call(*duals)).tangent, expected)


def test_meta_device():
    _, ours = pair()
    with torch.no_grad():
        assert ours.to("meta")(image().to("meta")).shape == (2, 40, 9, 11)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (4, 2), (20, 20), (20, 21)], ids=str)
def test_sizes(size):
    """Smaller than the kernel, fewer tokens than channels of a head, and around what one operator takes."""
    assert lite_mla._TOKENS_AT_ONCE == 400
    stock, ours = pair("dim 16")
    x = torch.randn(2, 32, *size)
    with torch.no_grad():
        assert_same(ours(x), stock(x))
        assert ("at once" in ours.__dict__["_effattn_fold_cache"]) == (size != (20, 21))


def test_no_image():
    _, ours = pair()
    with torch.no_grad():
        assert ours(torch.randn(0, 32, 9, 11)).shape == (0, 40, 9, 11)
    x = torch.randn(0, 32, 9, 11, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad.shape == x.shape


def test_float16_activations_of_1e4():
    """timm's is finite too, by a cast to float32; the sums of either go far beyond float16."""
    stock, ours = pair()
    x = image() * 1e4
    truth = copy.deepcopy(ours).double()(x.double())
    with torch.no_grad():
        expected, out = stock.half()(x.half()), ours.half()(x.half())
    assert_as_near(out, expected, truth)


def test_four_python_threads_at_once():
    """The memory between the threads of a call is no other call's."""
    modules = [pair(name)[1] for name in ("plain", "dim 16", "biases", "three scales")]
    images = [image(size=size) for size in (7, 9, 14, 19)]
    with torch.no_grad():
        expected = [module(x) for module, x in zip(modules, images, strict=True)]

    def work(i):
        with torch.no_grad():
            return all(torch.equal(modules[i](images[i]), expected[i]) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (5, 4)}, r"scales: expected odd kernel sizes, got \(5, 4\)"),
        ({"dim": 0, "heads": 1}, "dim: expected a positive number, got 0"),
        ({"dim": 64}, "heads: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        LiteMLA(32, 32, **options)


def test_it_is_what_accelerate_makes():
    stock, _ = pair()
    effattn.accelerate(stock)
    assert type(stock) is LiteMLA
