"""accelerate and restore on EfficientViT (Microsoft) and EfficientFormer: timm's models, and the official modules."""

from __future__ import annotations

import copy
import itertools
import math
import re

import pytest
import torch
from same import assert_all_same, assert_as_near, assert_same, is_same
from tiers import full
from torch import nn

import effattn
from effattn.testing import import_timm, randomise_batch_norm

timm = import_timm()

# --- of the official repositories' structure: names of parts, biases gathered on a change of mode -------------------


def bias_index(side: int, side_of_queries: int, stride: int) -> torch.Tensor:
    keys = list(itertools.product(range(side), range(side)))
    queries = list(itertools.product(range(side_of_queries), range(side_of_queries)))
    seen: dict[tuple[int, int], int] = {}
    pairs = [(abs(stride * y - v), abs(stride * x - u)) for y, x in queries for v, u in keys]
    return torch.tensor([seen.setdefault(pair, len(seen)) for pair in pairs]).reshape(len(queries), len(keys))


class Biased(nn.Module):
    """What all of them do about their biases."""

    def add_biases(self, heads: int, side: int, side_of_queries: int | None = None, stride: int = 1) -> None:
        index = bias_index(side, side_of_queries or side, stride)
        self.attention_biases = nn.Parameter(torch.randn(heads, int(index.max()) + 1))
        self.register_buffer("attention_bias_idxs", index)

    @torch.no_grad()
    def train(self, mode: bool = True):
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases[:, self.attention_bias_idxs]

    def bias(self) -> torch.Tensor:
        return self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab


class Conv2d_BN(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, padding: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, kernel, 1, padding, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


class CascadedGroupAttention(Biased):
    def __init__(self, dim: int, key_dim: int, num_heads: int, resolution: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale, self.d = num_heads, key_dim, key_dim**-0.5, dim // num_heads
        self.qkvs = nn.ModuleList(Conv2d_BN(self.d, 2 * key_dim + self.d) for _ in range(num_heads))
        self.dws = nn.ModuleList(Conv2d_BN(key_dim, key_dim, k, k // 2, key_dim) for k in kernels)
        self.proj = nn.Sequential(nn.ReLU(), Conv2d_BN(dim, dim))
        self.add_biases(num_heads, resolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = x.shape
        outs: list[torch.Tensor] = []
        for i, group in enumerate(x.chunk(self.num_heads, dim=1)):
            feat = self.qkvs[i](group + outs[-1] if outs else group)
            q, k, v = feat.split([self.key_dim, self.key_dim, self.d], dim=1)
            q, k, v = self.dws[i](q).flatten(2), k.flatten(2), v.flatten(2)
            attn = (q.mT @ k * self.scale + self.bias()[i]).softmax(dim=-1)
            outs.append((v @ attn.mT).reshape(batch, self.d, height, width))
        return self.proj(torch.cat(outs, dim=1))


class LocalWindowAttention(nn.Module):
    def __init__(self, dim: int, key_dim: int, num_heads: int, resolution: int, window: int, kernels) -> None:
        super().__init__()
        self.dim, self.num_heads, self.resolution, self.window_resolution = dim, num_heads, resolution, window
        self.attn = CascadedGroupAttention(dim, key_dim, num_heads, min(window, resolution), kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        assert height == width == self.resolution
        side = self.window_resolution
        if height <= side:
            return self.attn(x)
        pad = -height % side
        x = nn.functional.pad(x, (0, pad, 0, pad))
        n = (height + pad) // side
        x = x.reshape(batch, channels, n, side, n, side).permute(0, 2, 4, 1, 3, 5)
        x = self.attn(x.reshape(-1, channels, side, side)).reshape(batch, n, n, channels, side, side)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, n * side, n * side)[:, :, :height, :width]


class Attention(Biased):
    def __init__(self, dim: int, key_dim: int, num_heads: int, attn_ratio: int, resolution: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.d, self.dh = attn_ratio * key_dim, attn_ratio * key_dim * num_heads
        self.qkv = nn.Linear(dim, self.dh + 2 * key_dim * num_heads)
        self.proj = nn.Linear(self.dh, dim)
        self.add_biases(num_heads, resolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, self.num_heads, -1)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.d], dim=3)
        q, k, v = (t.permute(0, 2, 1, 3) for t in (q, k, v))
        attn = (q @ k.mT * self.scale + self.bias()).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, self.dh))


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups), nn.BatchNorm2d(outputs)]


