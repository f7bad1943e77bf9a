"""effattn.nn on softmax attention: answers and gradients of timm's modules, any size, biases that are never stale."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from same import assert_all_same, assert_as_near, assert_same, is_same
from specified import check_gradients, check_module, module_results
from tiers import full
from torch import nn
from torch.nn import functional

import effattn
from effattn import nn as ours
from effattn.nn import fold_cache
from effattn.nn.attention_bias import gather_attention_bias
from effattn.testing import import_timm, randomise_batch_norm
from effattn.tolerance import CPU_ROUNDINGS

import_timm()
from timm.models import efficientformer, efficientformer_v2, efficientvit_msra  # noqa: E402  (loadable only now)

CASCADE = {"dim": 48, "key_dim": 6, "num_heads": 3, "kernels": (7, 5, 3), "attn_ratio": 16 / 6}
V2 = {"dim": 24, "key_dim": 5, "num_heads": 4, "attn_ratio": 2}


class Case:
    """A module of timm's, ours beside it, and an input."""

    def __init__(self, theirs, mine, options, shape):
        self.theirs, self.mine, self.options, self.shape = theirs, mine, options, shape

    def pair(self, seed=0):
        """Both with the same state, which a mistake in folding or gathering would show."""
        torch.manual_seed(seed)
        stock, module = self.theirs(**self.options), self.mine(**self.options)
        randomise_batch_norm(stock, seed)
        with torch.no_grad():
            for part in stock.modules():
                if hasattr(part, "attention_biases"):
                    part.attention_biases.normal_()
        module.load_state_dict(stock.state_dict())
        for m in (stock, module):
            m.eval()  # timm's returns nothing
        return stock, module

    def x(self, memory_format=torch.contiguous_format):
        torch.manual_seed(1)
        x = torch.randn(self.shape)
        return x.to(memory_format=memory_format) if x.dim() == 4 else x


def cascade(options, shape):
    return Case(efficientvit_msra.CascadedGroupAttention, ours.CascadedGroupAttention, {**CASCADE, **options}, shape)


def windows(options, shape):
    return Case(efficientvit_msra.LocalWindowAttention, ours.LocalWindowAttention, {**CASCADE, **options}, shape)


