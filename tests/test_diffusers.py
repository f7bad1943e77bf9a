"""accelerate on diffusers' classes: the attention of DC-AE and the processor of Sana's transformer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from same import assert_as_near, assert_same, is_same
from specified import check_gradients, module_results
from torch import nn

import effattn
from effattn.integrations.sana import SanaLinearAttnProcessor, SanaMultiscaleLinearAttention
from effattn.testing import import_diffusers, randomise_batch_norm
from effattn.tolerance import CPU_ROUNDINGS

diffusers = import_diffusers()
from diffusers.models import attention_processor  # noqa: E402  (after the import that makes it loadable)

STOCK = attention_processor.SanaMultiscaleLinearAttention
OPTIONS = {
    "DC-AE": {"norm_type": "rms_norm", "residual_connection": True},
    "batch norm": {},
    "layer norm": {"norm_type": "layer_norm"},  # which diffusers applies to the image as it is
    "three scales": {"kernel_sizes": (3, 5, 7), "attention_head_dim": 4},
    "no scale": {"kernel_sizes": ()},
}


def make(name="DC-AE"):
    torch.manual_seed(0)
    module = STOCK(32, 32, **OPTIONS[name])
    randomise_batch_norm(module)
    return module.eval()


def image(size=9, memory_format=torch.contiguous_format, width=None):
    torch.manual_seed(1)
    return torch.randn(2, 32, size, width or size + 2).to(memory_format=memory_format)


def x_for(name):
    return image(width=32) if name == "layer norm" else image()


# --- the attention of the autoencoder -----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_evaluation_and_back(name):
    module, x = make(name), x_for(name)
    with torch.no_grad():
        expected = module(x)
        report = effattn.accelerate(module)
        assert [entry.module for entry in report.replaced] == ["(model)"] and not report.left_alone
        assert type(module) is SanaMultiscaleLinearAttention
        assert_same(module(x), expected)
        assert effattn.restore(module) == 1 and type(module) is STOCK
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_formats_and_few_tokens(memory_format):
    """The second image has fewer tokens than a head has channels: diffusers' quadratic path."""
    module = make()
    with torch.no_grad():
        for x in (image(memory_format=memory_format), image(1, memory_format)):
            expected = module(x)
            effattn.accelerate(module)
            assert_same(module(x), expected)
            effattn.restore(module)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, training):
    """Of ours and of the stock module, against ours in float64: diffusers' own casts to float32 in the middle."""
    stock, x = make(name).train(training), x_for(name)
    ours = copy.deepcopy(stock)
    effattn.accelerate(ours)
    grad_out = torch.randn(stock(x).shape)
    for module in (stock, ours):
        check_gradients(module_results(module, x, grad_out), ours, x, grad_out, CPU_ROUNDINGS)


def by_state_dict(module):
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()})


def by_an_optimiser(module):
    module(image()).square().mean().backward()
    torch.optim.SGD(module.parameters(), lr=0.5).step()


def in_place(module):
    with torch.no_grad():
        module.to_v.weight.mul_(2.0)


def by_an_adapter(module):
    """What a LoRA library does to a layer: another module in its place."""

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        @property
        def weight(self):
            return self.base.weight

        def forward(self, x):
            return 2 * self.base(x)

    module.to_v, module.to_out = Adapted(module.to_v), Adapted(module.to_out)


@pytest.mark.parametrize("change", [by_state_dict, by_an_optimiser, in_place, by_an_adapter], ids=lambda c: c.__name__)
def test_nothing_kept_is_stale(change):
    module, x = make("batch norm"), image()
    effattn.accelerate(module)
    with torch.no_grad():
        before = module(x)
        assert module.__dict__["_effattn_fold_cache"]
    change(module)
    with torch.no_grad():
        out = module(x)
        assert not is_same(out, before)
        effattn.restore(module)
        assert_same(out, module(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training):
    module, x = make().train(training), image()
    truth = copy.deepcopy(module)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = module(x)
        effattn.accelerate(module)
        mine = module(x)
    assert mine.dtype == theirs.dtype
    assert_as_near(mine, theirs, truth)


def test_whole_autoencoder_compiled():
    torch.manual_seed(0)
    model = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(16, 32),
        decoder_block_out_channels=(16, 32),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    ).eval()
    x = torch.randn(1, 3, 20, 28)
    with torch.no_grad():
        expected = model(x).sample
        assert len(effattn.accelerate(model).replaced) == 2
        assert_same(model(x).sample, expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x).sample, expected)
        assert effattn.restore(model) == 2


