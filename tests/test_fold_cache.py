"""Nothing that was folded, gathered or packed outlives a change of what it was made of.

The right answer is that of a copy of the module, which has an empty cache.
"""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import torch
from same import is_same
from torch import nn
from torch.nn.utils import parametrizations, prune, vector_to_parameters
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import effattn
from effattn import nn as ours
from effattn.integrations.sana import SanaMultiscaleLinearAttention
from effattn.nn import fold_cache
from effattn.testing import import_diffusers, randomise_batch_norm


def dc_ae():
    import_diffusers()
    from diffusers.models.autoencoders.autoencoder_dc import SanaMultiscaleLinearAttention as Stock

    module = Stock(16, 16, attention_head_dim=8, norm_type="batch_norm")
    effattn.accelerate(module)
    assert isinstance(module, SanaMultiscaleLinearAttention)
    return module


MODULES = {
    "one operator": (lambda: ours.LiteMLA(16, 16, dim=8), (1, 16, 5, 6)),
    "projections": (lambda: ours.LiteMLA(16, 16, dim=8), (1, 16, 20, 21)),
    "cascade": (lambda: ours.LocalWindowAttention(48, 4, 3, 4, 8, 4, (5, 3, 3)), (1, 48, 8, 8)),
    "efficientformer": (lambda: ours.EfficientFormerAttention(24, 5, 3, 2, 4), (2, 16, 24)),
    "v2": (lambda: ours.EfficientFormerV2Attention(24, 5, 3, 2, 4), (1, 24, 4, 4)),
    "v2, layer by layer": (lambda: ours.EfficientFormerV2Attention(24, 5, 3, 2, 21), (1, 24, 21, 21)),
    "v2, downsampling": (lambda: ours.EfficientFormerV2AttentionDownsample(24, 5, 3, 2, 6), (1, 24, 6, 6)),
    "dc-ae": (dc_ae, (1, 16, 6, 6)),
}
#: One of each kind of cache entry.
SOME = ("one operator", "projections", "cascade", "efficientformer", "v2")


def make(name):
    module = MODULES[name][0]().eval()
    randomise_batch_norm(module)
    with torch.no_grad():
        for part in module.modules():
            if hasattr(part, "attention_biases"):
                part.attention_biases.normal_()
    return module


def image(name):
    return torch.randn(MODULES[name][1], generator=torch.Generator().manual_seed(3))


def run(module, x):
    with torch.no_grad():
        return module(x)


def caches(module):
    return [part.__dict__[fold_cache._KEY] for part in module.modules() if part.__dict__.get(fold_cache._KEY)]


def check(name, change, *, changes=True):
    """Whether a call after ``change`` equals that of a copy; ``changes``: and differs from one before it."""
    module, x = make(name), image(name)
    before = run(module, x)
    assert caches(module), "nothing was kept, so nothing can be stale"
    changed = change(module, x)
    module = module if changed is None else changed
    after = run(module, x)
    assert torch.equal(after, run(copy.deepcopy(module), x))
    assert not changes or not is_same(after, before)
    return module


# --- optimisers ------------------------------------------------------------------------------------------------


def optimisers():
    """Every optimiser of torch in every implementation that it has."""
    for cls in vars(torch.optim).values():
        if not (inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)) or cls is torch.optim.Optimizer:
            continue
        # SparseAdam takes sparse gradients, Muon matrices; no parameter of these modules has the one, and not all
        # are the other.
        if cls.__name__ in ("SparseAdam", "Muon"):
            continue
        known = inspect.signature(cls).parameters
        yield pytest.param(cls, {}, id=cls.__name__)
        for way in ("foreach", "fused"):
            if way in known:
                yield pytest.param(cls, {way: True}, id=f"{cls.__name__}, {way}")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("cls", "options"), list(optimisers()))
def test_forward_between_backward_and_step(cls, options, training):
    def step(module, x):
        optimiser = cls(module.parameters(), lr=0.1, **options)
        module.train(training)
        module(x).square().mean().backward()
        run(module, x)
        optimiser.step(*([lambda: torch.tensor(0.0)] if cls is torch.optim.LBFGS else []))

    for name in SOME:
        # LBFGS stops where the closure says that nothing is left to do.
        check(name, step, changes=cls is not torch.optim.LBFGS and not training and name != "cascade")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_no_forward_made(name, fused):
    """They came from another process, or from no gradients at all."""

    def step(module, x):
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        run(module, x)
        torch.optim.AdamW(module.parameters(), lr=0.1, fused=fused).step()

    check(name, step)


