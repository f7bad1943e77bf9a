"""Snap's attention for detection and segmentation: a gathered map of pairs of tokens is resized, not the table.

The stand-ins are of the structure of their backbones: ``attention_biases`` of classification, as buffers that forward
does not read, and ``attention_biases_seg``, gathered once in evaluation.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from same import assert_all_same, assert_as_near, assert_same, is_same
from specified import check_module
from torch import nn
from torch.nn import functional

import effattn
from effattn.testing import randomise_batch_norm


def bias_index(side: int, side_of_queries: int, stride: int) -> torch.Tensor:
    """Entries of the table in the order in which pairs of tokens meet their distance first."""
    keys = list(itertools.product(range(side), range(side)))
    seen: dict[tuple[int, int], int] = {}
    rows = [
        [seen.setdefault((abs(stride * y - v), abs(stride * x - u)), len(seen)) for v, u in keys]
        for y, x in itertools.product(range(side_of_queries), range(side_of_queries))
    ]
    return torch.tensor(rows)


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


class Biased(nn.Module):
    def add_biases(self, heads: int, side: int, side_of_queries: int | None = None, stride: int = 1) -> None:
        self.register_buffer("attention_biases", torch.randn(heads, 49))
        self.register_buffer("attention_bias_idxs", bias_index(7, 7, 1))
        index = bias_index(side, side_of_queries or side, stride)
        self.attention_biases_seg = nn.Parameter(torch.randn(heads, int(index.max()) + 1))
        self.register_buffer("attention_bias_idxs_seg", index)

    @torch.no_grad()
    def train(self, mode: bool = True):
        super().train(mode)
        if mode and hasattr(self, "ab"):
            del self.ab
        else:
            self.ab = self.attention_biases_seg[:, self.attention_bias_idxs_seg]

    def biased(self, logits: torch.Tensor) -> torch.Tensor:
        bias = self.attention_biases_seg[:, self.attention_bias_idxs_seg] if self.training else self.ab
        return logits + functional.interpolate(bias.unsqueeze(0), size=logits.shape[-2:], mode="bicubic")


class Attention(Biased):
    def __init__(self, dim: int, key_dim: int, num_heads: int, attn_ratio: int, resolution: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.nh_kd, self.d, self.dh = key_dim * num_heads, attn_ratio * key_dim, attn_ratio * key_dim * num_heads
        self.qkv = nn.Linear(dim, self.dh + 2 * self.nh_kd)
        self.proj = nn.Linear(self.dh, dim)
        self.add_biases(num_heads, resolution)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, self.num_heads, -1)
        q, k, v = (t.transpose(1, 2) for t in qkv.split([self.key_dim, self.key_dim, self.d], dim=3))
        attn = self.biased(q @ k.mT * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(batch, tokens, self.dh))


class Attention4D(Biased):
    def __init__(self, dim, key_dim, num_heads, attn_ratio, resolution, stride=None) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.dh, keys = attn_ratio * key_dim * num_heads, key_dim * num_heads
        self.resolution = math.ceil(resolution / (stride or 1))
        self.N = self.resolution**2
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
        q, k, v = (t.flatten(2).unflatten(1, (self.num_heads, -1)).mT for t in (self.q(x), self.k(x), v))
        attn = self.talking_head1(self.biased(q @ k.mT * self.scale)).softmax(dim=-1)
        out = (self.talking_head2(attn) @ v).mT.reshape(local.shape) + local
        return self.proj(out if self.upsample is None else self.upsample(out))


class Attention4DDownsample(Biased):
    def __init__(self, dim, key_dim, num_heads, attn_ratio, resolution, out_dim) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.dh, self.resolution = attn_ratio * key_dim * num_heads, resolution
        self.q = LGQuery(dim, key_dim * num_heads)
        self.k = nn.Sequential(*conv_norm(dim, key_dim * num_heads))
        self.v = nn.Sequential(*conv_norm(dim, self.dh))
        self.v_local = nn.Sequential(*conv_norm(self.dh, self.dh, 3, 2, self.dh))
        self.proj = nn.Sequential(nn.GELU(), *conv_norm(self.dh, out_dim))
        self.add_biases(num_heads, resolution, math.ceil(resolution / 2), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        v = self.v(x)
        local = self.v_local(v)
        q, k, v = (t.flatten(2).unflatten(1, (self.num_heads, -1)).mT for t in (self.q(x), self.k(x), v))
        attn = self.biased(q @ k.mT * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).mT.reshape(local.shape) + local)


OURS = effattn.nn
CASES = {
    "v1": (
        lambda: Attention(24, 5, 3, 2, 4),
        lambda: OURS.EfficientFormerAttention(24, 5, 3, 2, 4, dense_prediction=True),
    ),
    "v2": (
        lambda: Attention4D(24, 5, 4, 2, 5),
        lambda: OURS.EfficientFormerV2Attention(24, 5, 4, 2, 5, dense_prediction=True),
    ),
    "v2, stride 2": (
        lambda: Attention4D(24, 5, 4, 2, 8, 2),
        lambda: OURS.EfficientFormerV2Attention(24, 5, 4, 2, 8, stride=2, dense_prediction=True),
    ),
    "v2, stride 3": (
        lambda: Attention4D(24, 5, 4, 2, 12, 3),
        lambda: OURS.EfficientFormerV2Attention(24, 5, 4, 2, 12, stride=3, dense_prediction=True),
    ),
    "v2, downsampling": (
        lambda: Attention4DDownsample(24, 5, 4, 2, 7, 30),
        lambda: OURS.EfficientFormerV2AttentionDownsample(24, 5, 4, 2, 7, 30, dense_prediction=True),
    ),
}
SIZES = [(4, 4), (6, 10), (12, 6), (1, 1), (24, 30)]


def stock(name: str) -> nn.Module:
    torch.manual_seed(0)
    module = CASES[name][0]()
    randomise_batch_norm(module)
    module.eval()
    return module


def image(name: str, size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    if "stride 3" in name:  # theirs takes what the stride divides
        size = (3 * size[0], 3 * size[1])
    elif "stride 2" in name:
        size = (2 * size[0], 2 * size[1])
    return torch.randn(batch, math.prod(size), 24) if name == "v1" else torch.randn(batch, 24, *size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_equal_in_float64(name, training, size):
    """Outputs, gradients of the input and of every parameter; the table of classification gets none."""
    module = stock(name).double()
    module.train(training)
    if not training:
        module.ab = module.attention_biases_seg[:, module.attention_bias_idxs_seg]  # theirs is gathered without
    results = []
    for _ in range(2):
        x = image(name, size).double().requires_grad_()
        out = module(x)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])])
        report = effattn.accelerate(module)
        assert len(report.replaced) == 2 - len(results)
    theirs, mine = results
    assert_all_same(mine, theirs)
    assert not module.attention_biases.requires_grad


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_inference(name, dtype, size):
    """In narrow dtypes, where large images take several operators, as near to float64 as theirs."""
    module, x = stock(name).to(dtype), image(name, size).to(dtype)
    exact = copy.deepcopy(module).double()
    for m in (module, exact):
        m.eval()  # gathers biases again
    with torch.no_grad():
        theirs = module(x)
        assert len(effattn.accelerate(module).replaced) == 1
        mine, again = module(x), module(x)
        assert torch.equal(mine, again) and mine.dtype == dtype
        if dtype == torch.float32:
            check_module(mine, exact, x)
        else:
            assert_as_near(mine, theirs, exact(x.double()))
        assert effattn.restore(module) == 1
        assert torch.equal(module(x), theirs)


@pytest.mark.parametrize("name", ["v1", "v2", "v2, stride 2", "v2, downsampling"])
def test_small_images_are_one_operator(name):
    module, x = stock(name), image(name, (6, 10))
    effattn.accelerate(module)
    with torch.no_grad():
        module(x)
    kept = module.__dict__["_effattn_fold_cache"]
    assert any(str(key).startswith("packed") and entry is not None for key, entry in kept.items())


@pytest.mark.parametrize("name", CASES)
def test_their_state_dicts_load(name):
    module, ours = stock(name), CASES[name][1]().eval()
    state = module.state_dict()
    ours.load_state_dict(state)
    with torch.no_grad():
        assert_same(ours(image(name, (6, 10))), module(image(name, (6, 10))))
    state["attention_biases"] = torch.randn(len(state["attention_biases"]), 196)  # of another classification
    state["attention_bias_idxs"] = bias_index(14, 14, 1)
    nn.Sequential(ours).load_state_dict({f"0.{key}": value for key, value in state.items()})
    with torch.no_grad():
        assert_same(ours(image(name, (6, 10))), module(image(name, (6, 10))))


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_the_table_is_never_stale(name):
    module, x = stock(name), image(name, (6, 10))
    effattn.accelerate(module)
    with torch.no_grad():
        before = module(x)
        module.attention_biases_seg.mul_(3.0)
        after = module(x)
        assert not is_same(before, after)
        effattn.restore(module)
        assert_same(after, module(x))
        effattn.accelerate(module)
        module.attention_biases.mul_(3.0)  # forward does not read it
        assert torch.equal(module(x), after)


@pytest.mark.parametrize("name", ["v1", "v2, stride 2"])
def test_compiled(name):
    module = stock(name)
    effattn.accelerate(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in ((6, 10), (4, 4)):
            assert_same(compiled(image(name, size)), module(image(name, size)))


def test_a_size_that_does_not_fit_is_refused():
    ours = CASES["v1"][1]().eval()
    with torch.no_grad(), pytest.raises(ValueError, match=r"x: expected 6 x 6 tokens, got shape \(B, 60, C\)"):
        ours(torch.randn(1, 60, 24), (6, 6))


def test_a_table_for_detection_of_a_wrong_shape_is_left_alone():
    module = stock("v2")
    module.attention_biases_seg = nn.Parameter(torch.randn(4, 24))
    (entry,) = effattn.accelerate(module).left_alone
    assert entry.detail == "attention_biases_seg of shape (4, 24), expected (4, 25)"