def test_what_is_left_alone_and_why():
    class Other(attention_processor.SanaMultiscaleAttnProcessor2_0):
        pass

    modules = {name: make("batch norm") for name in ("processor", "nonlinearity", "bias", "strided", "hooked", "parts")}
    modules["processor"].processor = Other()
    modules["nonlinearity"].nonlinearity = nn.GELU()
    modules["bias"].to_k = nn.Linear(32, 32)
    modules["strided"].to_qkv_multiscale[0].proj_in.stride = (2, 2)
    modules["hooked"].to_out.register_forward_hook(lambda *_: None)
    del modules["parts"].residual_connection
    report = effattn.accelerate(nn.ModuleDict(modules))
    assert not report.replaced
    assert {entry.module: entry.detail for entry in report.left_alone} == {
        "processor": "its processor is Other, not SanaMultiscaleAttnProcessor2_0",
        "nonlinearity": "its nonlinearity is GELU, not ReLU",
        "bias": "to_k has a bias",
        "strided": "to_qkv_multiscale.0.proj_in is not a depthwise convolution of an odd kernel that keeps the size",
        "hooked": "its parts have hooks or forwards of their own: to_out",
        "parts": "it has no residual_connection",
    }


class Doubling(attention_processor.SanaMultiscaleAttnProcessor2_0):
    """A user's, which asks diffusers' own for the rest."""

    def __call__(self, attn, hidden_states):
        return 2 * super().__call__(attn, hidden_states)


class AsModule(nn.Module):
    """A processor may be a module, with weights and hooks of its own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, attn, hidden_states):
        return self.gain * attn.to_q(hidden_states.movedim(1, -1)).movedim(-1, 1)


class Impostor:
    def __call__(self, attn, hidden_states):
        return hidden_states + 1


Impostor.__name__ = "SanaMultiscaleAttnProcessor2_0"


def by_apply_linear_attention(module):
    module.apply_linear_attention = lambda query, key, value: query.float()


PROCESSORS = {
    "subclass": lambda module: setattr(module, "processor", Doubling()),
    "module": lambda module: setattr(module, "processor", AsModule()),
    "function": lambda module: setattr(module, "processor", lambda attn, x: x * 2),
    "of the same name": lambda module: setattr(module, "processor", Impostor()),
    "method": by_apply_linear_attention,
}


@pytest.mark.parametrize("name", ["DC-AE", "batch norm"])
@pytest.mark.parametrize("change", PROCESSORS)
def test_a_processor_set_afterwards_is_called(change, name):
    """Also for fewer tokens than a head has channels, where diffusers' own takes another method."""
    module, stock = make(name), make(name)
    effattn.accelerate(module)
    for x in (image(), image(1)):
        with torch.no_grad():
            module(x)
            for m in (module, stock):
                PROCESSORS[change](m)
            assert_same(module(x), stock(x))
    if change != "module":  # the stock one again; torch lets no other object take a module's place
        for m in (module, stock):
            m.processor = attention_processor.SanaMultiscaleAttnProcessor2_0()
            m.__dict__.pop("apply_linear_attention", None)
        with torch.no_grad():
            assert_same(module(image()), stock(image()))


def test_a_processor_whose_call_was_patched_is_called(monkeypatch):
    module = make()
    effattn.accelerate(module)
    own = attention_processor.SanaMultiscaleAttnProcessor2_0.__call__
    monkeypatch.setattr(
        attention_processor.SanaMultiscaleAttnProcessor2_0, "__call__", lambda self, attn, x: 2 * own(self, attn, x)
    )
    with torch.no_grad():
        assert_same(module(image()), make()(image()))
        assert not effattn.accelerate(make()).replaced


def test_a_processor_set_afterwards_trains():
    results = []
    for accelerated in (False, True):
        module = make().train()
        if accelerated:
            effattn.accelerate(module)
        module.processor = Doubling()
        x = image().requires_grad_()
        results.append(torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]))
    for theirs, mine in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_adapters_put_in_before_count():
    module, stock = make(), make()
    for m in (module, stock):
        by_an_adapter(m)
    assert len(effattn.accelerate(module).replaced) == 1
    with torch.no_grad():
        assert_same(module(image()), stock(image()))


# --- the processor of the transformer -------------------------------------------------------------------