def test_step_behind_a_compiled_forward():
    def step(module, x):
        compiled = torch.compile(module, backend="aot_eager")
        compiled(x).square().mean().backward()
        run(module, x)
        torch.optim.SGD(module.parameters(), lr=0.5, fused=True).step()

    for name in ("projections", "v2"):
        check(name, step)


def test_compiled_step():
    """The hook is compiled with it, and asks for no second compilation."""
    module, x = make("v2"), image("v2")
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    step = torch.compile(lambda: optimiser.step(), backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            before = run(module, x)
            for p in module.parameters():
                p.grad = torch.ones_like(p)
            step()
            after = run(module, x)
            assert torch.equal(after, run(copy.deepcopy(module), x))
            assert not is_same(after, before)


def test_step_through_a_gradient_scaler():
    def step(module, x):
        scaler = torch.amp.GradScaler("cpu")
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
        scaler.scale(module(x).square().mean()).backward()
        run(module, x)
        scaler.step(optimiser)
        scaler.update()

    check("v2", step)


def test_an_optimiser_of_ones_own():
    class Sign(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data -= 0.01 * p.grad.sign()

    def step(module, x):
        module(x).square().mean().backward()
        run(module, x)
        Sign(module.parameters()).step()

    for name in SOME:
        check(name, step, changes=False)


# --- averages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["SWA", "EMA"])
@pytest.mark.parametrize("name", SOME)
def test_averaged_model(name, average):
    source = make(name)
    averaged, x = AveragedModel(source, multi_avg_fn=average, use_buffers=True).eval(), image(name)
    averaged.update_parameters(source)
    before = run(averaged, x)
    assert caches(averaged)
    with torch.no_grad():
        for p in source.parameters():
            p.mul_(1.5).add_(0.1)
    averaged.update_parameters(source)
    after = run(averaged, x)
    assert torch.equal(after, run(copy.deepcopy(averaged), x))
    assert not is_same(after, before)


def test_statistics_updated_behind_stochastic_weight_averaging():
    def update(module, x):
        SWALR(torch.optim.SGD(module.parameters(), lr=0.1), swa_lr=0.05)
        update_bn([3 * x + 1], module)

    for name in ("one operator", "cascade", "v2"):
        check(name, update)


def test_weights_exchanged_with_their_average_and_back():
    """As libraries of exponential averages do around an evaluation."""
    for name in SOME:
        module, x = make(name), image(name)
        average = [p.detach() * 1.5 for p in module.parameters()]
        expected = run(module, x)
        for _ in range(2):
            for p, a in zip(module.parameters(), average, strict=True):
                p.data, a.data = a.data, p.data
            out = run(module, x)
            assert torch.equal(out, run(copy.deepcopy(module), x))
        assert torch.equal(out, expected)


# --- writes that nobody counts -------------------------------------------------------------------------------------


def weights(module):
    return [p for n, p in module.named_parameters() if p.dim() > 1]


def by_data_in_place(module, x):
    for p in module.parameters():
        p.data.mul_(1.5)


def by_data_assigned(module, x):
    for p in module.parameters():
        p.data = p.data * 1.5


def by_data_copied(module, x):
    torch._foreach_copy_([p.data for p in module.parameters()], [p.detach() * 1.5 for p in module.parameters()])


def by_numpy(module, x):
    for p in module.parameters():
        values = p.detach().numpy()
        values *= 1.5


def by_a_flat_vector(module, x):
    vector_to_parameters(1.5 * nn.utils.parameters_to_vector(module.parameters()).detach(), module.parameters())


def by_statistics(module, x):
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.data.mul_(4)
    for p in module.parameters():  # for modules without norms
        p.data.add_(0.01)


UNCOUNTED = [by_data_in_place, by_data_assigned, by_data_copied, by_numpy, by_a_flat_vector, by_statistics]


@pytest.mark.parametrize("change", UNCOUNTED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_written_uncounted(name, change):
    check(name, change)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dim", [0, 1], ids=["a filter", "an input channel"])
@pytest.mark.parametrize("name", MODULES)
def test_a_row_or_a_column_written_uncounted(name, dim, channels_last):
    """Each weight's first, middle and last in turn: what pruning by hand does."""
    module, x = make(name), image(name)
    if channels_last:
        module.to(memory_format=torch.channels_last)
    for p in weights(module):
        for i in (0, p.shape[dim] // 2, p.shape[dim] - 1):
            run(module, x)
            p.data.select(dim, i).add_(0.5)
            assert torch.equal(run(module, x), run(copy.deepcopy(module), x))


def test_a_dense_write_to_a_large_weight():
    """Of which not every row is compared."""
    module = ours.EfficientFormerAttention(2048, 64, 32, 4, 4).eval()
    x = torch.randn(1, 16, 2048)
    run(module, x)
    (cache,) = caches(module)
    assert (
        cache.fingerprint._contents.sample_size
        <= fold_cache._MAX_ELEMENTS
        < sum(max(p.shape) for p in module.parameters())
    )
    for p in module.parameters():
        before = run(module, x)
        p.data += 0.01
        after = run(module, x)
        assert torch.equal(after, run(copy.deepcopy(module), x))
        assert not torch.equal(after, before) or p is module.attention_biases  # the same for all keys: no difference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_written_uncounted(dtype):
    for name in SOME:
        module, x = make(name).to(dtype), image(name).to(dtype)
        before = run(module, x)
        by_data_in_place(module, x)
        after = run(module, x)
        assert torch.equal(after, run(copy.deepcopy(module), x)) and not torch.equal(after, before)


@pytest.mark.parametrize("dim", [0, 1], ids=["a filter", "an input channel"])
def test_rows_and_columns_of_the_largest_modules_in_use(dim):
    """No element of them may be left out: EfficientFormerV2-L's attention, and an EfficientViT-M5's cascade."""
    for module, x in (
        (ours.EfficientFormerV2Attention(384, 32, 8, 4, 7), torch.randn(1, 384, 7, 7)),
        (ours.CascadedGroupAttention(384, 16, 4, 6, 4, (7, 5, 3, 3)), torch.randn(1, 384, 4, 4)),
    ):
        module.eval()
        randomise_batch_norm(module)
        run(module, x)
        held = sum(max(len(p), p[0].numel()) for _, p in module.named_parameters() if p.dim() > 0)
        assert caches(module)[0].fingerprint._contents.sample_size >= held
        for p in weights(module):
            for i in {0, 1, p.shape[dim] // 2, p.shape[dim] - 1} & set(range(p.shape[dim])):
                run(module, x)
                folds = caches(module)[0]
                p.data.select(dim, i).add_(0.5)
                run(module, x)
                assert caches(module)[0] is not folds


@pytest.mark.parametrize("name", MODULES)
def test_a_fused_step_without_an_optimiser(name):
    """Nobody hears of it; and only every other row has a gradient."""

    def step(module, x):
        for p in module.parameters():
            grad = torch.ones_like(p)
            if p.dim() > 1:
                grad[1::2] = 0
            torch._fused_sgd_(
                [p],
                [grad],
                [],
                weight_decay=0.0,
                momentum=0.0,
                lr=0.2,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
            )

    check(name, step)


# --- weights that are no parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_tensors_in_the_place_of_parameters(name):
    """What a network made of others, as hypernetworks and inner loops have them."""
    module, x = make(name), image(name)
    owners = [(m, n) for m in module.modules() for n, p in m.named_parameters(recurse=False)]
    for owner, part in owners:
        value = getattr(owner, part).detach().clone()
        delattr(owner, part)
        setattr(owner, part, value)
    for change in (lambda value: value * 1.5, lambda value: value.mul_(1.5), lambda value: value.data.mul_(1.5)):
        before = run(module, x)
        for owner, part in owners:
            changed = change(getattr(owner, part))
            if changed is not None:
                setattr(owner, part, changed)
        after = run(module, x)
        assert torch.equal(after, run(copy.deepcopy(module), x)) and not is_same(after, before)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = 2.0

    def forward(self, x):
        return self.gain * x


@pytest.mark.parametrize("name", ["cascade", "efficientformer", "v2", "v2, downsampling"])
def test_a_parametrization_with_a_state_of_its_own(name):
    def change(module, x):
        for part in module.modules():
            if hasattr(part, "attention_biases"):
                torch.nn.utils.parametrize.register_parametrization(part, "attention_biases", Scaled())
                break
        run(module, x)
        scaled = next(m for m in module.modules() if isinstance(m, Scaled))
        before = run(module, x)
        scaled.gain = 7.0
        assert not is_same(run(module, x), before)

    module, x = make(name), image(name)
    run(module, x)
    change(module, x)


def test_what_is_put_on_a_part_afterwards():
    """A method of its own; a probability, for estimates of uncertainty by dropout."""
    for name in SOME:
        module, x = make(name), image(name)
        before = run(module, x)
        for owner, part in adaptable(module):
            conv = getattr(owner, part)
            if isinstance(conv, nn.Conv2d):
                conv._conv_forward = lambda x, w, b, conv=conv: 1.5 * nn.Conv2d._conv_forward(conv, x, w, b)
        after = run(module, x)
        if name != "efficientformer":
            assert not is_same(after, before)
    module, x = make("one operator"), image("one operator")
    module.proj.dropout = nn.Dropout(0.0)
    module.proj.dropout.train()
    run(module, x)
    module.proj.dropout.p = 1.0
    cache = caches(module)[0]
    run(module, x)
    assert caches(module)[0] is not cache


# --- adapters --------------------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(5)
        self.delta = 0.2 * torch.randn(base.weight.shape, generator=generator)

    def forward(self, x):
        if isinstance(self.base, nn.Linear):
            return self.base(x) + nn.functional.linear(x, self.delta)
        b = self.base
        return b(x) + nn.functional.conv2d(x, self.delta, None, b.stride, b.padding, b.dilation, b.groups)


def adaptable(module):
    """(owner, name) of every projection."""
    return [
        (owner, name)
        for owner in module.modules()
        if not isinstance(owner, Adapter)
        for name, part in owner.named_children()
        if type(part) in (nn.Conv2d, nn.Linear)
    ]


@pytest.mark.parametrize("called", [True, False], ids=["called in between", "not called"])
@pytest.mark.parametrize("name", MODULES)
def test_adapter_put_in_merged_and_taken_out(name, called):
    """One layer after the other, at the size of the call before and at another."""
    module, x = make(name), image(name)
    for owner, part in adaptable(module):
        run(module, x)
        adapter = Adapter(getattr(owner, part))
        setattr(owner, part, adapter)
        if called:
            run(module, x)
        adapter.base.weight.data += adapter.delta
        setattr(owner, part, adapter.base)
        merged = run(module, x)
        assert torch.equal(merged, run(copy.deepcopy(module), x))
        adapter.base.weight.data -= adapter.delta
        assert torch.equal(run(module, x), run(copy.deepcopy(module), x))


def test_adapter_seen_by_a_call_of_another_size_only():
    """Weights that are compared element by element could be the same; that something stood in their way is enough."""
    module, small, large = make("projections"), image("one operator"), image("projections")
    run(module, small), run(module, large)
    conv = module.proj.conv
    module.proj.conv = Adapter(conv)
    run(module, large)
    module.proj.conv = conv
    cache = module.__dict__.get(fold_cache._KEY, {})
    run(module, small)
    assert module.__dict__[fold_cache._KEY] is not cache


# --- everything else that changes weights ----------------------------------------------------------------------------


def by_state_dict(module, x):
    module.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in module.state_dict().items()})


def by_state_dict_assigned(module, x):
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state, assign=True)


def by_swapping_tensors(module, x):
    for p in module.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))