CASES = {
    "cascade": cascade({"resolution": 7}, (2, 48, 7, 7)),
    "one head": cascade({"resolution": 4, "num_heads": 1, "attn_ratio": 8, "kernels": (3,)}, (2, 48, 4, 4)),
    "window of one token": windows({"window_resolution": 1}, (2, 48, 3, 4)),
    "windows": windows({"resolution": 14}, (2, 48, 14, 14)),
    "windows that do not divide": windows({"resolution": 10, "window_resolution": 4}, (1, 48, 10, 9)),
    "image smaller than a window": windows({"resolution": 4}, (2, 48, 4, 4)),
    "efficientformer": Case(
        efficientformer.Attention,
        ours.EfficientFormerAttention,
        {"dim": 24, "key_dim": 5, "num_heads": 3, "attn_ratio": 2, "resolution": (3, 4)},
        (2, 12, 24),
    ),
    "v2": Case(
        efficientformer_v2.Attention2d, ours.EfficientFormerV2Attention, {**V2, "resolution": (5, 4)}, (2, 24, 5, 4)
    ),
    "v2, stride": Case(
        efficientformer_v2.Attention2d,
        ours.EfficientFormerV2Attention,
        {**V2, "resolution": 8, "stride": 2, "act_layer": nn.ReLU},
        (2, 24, 8, 8),
    ),
    "v2, downsampling": Case(
        efficientformer_v2.Attention2dDownsample,
        ours.EfficientFormerV2AttentionDownsample,
        {**V2, "resolution": (7, 6), "out_dim": 30},
        (2, 24, 7, 6),
    ),
}
IMAGES = [name for name in CASES if name != "efficientformer"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_evaluation(name, memory_format):
    stock, module = CASES[name].pair()
    x = CASES[name].x(memory_format)
    with torch.no_grad():
        out, again = module(x), module(x)
        assert_same(out, stock(x))
    assert torch.equal(out, again)
    if x.dim() == 4:
        assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_equal_in_float64(name, training):
    """Through the reference: outputs, gradients of the input and of every parameter, statistics."""
    results = []
    for module in CASES[name].pair():
        module.double().train(training)
        x = CASES[name].x().double().requires_grad_()
        out = module(x)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        grads = torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])
        buffers = [b for n, b in module.named_buffers() if "attention_bias_idxs" not in n]
        results.append([out, *grads, *buffers])
    theirs, mine = results
    assert_all_same(mine, theirs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_kernels(name, training):
    """Against float64, where they are timm's (test_equal_in_float64)."""
    _, module = CASES[name].pair()
    x = CASES[name].x()
    module.train(training)
    grad_out = torch.randn(module(x).shape)
    check_gradients(module_results(module, x, grad_out), module, x, grad_out, CPU_ROUNDINGS)


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_go_both_ways(name):
    stock, module = CASES[name].pair()
    assert list(stock.state_dict()) == list(module.state_dict())
    stock.load_state_dict(module.state_dict())


@pytest.mark.parametrize("name", ["windows", "v2", "efficientformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(name, training, dtype):
    stock, module = CASES[name].pair()
    x = CASES[name].x()
    truth = copy.deepcopy(stock)
    truth.double().train(training)
    truth = truth(x.double())
    for m in (stock, module):
        m.train(training)
    for grad in (True, False):
        with torch.autocast("cpu", dtype=dtype), torch.set_grad_enabled(grad):
            expected, out = copy.deepcopy(stock)(x), copy.deepcopy(module)(x)
        assert out.dtype == expected.dtype
        assert_as_near(out, expected, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_narrow_weights(name, dtype):
    """Only the output is rounded to their dtype."""
    stock, module = (m.to(dtype) for m in CASES[name].pair())
    x = CASES[name].x().to(dtype)
    with torch.no_grad():
        out = module(x)
    assert out.dtype == dtype
    check_module(out, stock, x)


def test_logits_of_1e4_in_float16():
    """A softmax that did not subtract the largest would overflow."""
    stock, module = CASES["windows"].pair()
    with torch.no_grad():
        for qkv in module.attn.qkvs:
            qkv.bn.weight[: 2 * module.attn.key_dim].fill_(120.0)  # of q and k
        module.half()
        stock.load_state_dict(module.state_dict())
        x = CASES["windows"].x().half()
        attn = copy.deepcopy(module).double().attn
        dims = [attn.key_dim, attn.key_dim, 48 // attn.num_heads]
        q, k, _ = attn.qkvs[0](x.double()[:, : dims[2], :7, :7]).split(dims, dim=1)
        logits = attn.scale * attn.dws[0](q).flatten(2).mT @ k.flatten(2)
        assert logits.max() > 1e4
        out = module(x)
    check_module(out, stock, x)


# --- biases ------------------------------------------------------------------------------------------------


def brute_force_bias(table, resolution, size, stride):
    positions = [(y, x) for y in range(size[0]) for x in range(size[1])]
    queries = [(y, x) for y, x in positions if y % stride == 0 and x % stride == 0]
    if resolution != size:
        table = functional.interpolate(table.unflatten(1, resolution)[None], size=size, mode="bicubic")[0].flatten(1)
    index = [[abs(y - v) * size[1] + abs(x - u) for v, u in positions] for y, x in queries]
    return table[:, torch.tensor(index)]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(3, 4), (1, 1), (5, 2), (7, 7)], ids=str)
def test_gathered_bias(size, stride):
    table = torch.randn(2, 12)
    expected = brute_force_bias(table, (3, 4), size, stride)
    assert torch.equal(gather_attention_bias(table, (3, 4), size, stride), expected)


def tables(module):
    return [p for name, p in module.named_parameters() if name.endswith("attention_biases")]


def by_state_dict(case, module):
    module.load_state_dict(case.pair(seed=5)[1].state_dict())


def by_assignment(case, module):
    module.load_state_dict(case.pair(seed=5)[1].state_dict(), assign=True)


def by_an_optimiser(case, module):
    module(case.x()).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def by_a_fused_optimiser(case, module):
    """It does not count the versions of what it changes."""
    module(case.x()).square().sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1, fused=True).step()


def in_place(case, module):
    with torch.no_grad():
        for table in tables(module):
            table.mul_(3.0)


def by_a_new_parameter(case, module):
    for part in module.modules():
        if hasattr(part, "attention_biases"):
            part.attention_biases = nn.Parameter(part.attention_biases.detach() * 3)


def by_a_change_of_mode(case, module):
    """Even what torch does not count."""
    module.train()
    for table in tables(module):
        table.data.mul_(3.0)
    module.eval()


def by_a_part_replaced(case, module):
    name, last = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d | nn.Linear)][-1]
    twin = copy.deepcopy(last)
    with torch.no_grad():
        twin.weight.mul_(3.0)
    parent, _, name = name.rpartition(".")
    setattr(module.get_submodule(parent), name, twin)