def transformer(**options):
    torch.manual_seed(0)
    return diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=10,
        sample_size=8,
        patch_size=1,
        **options,
    ).eval()


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 8, 8).to(dtype),  # the same numbers in each dtype
        "encoder_hidden_states": torch.randn(2, 5, 10).to(dtype),
        "timestep": torch.tensor([3, 7]),
        "return_dict": False,
    }


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm_across_heads"}], ids=["plain", "qk norm"])
def test_transformer(options):
    model = transformer(**options)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(**inputs())[0]
        report = effattn.accelerate(model)
        assert [entry.module for entry in report.replaced] == [
            f"transformer_blocks.{i}.attn1.processor" for i in range(2)
        ]
        assert type(model.transformer_blocks[0].attn1.processor) is SanaLinearAttnProcessor
        assert list(model.state_dict()) == keys
        assert_same(model(**inputs())[0], expected)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert_same(twin(**inputs())[0], expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same(compiled(**inputs())[0], expected)
        assert effattn.restore(twin) == effattn.restore(model) == 2
        assert torch.equal(model(**inputs())[0], expected)


def test_transformer_trains_alike():
    grads = []
    for fast in (False, True):
        model = transformer().train()
        if fast:
            effattn.accelerate(model)
        model(**inputs())[0].square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    theirs, mine = grads
    largest = max(t.abs().max().item() for t in theirs.values())
    for name, t in theirs.items():
        is_zero = name.endswith("attn2.to_k.bias")  # a softmax takes differences
        assert_same(mine[name], t, largest if is_zero else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_transformer_in_narrow_types(dtype):
    model = transformer()
    with torch.no_grad():
        truth = model(**inputs())[0]
        model.to(dtype)
        theirs = model(**inputs(dtype))[0]
        effattn.accelerate(model)
        mine = model(**inputs(dtype))[0]
    assert mine.dtype == theirs.dtype
    assert_as_near(mine, theirs, truth)


def test_norms_may_be_wider_than_the_rest():
    model = transformer(qk_norm="rms_norm_across_heads").bfloat16()
    for block in model.transformer_blocks:
        block.attn1.norm_q.float(), block.attn1.norm_k.float()
    with torch.no_grad():
        expected = model(**inputs(torch.bfloat16))[0]
        effattn.accelerate(model)
        out = model(**inputs(torch.bfloat16))[0]
    assert out.dtype == expected.dtype
    assert_same(out, expected)


def test_a_processor_of_two_blocks_is_reported_once():
    model = transformer()
    model.transformer_blocks[1].attn1.set_processor(model.transformer_blocks[0].attn1.processor)
    report = effattn.accelerate(model)
    assert len(report.replaced) == 1 and not report.left_alone


def test_a_processor_set_afterwards_is_the_users():
    model = transformer()
    effattn.accelerate(model)
    mine = attention_processor.SanaLinearAttnProcessor2_0()
    model.transformer_blocks[0].attn1.set_processor(mine)
    assert effattn.restore(model) == 1
    assert model.transformer_blocks[0].attn1.processor is mine


def test_a_processor_with_a_state_of_its_own_is_left_alone():
    model = transformer()
    model.transformer_blocks[1].attn1.processor.strength = 2
    report = effattn.accelerate(model)
    assert len(report.replaced) == 1
    assert report.left_alone[0].detail == "it keeps strength"


@pytest.mark.parametrize("change", ["set", "fused", "norms", "no norm", "adapters", "heads"])
def test_changes_of_the_transformers_attention_count(change):
    calls = []

    class Counting(attention_processor.SanaLinearAttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    results = []
    for accelerated in (False, True):
        model = transformer(qk_norm="rms_norm_across_heads")
        if accelerated:
            effattn.accelerate(model)
        with torch.no_grad():
            before = model(**inputs())[0]
            attention = model.transformer_blocks[0].attn1
            if change == "set":
                attention.set_processor(Counting())
            elif change == "fused":
                attention.fuse_projections()
            elif change == "norms":
                attention.norm_q = nn.LayerNorm(24)
            elif change == "no norm":
                attention.norm_k = None
            elif change == "adapters":
                attention.to_q = nn.Sequential(attention.to_q, nn.Tanh())
            else:
                attention.heads = 6
            results.append(model(**inputs())[0])
        assert (change in ("set", "fused")) == is_same(results[-1], before)
    assert_same(results[1], results[0])
    assert len(calls) == (2 if change == "set" else 0)


def test_a_processor_of_the_same_name_or_patched_is_left_alone(monkeypatch):
    model = transformer()
    impostor = type("SanaLinearAttnProcessor2_0", (), {"__call__": lambda self, attn, x, *args, **kwargs: x})
    model.transformer_blocks[1].attn1.processor = impostor()
    report = effattn.accelerate(model)
    assert len(report.replaced) == 1 and report.left_alone[0].detail == "it is not diffusers' own"
    effattn.restore(model)
    stock = attention_processor.SanaLinearAttnProcessor2_0
    monkeypatch.setattr(stock, "__call__", lambda self, attn, x, *args, **kwargs: x)
    assert not effattn.accelerate(model).replaced