def by_conversion_with_swapping(module, x):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)
        module.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def by_pruning(module, x):
    for owner, name in adaptable(module):
        prune.random_unstructured(getattr(owner, name), "weight", amount=0.5)


def by_pruning_for_good(module, x):
    for owner, name in adaptable(module):
        prune.random_unstructured(getattr(owner, name), "weight", amount=0.5)
        prune.remove(getattr(owner, name), "weight")


def by_weight_norm(module, x):
    for owner, name in adaptable(module):
        parametrizations.weight_norm(getattr(owner, name))
        getattr(owner, name).parametrizations.weight.original0.data.mul_(1.5)


def by_new_weights(module, x):
    for owner, name in adaptable(module):
        part = getattr(owner, name)
        part.weight = nn.Parameter(part.weight.detach() * 1.5)


def by_initialisation(module, x):
    for owner, name in adaptable(module):
        nn.init.normal_(getattr(owner, name).weight)


def by_reset(module, x):
    for owner, name in adaptable(module):
        getattr(owner, name).reset_parameters()


def by_inference_mode(module, x):
    with torch.inference_mode():
        for p in module.parameters():
            p.mul_(1.5)


def by_foreach(module, x):
    with torch.no_grad():
        torch._foreach_mul_(list(module.parameters()), 1.5)