def by_all_parts_replaced(case, module):
    for part in list(module.modules()):
        if part.__dict__.get("_effattn_fold_cache"):
            for name, child in part.named_children():
                twin = copy.deepcopy(child)
                with torch.no_grad():
                    for p in twin.parameters():
                        p.mul_(1.5)
                setattr(part, name, twin)


CHANGES = [
    by_state_dict,
    by_assignment,
    by_an_optimiser,
    by_a_fused_optimiser,
    in_place,
    by_a_new_parameter,
    by_a_change_of_mode,
    by_a_part_replaced,
    by_all_parts_replaced,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["windows", "efficientformer", "v2, stride", "v2, downsampling"])
def test_biases_and_folds_are_never_stale(name, change):
    case = CASES[name]
    stock, module = case.pair()
    with torch.no_grad():
        before = module(case.x())
        kept = [m for m in module.modules() if m.__dict__.get("_effattn_fold_cache")]
        assert kept, "nothing was kept, so nothing can be stale"
    change(case, module)
    with torch.no_grad():
        out = module(case.x())
        stock.load_state_dict(module.state_dict())
        stock.train()  # timm's own bias goes stale
        stock.eval()
        assert_same(out, stock(case.x()))
    assert not is_same(out, before)


@pytest.mark.parametrize("name", CASES)
def test_what_is_derived_is_made_once(name):
    case = CASES[name]
    _, module = case.pair()

    def derived():
        return [value for m in module.modules() for value in m.__dict__.get("_effattn_fold_cache", {}).values()]

    with torch.no_grad():
        module(case.x())
        first = derived()
        module(case.x())
        assert first and all(a is b for a, b in zip(first, derived(), strict=True))


def test_images_of_many_sizes_do_not_fill_the_memory():
    _, module = CASES["v2"].pair()
    with torch.no_grad():
        for size in range(1, 20):
            module(torch.randn(1, 24, size, 3))
    assert len(module.__dict__["_effattn_fold_cache"]) <= fold_cache.MAX_ENTRIES


@pytest.mark.parametrize("name", ["windows", "v2", "v2, downsampling"])
def test_made_on_the_meta_device_and_loaded(name):
    case = CASES[name]
    _, expected = case.pair()
    with torch.device("meta"):
        module = case.mine(**case.options).eval()
    module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "init_non_persistent_buffers"):  # as timm's own models are
            part.init_non_persistent_buffers()
    module.load_state_dict(expected.state_dict())
    with torch.no_grad():
        assert_same(module(case.x()), expected(case.x()))


@pytest.mark.parametrize("name", ["windows", "v2", "efficientformer"])
def test_fake_tensors_leave_nothing_behind(name):
    case = CASES[name]
    _, module = case.pair()
    with torch.no_grad():
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            module(mode.from_tensor(case.x()))
        assert_same(module(case.x()), case.pair()[1](case.x()))


def test_pickles_and_copies_carry_nothing_derived():
    case = CASES["windows"]
    _, module = case.pair()
    with torch.no_grad():
        expected = module(case.x())
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert "_effattn_fold_cache" not in twin.attn.__dict__
            assert torch.equal(twin(case.x()), expected)


# --- parts that do more than their weights say -----------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("windows", "attn"),
        ("windows", "attn.qkvs.1"),
        ("windows", "attn.qkvs.1.conv"),
        ("windows", "attn.dws.0.bn"),
        ("windows", "attn.proj"),
        ("windows", "attn.proj.0"),
        ("windows", "attn.proj.1"),
        ("efficientformer", "qkv"),
        ("efficientformer", "proj"),
        ("v2", "k"),
        ("v2", "v.bn"),
        ("v2", "v_local.conv"),
        ("v2", "talking_head1"),
        ("v2", "act"),
        ("v2", "proj"),
        ("v2, stride", "stride_conv"),
        ("v2, stride", "upsample"),
        ("v2, downsampling", "q.local"),
        ("v2, downsampling", "proj.bn"),
    ],
)
def test_hooks_on_parts_run(name, part, grad):
    case = CASES[name]
    pair = case.pair()
    with torch.no_grad():
        pair[1](case.x())  # keeps what it folded
    for module in pair:
        module.get_submodule(part).register_forward_hook(lambda module, args, out: out * 1.5)
    with torch.set_grad_enabled(grad):
        assert_same(pair[1](case.x()), pair[0](case.x()))