class LGQuery(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(1, 2, 0)
        self.local = nn.Sequential(nn.Conv2d(inputs, inputs, 3, 2, 1, groups=inputs))
        self.proj = nn.Sequential(*conv_norm(inputs, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.local(x) + self.pool(x))


class Attention4D(Biased):
    def __init__(
        self, dim: int, key_dim: int, num_heads: int, attn_ratio: int, resolution: int, stride: int | None
    ) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.dh, keys = attn_ratio * key_dim * num_heads, key_dim * num_heads
        self.resolution = math.ceil(resolution / (stride or 1))
        self.stride_conv = None if stride is None else nn.Sequential(*conv_norm(dim, dim, 3, stride, dim))
        self.upsample = None if stride is None else nn.Upsample(scale_factor=stride, mode="bilinear")
        self.q, self.k = (nn.Sequential(*conv_norm(dim, keys)) for _ in range(2))
        self.v = nn.Sequential(*conv_norm(dim, self.dh))
        self.v_local = nn.Sequential(*conv_norm(self.dh, self.dh, 3, 1, self.dh))
        self.talking_head1, self.talking_head2 = (nn.Conv2d(num_heads, num_heads, 1) for _ in range(2))
        self.proj = nn.Sequential(nn.GELU(), *conv_norm(self.dh, dim))
        self.add_biases(num_heads, self.resolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.stride_conv is None else self.stride_conv(x)
        v = self.v(x)
        local = self.v_local(v)
        q, k, v = (t.reshape(len(x), self.num_heads, -1, self.resolution**2).mT for t in (self.q(x), self.k(x), v))
        attn = self.talking_head1(q @ k.mT * self.scale + self.bias()).softmax(dim=-1)
        out = (self.talking_head2(attn) @ v).mT.reshape(local.shape) + local
        return self.proj(out if self.upsample is None else self.upsample(out))


class Attention4DDownsample(Biased):
    def __init__(self, dim: int, key_dim: int, num_heads: int, attn_ratio: int, resolution: int, out_dim: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.dh, keys, self.resolution = attn_ratio * key_dim * num_heads, key_dim * num_heads, resolution
        self.resolution2 = math.ceil(resolution / 2)
        self.q = LGQuery(dim, keys)
        self.k = nn.Sequential(*conv_norm(dim, keys))
        self.v = nn.Sequential(*conv_norm(dim, self.dh))
        self.v_local = nn.Sequential(*conv_norm(self.dh, self.dh, 3, 2, self.dh))
        self.proj = nn.Sequential(nn.GELU(), *conv_norm(self.dh, out_dim))
        self.add_biases(num_heads, resolution, self.resolution2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.v(x)
        local = self.v_local(v)
        q, k, v = (t.flatten(2).unflatten(1, (self.num_heads, -1)).mT for t in (self.q(x), self.k(x), v))
        attn = (q @ k.mT * self.scale + self.bias()).softmax(dim=-1)
        return self.proj((attn @ v).mT.reshape(local.shape) + local)


OFFICIAL = {
    "cascade": (lambda: CascadedGroupAttention(32, 5, 2, 7, (7, 3)), (2, 32, 7, 7)),
    "windows": (lambda: LocalWindowAttention(32, 5, 2, 10, 4, (5, 3)), (2, 32, 10, 10)),
    "one window": (lambda: LocalWindowAttention(32, 5, 2, 4, 7, (5, 3)), (2, 32, 4, 4)),
    "efficientformer": (lambda: Attention(24, 5, 3, 2, 4), (2, 16, 24)),
    "v2": (lambda: Attention4D(24, 5, 4, 2, 5, None), (2, 24, 5, 5)),
    "v2, stride": (lambda: Attention4D(24, 5, 4, 2, 8, 2), (2, 24, 8, 8)),
    "v2, downsampling": (lambda: Attention4DDownsample(24, 5, 4, 2, 7, 30), (2, 24, 7, 7)),
}


def official(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    make, shape = OFFICIAL[name]
    module = make()
    randomise_batch_norm(module)
    module.eval()
    return module, torch.randn(shape)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_modules(name):
    module, x = official(name)
    keys = list(module.state_dict())
    with torch.no_grad():
        expected = module(x)
        report = effattn.accelerate(module)
        assert len(report.replaced) == 1 + ("window" in name) and not report.left_alone
        assert_same(module(x), expected)
        assert list(module.state_dict()) == keys
    out = module(x.requires_grad_())
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert effattn.restore(module) == len(report.replaced)
    with torch.no_grad():
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_modules_equal_in_float64(name):
    module, x = official(name)
    module.double()
    module.eval()  # gathers the bias in float64
    for training in (False, True):
        module.train(training)
        results = []
        for change in (effattn.restore, effattn.accelerate):
            twin = copy.deepcopy(module)
            change(twin)
            image = x.double().requires_grad_()
            out = twin(image)
            weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
            leaves = [image, *twin.parameters()]
            results.append([out, *torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)])
        pairs = [(mine, theirs) for theirs, mine in zip(*results, strict=True) if theirs is not None]
        assert_all_same(*zip(*pairs, strict=True))
        # But the bias that the original gathered, once, in evaluation.
        assert len(pairs) == len(results[0]) - (0 if training else 1)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_modules_in_narrow_types(name, dtype, grad):
    module, x = official(name)
    truth = copy.deepcopy(module).double()
    truth.eval()
    with torch.no_grad():
        truth = truth(x.double())
    module.to(dtype)
    module.eval()
    with torch.set_grad_enabled(grad):
        stock = module(x.to(dtype))
        effattn.accelerate(module)
        out = module(x.to(dtype))
    assert out.dtype == dtype
    assert_as_near(out, stock, truth)


OURS = {
    "cascade": lambda: effattn.nn.CascadedGroupAttention(32, 5, 2, 16 / 5, 7, (7, 3)),
    "windows": lambda: effattn.nn.LocalWindowAttention(32, 5, 2, 16 / 5, 10, 4, (5, 3)),
    "efficientformer": lambda: effattn.nn.EfficientFormerAttention(24, 5, 3, 2, 4),
    "v2": lambda: effattn.nn.EfficientFormerV2Attention(24, 5, 4, 2, 5),
    "v2, stride": lambda: effattn.nn.EfficientFormerV2Attention(24, 5, 4, 2, 8, stride=2),
    "v2, downsampling": lambda: effattn.nn.EfficientFormerV2AttentionDownsample(24, 5, 4, 2, 7, 30),
}


@pytest.mark.parametrize("name", OURS)
def test_official_state_dicts_load(name):
    module, x = official(name)
    ours = OURS[name]().eval()
    ours.load_state_dict(module.state_dict())
    nn.Sequential(ours).load_state_dict(nn.Sequential(module).state_dict())  # with a prefix
    with torch.no_grad():
        assert_same(ours(x), module(x))


@pytest.mark.parametrize("name", ["windows", "efficientformer", "v2"])
def test_restored_modules_do_not_use_what_they_gathered_before(name):
    module, x = official(name)
    effattn.accelerate(module)
    module.train()
    module.eval()
    with torch.no_grad():
        for table in (p for n, p in module.named_parameters() if n.endswith("attention_biases")):
            table.add_(torch.randn_like(table))
        expected = module(x)
        effattn.restore(module)
        assert_same(module(x), expected)


def test_restoring_keeps_the_mode_of_every_part():
    module, _ = official("windows")
    effattn.accelerate(module)
    module.train()
    module.attn.proj[1].bn.eval()  # a frozen norm
    modes = [part.training for part in module.modules()]
    effattn.restore(module)
    assert [part.training for part in module.modules()] == modes


@pytest.mark.parametrize("size", [(3, 3), (10, 13), (16, 8)], ids=str)
def test_official_modules_take_any_size_then(size):
    for name in ("windows", "v2", "v2, stride", "v2, downsampling"):
        module, x = official(name)
        effattn.accelerate(module)
        with torch.no_grad():
            out = module(torch.randn(1, x.shape[1], *size))
        halved = tuple(-(-n // 2) for n in size)
        assert out.shape[2:] == (halved if name == "v2, downsampling" else size)


# --- timm's models ---------------------------------------------------------------------------------------------


MODELS = {
    **{f"efficientvit_m{i}": 2 * blocks for i, blocks in enumerate((6, 6, 6, 6, 6, 8))},
    "efficientformer_l1": 1,
    "efficientformer_l3": 4,
    "efficientformer_l7": 8,
    "efficientformerv2_s0": 5,
    "efficientformerv2_s1": 5,
    "efficientformerv2_s2": 9,
    "efficientformerv2_l": 13,
}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name, num_classes=10)
    randomise_batch_norm(made)
    with torch.no_grad():
        for part in made.modules():
            if hasattr(part, "attention_biases"):
                part.attention_biases.normal_()
    made.eval()
    return made


def image(batch: int = 1, size: int = 224) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, size, size)


@pytest.mark.parametrize("name", MODELS)
def test_same_answers_and_back(name):
    stock, x = model(name), image()
    with torch.no_grad():
        expected = stock(x)
        report = effattn.accelerate(stock)
        assert len(report.replaced) == MODELS[name] and not report.left_alone, report
        assert_same(stock(x), expected)
        assert effattn.restore(stock) == MODELS[name] + len(report.blocks)
        assert torch.equal(stock(x), expected)


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientformer_l1", "efficientformerv2_s0"])
def test_same_training_step(name):
    """In float64, where only a mistake would show: after BatchNorm on small batches, rounding grows a thousandfold."""
    stock, x = model(name).double(), image(2).double()
    fast = copy.deepcopy(stock)
    effattn.accelerate(fast)
    for m in (stock, fast):
        for part in m.modules():  # nothing by chance
            for chance in ("p", "drop", "drop_prob"):
                if isinstance(getattr(part, chance, None), float):
                    setattr(part, chance, 0.0)
        m.train()
        out = m(x)
        out = out[0] + out[1] if isinstance(out, tuple) else out  # of two heads
        out.square().mean().backward()
        torch.optim.SGD(m.parameters(), lr=0.01).step()
    for (key, a), b in zip(stock.state_dict().items(), fast.state_dict().values(), strict=True):
        assert is_same(a, b), key


@pytest.mark.parametrize("name", [full("efficientvit_m0"), "efficientformer_l1", full("efficientformerv2_s0")])
def test_compile_fullgraph(name):
    fast, x = model(name), image()
    effattn.accelerate(fast)
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x), fast(x))


def test_other_resolutions():
    """timm's EfficientViT takes any, EfficientFormer only its own."""
    stock = model("efficientvit_m0")
    fast = copy.deepcopy(stock)
    effattn.accelerate(fast)
    with torch.no_grad():
        for size in (160, 288):
            assert_same(fast(image(size=size)), stock(image(size=size)))
        for name in ("efficientformer_l1", "efficientformerv2_s0"):
            other = model(name)
            with pytest.raises(RuntimeError):
                other(image(size=256))
            effattn.accelerate(other)
            assert other(image(size=256)).isfinite().all()


# --- what is left alone ----------------------------------------------------------------------------------------


def changed(name: str, change) -> nn.Module:
    module, _ = official(name)
    change(module)
    return module


def set_attribute(path: str, attribute: str, value):
    return lambda module: setattr(module.get_submodule(path), attribute, value)


LEFT_ALONE = {
    "hooked": ("cascade", lambda m: m.qkvs[0].c.register_forward_hook(lambda *_: None), "hooks or forwards"),
    "gelu": ("cascade", set_attribute("proj", "0", nn.GELU()), "proj.0 is GELU, not ReLU"),
    "dilated": ("cascade", set_attribute("dws.1.c", "dilation", (2, 2)), "dws.1.c is not a depthwise convolution"),
    "group norm": (
        "cascade",
        set_attribute("qkvs.1", "bn", nn.GroupNorm(1, 26)),
        "qkvs.1.bn is GroupNorm, not a BatchNorm",
    ),
    "mixed keys": (
        "cascade",
        set_attribute("", "key_dim", 6),
        r"qkvs.0.c has a weight of shape \(26, 16, 1, 1\), expected \(28, 16, 1, 1\)",
    ),
    "heads": ("cascade", set_attribute("", "num_heads", 3), r"attention_biases of shape \(2, 49\), expected \(3, 49\)"),
    "norm in front": (
        "cascade",
        lambda m: m.add_module("norm", nn.Identity()),
        "unknown part norm",
    ),
    "windows": (
        "windows",
        set_attribute("attn.proj", "0", nn.GELU()),
        "its attn cannot be replaced: proj.0 is GELU, not ReLU",
    ),
    "linear": ("efficientformer", set_attribute("", "qkv", nn.Sequential(nn.Linear(24, 60))), "not Linear"),
    "v2 table": ("v2", set_attribute("", "resolution", 6), r"of shape \(4, 25\), expected \(4, 36\)"),
    "v2 norm": ("v2", set_attribute("k", "1", nn.GroupNorm(1, 20)), "k.1 is GroupNorm, not a BatchNorm"),
    "v2 activated key": ("v2", lambda m: m.k.insert(0, nn.ReLU()), "k has parts 0, 1, 2, expected"),
    "v2 no activation": ("v2", lambda m: m.proj.pop(0), "proj.1 is BatchNorm2d, not Conv2d"),
    "v2 corners": ("v2, stride", set_attribute("upsample", "align_corners", True), "upsample is not bilinear"),
    "v2 factor": ("v2, stride", set_attribute("upsample", "scale_factor", 3.0), "upsample by 3.0 behind a stride of"),
    "v2 no upsampling": (
        "v2, stride",
        set_attribute("", "upsample", None),
        "stride_conv and upsample without the other",
    ),
    "v2 pool": (
        "v2, downsampling",
        set_attribute("q.pool", "kernel_size", 2),
        "q.pool does not take every other pixel",
    ),
    "oblong": ("efficientformer", lambda m: m.attention_bias_idxs.zero_(), "not those of a square"),
    "v2 talking": ("v2", set_attribute("", "talking_head1", nn.Identity()), "talking_head1 is Identity, not Conv2d"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_the_report_tells_why(case):
    name, change, reason = LEFT_ALONE[case]
    report = effattn.accelerate(changed(name, change))
    assert not report.replaced
    assert re.search(reason, report.left_alone[0].detail), report


def test_other_modules_of_a_common_name_are_not_ours():
    """TinyViT's Attention has every attribute of EfficientFormer's, and a norm in front."""
    for name in ("tiny_vit_5m_224", "levit_128s", "vit_tiny_patch16_224"):
        report = effattn.accelerate(timm.create_model(name))
        assert not report.replaced