def by_a_detached_view(module, x):
    for p in module.parameters():
        p.detach().view(-1)[:1].add_(2.0)


CHANGES = [
    by_state_dict,
    by_state_dict_assigned,
    by_swapping_tensors,
    by_conversion_with_swapping,
    by_pruning,
    by_pruning_for_good,
    by_weight_norm,
    by_new_weights,
    by_initialisation,
    by_reset,
    by_inference_mode,
    by_foreach,
    by_a_detached_view,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", MODULES)
def test_changed(name, change):
    check(name, change)


def test_dynamic_quantisation():
    def quantise(module, x):
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, torch.qint8)

    check("efficientformer", quantise, changes=False)


@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name):
    module, x = make(name), image(name)
    before = run(module, x)
    other = {k: v.detach() * 1.5 for k, v in module.named_parameters()}
    with torch.no_grad():
        out = torch.func.functional_call(module, other, (x,))
    twin = copy.deepcopy(module)
    twin.load_state_dict(other, strict=False)
    assert torch.equal(out, run(twin, x))
    assert torch.equal(run(module, x), before)


@pytest.mark.parametrize("name", SOME)
def test_a_replica_of_data_parallel(name):
    """It is made with all attributes of the module, its cache among them, and other weights."""
    module, x = make(name), image(name)
    run(module, x)

    def replicate(part):
        replica = part._replicate_for_data_parallel()
        assert not replica._parameters
        for name, p in part._parameters.items():
            setattr(replica, name, None if p is None else p.detach() * 1.5)  # no parameter, but an attribute
        replica._modules = {n: None if m is None else replicate(m) for n, m in part._modules.items()}
        return replica

    twin = copy.deepcopy(module)
    by_foreach(twin, x)
    assert torch.equal(run(replicate(module), x), run(twin, x))