class Adapted(nn.Module):
    """What an adapter library puts in a layer's place: it has the layer's weight, and computes something else."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize(
    ("name", "part"),
    [("cascade", "qkvs.0.conv"), ("cascade", "dws.2.conv"), ("cascade", "proj.1.conv"), ("efficientformer", "qkv"),
     ("efficientformer", "proj"), ("v2", "q.conv"), ("v2", "talking_head2"), ("v2", "proj.conv")],
)  # fmt: skip
def test_adapters_put_in_afterwards_count(name, part):
    case = CASES[name]
    pair = case.pair()
    parent, _, last = part.rpartition(".")
    for module in pair:
        setattr(module.get_submodule(parent), last, Adapted(module.get_submodule(part)))
    with torch.no_grad():
        assert_same(pair[1](case.x()), pair[0](case.x()))


class Twice(nn.Module):
    """A part in a part's place, with the same children in the same order, that computes something else."""

    def __init__(self, base):
        super().__init__()
        for name, child in base.named_children():
            self.add_module(name, child)
        self.__dict__["base"] = base

    def forward(self, x):
        return 2 * self.base(x)


def in_front(base):
    return nn.Sequential(nn.ReLU(), *base.children())


def behind(base):
    return nn.Sequential(*base.children(), nn.ReLU())


def wrapped(base):
    return nn.Sequential(base)


@pytest.mark.parametrize("change", [Twice, in_front, behind, wrapped], ids=lambda change: change.__name__)
@pytest.mark.parametrize("mode", ["eval", "eval with gradients", "train"])
@pytest.mark.parametrize(
    ("name", "part"),
    [("cascade", "qkvs.0"), ("cascade", "dws.1"), ("cascade", "proj"), ("cascade", "proj.1"), ("v2", "k"),
     ("v2", "v_local"), ("v2", "proj"), ("v2, stride", "stride_conv"), ("v2, downsampling", "q.proj"),
     ("v2, downsampling", "v")],
)  # fmt: skip
def test_parts_that_are_exchanged_count(name, part, mode, change):
    """Whole parts, not their convolutions: what stands in their place is called, whatever its children are."""
    case = CASES[name]
    pair = case.pair()
    parent, _, last = part.rpartition(".")
    for module in pair:
        module.train(mode == "train")
        setattr(module.get_submodule(parent), last, change(module.get_submodule(part)))
    with torch.set_grad_enabled(mode != "eval"):
        assert_same(pair[1](case.x()), pair[0](case.x()))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_queries_of_another_kind_are_called(grad):
    case = CASES["v2, downsampling"]
    pair = case.pair()
    for module in pair:
        module.q = Twice(module.q)
    with torch.set_grad_enabled(grad):
        assert_same(pair[1](case.x()), pair[0](case.x()))


def test_tokens_come_out_as_they_lie_in_memory():
    """What a caller may do with timm's output he may do with ours: view it."""
    stock, module = CASES["efficientformer"].pair()
    with torch.no_grad():
        x = CASES["efficientformer"].x()
        assert stock(x).is_contiguous() and module(x).is_contiguous()


# --- other sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(14, 14), (5, 9), (1, 1), (20, 3)], ids=str)
def test_cascade_of_an_image_of_another_size(size):
    """One window as large as the image, and the table resized to it."""
    _, module = CASES["cascade"].pair()
    x = torch.randn(2, 48, *size)
    with torch.no_grad():
        out = module(x)
        expected = module.proj(
            effattn.cascaded_group_attention(
                x,
                *module._all_weights(size)[:4],
                brute_force_bias(module.attention_biases, (7, 7), size, 1),
                scale=module.scale,
            )
        )
    assert_same(out, expected)


@pytest.mark.parametrize("size", [(28, 28), (9, 17), (3, 5)], ids=str)
def test_windows_of_an_image_of_another_size(size):
    """timm takes any size here, and so says what is right."""
    stock, module = CASES["windows"].pair()
    x = torch.randn(2, 48, *size)
    with torch.no_grad():
        assert_same(module(x), stock(x))


def test_set_input_size_as_timm():
    for resolution in (4, 14, 7):
        stock, module = CASES["windows"].pair()
        x = torch.randn(1, 48, resolution, resolution)
        with torch.no_grad():
            module(x)
            stock.set_input_size(resolution)
            module.set_input_size(resolution)
            assert_same(module(x), stock(x))
            assert module.attn.resolution == stock.attn.resolution
            assert_same(module.attn.attention_biases, stock.attn.attention_biases)


def test_efficientformer_on_other_sizes():
    options = {"dim": 24, "key_dim": 5, "num_heads": 3, "attn_ratio": 2, "resolution": (2, 8)}
    module = ours.EfficientFormerAttention(**options).eval()
    nn.init.normal_(module.attention_biases)
    for size, given in (((6, 6), None), ((3, 7), (3, 7)), ((2, 8), (2, 8)), ((2, 8), None), ((4, 4), (4, 4))):
        x = torch.randn(2, size[0] * size[1], 24)
        stock = efficientformer.Attention(**{**options, "resolution": size})
        stock.load_state_dict({k: v for k, v in module.state_dict().items() if "attention" not in k}, strict=False)
        stock.eval()
        bias = brute_force_bias(module.attention_biases, (2, 8), size, 1)
        stock.get_attention_biases = lambda device, bias=bias: bias
        with torch.no_grad():
            assert_same(module(x, given), stock(x))
    with pytest.raises(ValueError, match=r"x: expected shape \(B, tokens, C\), got \(2, 24, 4, 4\)"):
        module(torch.randn(2, 24, 4, 4))
    with pytest.raises(ValueError, match=r"x: expected a square number of tokens, got shape \(B, 15, C\)"):
        module(torch.randn(1, 15, 24))
    with pytest.raises(ValueError, match=r"x: expected 3 x 4 tokens, got shape \(B, 15, C\)"):
        module(torch.randn(1, 15, 24), (3, 4))


@pytest.mark.parametrize("size", [(9, 4), (1, 1), (10, 13)], ids=str)
@pytest.mark.parametrize("name", ["v2", "v2, stride", "v2, downsampling"])
def test_v2_on_other_sizes(name, size):
    """timm's of that size, with our table resized; at a size that the stride does not divide, timm's is one larger."""
    case = CASES[name]
    _, module = case.pair()
    stock = case.theirs(**{**case.options, "resolution": size})
    state = module.state_dict()
    own = module.resolution if isinstance(module.resolution, tuple) else (module.resolution,) * 2
    state["attention_biases"] = brute_force_table(module.attention_biases, own, stock.resolution)
    stock.load_state_dict(state)
    stock.eval()
    x = torch.randn(2, 24, *size)
    if name == "v2, stride" and any(n % 2 for n in size):
        stock.upsample = nn.Upsample(size, mode="bilinear")
    with torch.no_grad():
        assert_same(module(x), stock(x))


def brute_force_table(table, own, size):
    image = functional.interpolate(table.detach().unflatten(1, own)[None], size=size, mode="bicubic")
    return image[0].flatten(1) if own != tuple(size) else table.detach()


@pytest.mark.parametrize("name", IMAGES)
def test_no_image(name):
    case = CASES[name]
    _, module = case.pair()  # timm's take none
    expected = module(case.x()).shape
    for grad in (False, True):
        x = torch.randn(0, *case.shape[1:], requires_grad=grad)
        with torch.set_grad_enabled(grad):
            out = module(x)
        assert out.shape == (0, *expected[1:])
    out.sum().backward()
    assert x.grad.shape == x.shape


# --- torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["windows", "efficientformer", "v2, stride", "v2, downsampling"])
@pytest.mark.each_value
def test_compile_fullgraph(name, training):
    case = CASES[name]
    _, module = case.pair()
    module.train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        expected, out = module(case.x()), compiled(case.x())
    assert_same(out, expected)
    if training:
        out.square().sum().backward()
        expected.square().sum().backward()
        assert_all_same(*([p.grad for p in m.parameters()] for m in (compiled, module)))