@pytest.mark.parametrize("name", MODULES)
def test_a_storage_given_up_and_brought_back(name):
    """As sharded training does between calls; freed memory must not be read."""
    module, x = make(name), image(name)
    expected = run(module, x)
    p = weights(module)[0]
    values, size = p.detach().clone(), p.untyped_storage().size()
    p.untyped_storage().resize_(0)
    owner = next(part for part in module.modules() if part.__dict__.get(fold_cache._KEY))
    assert not caches(module)[0].fingerprint.holds(owner)
    p.untyped_storage().resize_(size)
    p.data.copy_(values)
    assert torch.equal(run(module, x), expected)


# --- what must not cost the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_kept_from_call_to_call(name):
    module, x = make(name), image(name)
    run(module, x)
    first = [dict(cache) for cache in caches(module)]
    run(module, x)
    for before, cache in zip(first, caches(module), strict=True):
        assert before.keys() == cache.keys() and all(cache[k] is v for k, v in before.items())


@pytest.mark.parametrize("name", SOME)
def test_nothing_kept_in_training_mode(name):
    module, x = make(name), image(name)
    module.train()
    run(module, x)
    assert not caches(module)


def test_a_module_is_freed_without_the_garbage_collector():
    for name in MODULES:
        module = make(name)
        run(module, image(name))
        reference = weakref.ref(module)
        gc.disable()
        try:
            del module
            assert reference() is None
        finally:
            gc.enable()


def test_a_part_that_refers_to_the_module_can_be_collected():
    module = make("v2")
    module.proj.__dict__["owner"] = module  # a cycle with whoever keeps the part
    run(module, image("v2"))
    reference = weakref.ref(module)
    del module
    gc.collect()
    assert reference() is None


def test_another_models_steps_do_not_cost_the_cache():
    """A teacher's, in the training of a student: what it holds is compared as a whole, from the first step on."""
    module, x = make("cascade"), image("cascade")
    other = nn.Linear(2, 2)
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1, fused=True)
    other(torch.ones(2)).sum().backward()
    for _ in range(3):
        optimiser.step()
        run(module, x)
    (cache,) = caches(module)
    optimiser.step()
    run(module, x)
    assert caches(module)[0] is cache
    # One number of one weight, which the sample does not look at.
    weight = module.attn.proj[1].conv.weight
    optimiser.step()
    weight.data[0, 1] += 1
    assert torch.equal(run(module, x), run(copy.deepcopy(module), x))
    assert caches(module)[0] is not cache