@pytest.mark.parametrize(
    ("name", "training"),
    [
        ("windows", False),
        ("efficientformer", True),
        *(full(name, False) for name in ("v2, stride", "v2, downsampling")),
        *(full(name, True) for name in ("windows", "cascade", "v2", "v2, stride", "v2, downsampling")),
    ],
)
def test_compile_dynamic(name, training):
    """Images of several sizes through one module; tables are gathered for each, so that graphs are too."""
    case = CASES[name]
    _, module = case.pair()
    module.train(training)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, dynamic=True, backend="aot_eager")
    for size, tokens in (((12, 8), 12), ((5, 5), 25)):
        torch.manual_seed(0)
        x = torch.randn(2, tokens, 24) if name == "efficientformer" else torch.randn(2, case.shape[1], *size)
        with torch.set_grad_enabled(training):
            assert_same(compiled(x), module(x))


def test_compiled_biases_are_not_stale_either():
    case = CASES["windows"]
    _, module = case.pair()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(case.x())
        by_state_dict(case, module)
        assert_same(compiled(case.x()), module(case.x()))


@pytest.mark.parametrize("name", ["windows", "v2"])
def test_export(name):
    case = CASES[name]
    _, module = case.pair()
    with torch.no_grad():
        program = torch.export.export(module, (case.x(),))
        assert_same(program.module()(case.x()), module(case.x()))


def test_export_of_windows_on_images_of_any_size():
    case = CASES["windows"]
    _, module = case.pair()
    sizes = {i: torch.export.Dim(name, min=2, max=200) for i, name in ((2, "height"), (3, "width"))}
    with torch.no_grad():
        program = torch.export.export(module, (case.x(),), dynamic_shapes={"x": sizes})
        for size in ((14, 14), (9, 30)):
            x = torch.randn(2, 48, *size)
            assert_same(program.module()(x), module(x))


@pytest.mark.parametrize("name", CASES)
def test_jit_trace(name):
    case = CASES[name]
    _, module = case.pair()
    with torch.no_grad():
        module(case.x())
        traced = torch.jit.trace(module, (case.x(),))
        assert_same(traced(case.x()), module(case.x()))


@pytest.mark.parametrize("name", ["windows", "v2", "efficientformer"])
def test_vmap(name):
    case = CASES[name]
    _, module = case.pair()
    x = torch.stack([case.x(), case.x() * 0.5])
    with torch.no_grad():
        assert_same(torch.func.vmap(module)(x), torch.stack([module(image) for image in x]))


@pytest.mark.parametrize("name", CASES)
def test_meta_device(name):
    case = CASES[name]
    _, module = case.pair()
    with torch.no_grad():
        assert module.to("meta")(case.x().to("meta")).shape == case.pair()[0](case.x()).shape


# --- wrong arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ours.CascadedGroupAttention, {"dim": 50}, r"dim: expected num_heads \* attn_ratio \* key_dim = 48, got 50"),
        (ours.CascadedGroupAttention, {"key_dim": 0}, "key_dim: expected a positive number, got 0"),
        (ours.CascadedGroupAttention, {"kernels": (5, 3)}, r"kernels: expected a size for each of 3 heads, got \(5, 3"),
        (ours.CascadedGroupAttention, {"kernels": (5, 4, 3)}, r"kernels: expected odd sizes, got \(5, 4, 3\)"),
        (ours.CascadedGroupAttention, {"resolution": 0}, "resolution: expected a positive number, got 0"),
        (ours.LocalWindowAttention, {"window_resolution": 0}, "window_resolution: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments_of_the_cascade(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**{**CASCADE, **options})


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ours.EfficientFormerAttention, {"num_heads": 0}, "num_heads: expected a positive number, got 0"),
        (ours.EfficientFormerAttention, {"resolution": (3, 0)}, "resolution: expected a positive number, got 0"),
        (ours.EfficientFormerV2Attention, {"stride": 0}, "stride: expected a positive number, got 0"),
        (ours.EfficientFormerV2AttentionDownsample, {"out_dim": 0}, "out_dim: expected a positive number, got 0"),
    ],
)
def test_wrong_arguments_of_efficientformer(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_images_of_other_channels_are_refused():
    for name in IMAGES:
        _, module = CASES[name].pair()
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
                module(torch.randn(1, 47, 7, 7))
    with torch.no_grad(), pytest.raises(ValueError, match=r"x: expected shape \(B, 48, H, W\), got \(1, 45, 7, 7\)"):
        CASES["cascade"].pair()[1](torch.randn(1, 45, 7, 7))
