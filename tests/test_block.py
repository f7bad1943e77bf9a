"""The operator behind whole blocks: programs against float64 on every instruction set, and what is no program.

Also run under sanitizers and, cross-compiled, under emulation; so nothing here compiles or needs a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from random_programs import random_program

from effattn.nn.programs.builder import Builder
from effattn.ops import block as block_op
from effattn.ops._program import parse, takes
from effattn.ops.block import ACTIVATIONS, Block
from effattn.testing import make_image, make_tensor
from effattn.tolerance import check_against

pytestmark = [pytest.mark.numerics, pytest.mark.pairwise]

OPS = torch.ops.effattn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Odd sides; smaller than a kernel; a row, a column; more than a tile.
SIZES = ((9, 13), (1, 1), (1, 17), (29, 2), (40, 61))


def weight(outputs: int, inputs: int, kernel: int = 1, seed: int = 1) -> torch.Tensor:
    """Of a size that keeps activations where they are."""
    flat = make_tensor(outputs, inputs * kernel * kernel, seed=seed) / (inputs * kernel * kernel) ** 0.5
    return flat.unflatten(1, (inputs, kernel, kernel))


def vector(channels: int, seed: int = 2) -> torch.Tensor:
    return make_tensor(1, channels, seed=seed)[0] / 4


class Program:
    """A program in the making; every weight has its own numbers."""

    def __init__(self, channels: int) -> None:
        self.builder, self._seed = Builder(channels), 0

    def convolution(self, value: int, outputs: int, kernel: int = 1, **options) -> int:
        self._seed += 2
        groups = options.get("groups", 1)
        of_group = weight(outputs, self.builder.channels(value) // groups, kernel, self._seed)
        return self.builder.convolution(value, of_group, vector(outputs, self._seed + 1), **options)

    def depthwise(self, value: int, kernel: int, **options) -> int:
        channels = self.builder.channels(value)
        return self.convolution(value, channels, kernel, groups=channels, **options)


def mb_conv(p: Program, channels: int = 24, kernel: int = 3, stride: int = 1, activation: str = "hardswish") -> None:
    value = p.convolution(0, 4 * channels - 1, activation=activation)
    value = p.convolution(p.depthwise(value, kernel, stride=stride, activation=activation), channels)
    if stride == 1:
        assert p.builder.add(value, 0)


def fused_mb_conv(p: Program) -> None:
    value = p.convolution(p.convolution(0, 70, 3, activation="gelu_tanh"), 24)
    assert p.builder.add(value, 0)


def stem(p: Program) -> None:
    value = p.convolution(0, 20, 3, stride=2, activation="relu")
    last = p.convolution(p.depthwise(value, 3, activation="relu6"), 20)
    assert p.builder.add(last, value)
    p.convolution(last, 9, 5, stride=2, activation="silu")


def other_kernels(p: Program) -> None:
    value = p.depthwise(p.convolution(0, 40, 2, stride=2, padding=0), 4, padding=2)
    value = p.depthwise(value, 9, activation="gelu")
    p.convolution(value, 33, 1, stride=2)


def linear_attention(p: Program, dim: int = 16) -> None:
    b = p.builder
    qkv = p.convolution(0, 6 * dim)
    mixed = p.convolution(p.depthwise(qkv, 5), 6 * dim, groups=6)
    out = b.step("linear_attention", (qkv, mixed), channels=4 * dim, head_dim=dim, eps=1e-5)
    assert b.add(p.convolution(out, 24), 0)


def pooling(p: Program) -> None:
    value = p.builder.step("pool_mixer", (0,), (vector(24, 90),), kernel=3)
    value = p.convolution(p.convolution(value, 100, activation="gelu"), 24)
    p.builder.step("layer_norm", (value,), (vector(24, 91), vector(24, 92)), eps=1e-5)


def squeeze_excite(p: Program) -> None:
    b = p.builder
    gate = p.convolution(b.step("mean", (0,)), 7, activation="relu")
    gate = p.convolution(gate, 24, activation="sigmoid")
    p.convolution(b.step("multiply", (0, gate)), 17)


def cascade(p: Program) -> None:
    b, heads, value_dim, key_dim = p.builder, 2, 16, 5
    value = p.convolution(0, heads * value_dim)
    outputs = 2 * key_dim + value_dim
    weights = (
        torch.stack([weight(outputs, value_dim, seed=60 + i).flatten(1) for i in range(heads)]),
        torch.stack([vector(outputs, 70 + i) for i in range(heads)]),
        weight(key_dim, 1, 5, seed=80),
        weight(key_dim, 1, 3, seed=81),
        torch.stack([vector(key_dim, 84 + i) for i in range(heads)]),
        make_tensor(heads, 20, 20, seed=86),
    )
    out = b.step(
        "cascade", (value,), weights, head_dim=key_dim, kernels=(5, 3), window=(4, 5), scale=0.4, activation="relu"
    )
    assert b.add(p.convolution(out, 24), 0)


PROGRAMS: dict[str, Callable[[Program], None]] = {
    "MBConv": mb_conv,
    "MBConv, stride 2": lambda p: mb_conv(p, kernel=5, stride=2, activation="gelu"),
    "MBConv, kernel 7": lambda p: mb_conv(p, kernel=7, activation="silu"),
    "FusedMBConv": fused_mb_conv,
    "stem": stem,
    "other kernels": other_kernels,
    "linear attention": linear_attention,
    "linear attention, wide": lambda p: linear_attention(p, 32),
    "pooling": pooling,
    "squeeze-excite": squeeze_excite,
    "cascade": cascade,
}


def make(name: str) -> Block:
    p = Program(24)
    PROGRAMS[name](p)
    return p.builder.finish()


def attention(size: tuple[int, int], form: str) -> Block:
    """Softmax attention for images of a size; ``form``: "joined", "apart", "halved" or "talking"."""
    p = Program(24)
    b, heads, key_dim, value_dim = p.builder, 3, 7, 20
    keys, values = heads * 16, heads * 32
    queries = tokens = size[0] * size[1]
    options = {"heads": heads, "head_dim": key_dim, "value_dim": value_dim, "scale": 0.3, "channels": values}

    def projected(value: int, dims: Sequence[int], seed: int) -> int:
        """Zeros behind the channels of every head."""
        rows = []
        for i, dim in enumerate(dims):
            whole = -(-dim // 16) * 16
            of_heads = torch.zeros(heads, whole, 24)
            of_heads[:, :dim] = make_tensor(heads, dim, 24, seed=seed + i) / 24**0.5
            rows.append(of_heads.flatten(0, 1))
        return b.convolution(value, torch.cat(rows).unsqueeze(-1).unsqueeze(-1), None)

    inputs: tuple[int, ...]
    mix: tuple[torch.Tensor, ...] = ()
    if form == "joined":
        inputs = (projected(0, (key_dim, key_dim, value_dim), 10),)
    elif form == "halved":
        halved = p.depthwise(0, 3, stride=2)
        queries = -(-size[0] // 2) * -(-size[1] // 2)
        inputs = tuple(projected(v, (d,), 20 + i) for i, (v, d) in enumerate([(halved, 7), (0, 7), (0, 20)]))
        options["addend"] = b.convolution(inputs[2], weight(values, 1, 3, 30), None, stride=2, groups=values)
    else:
        inputs = (projected(0, (key_dim, key_dim), 40), projected(0, (value_dim,), 50))
        options["activation"] = "gelu"
    if form == "talking":
        mixing = (make_tensor(heads, heads, seed=seed) for seed in (60, 62))
        mix = tuple(t for i, matrix in enumerate(mixing) for t in (matrix, vector(heads, 61 + 2 * i)))
        options["addend"] = b.convolution(inputs[1], weight(values, 1, 3, 64), None, groups=values)
    bias = make_tensor(heads, queries, tokens, seed=70)
    out = b.step(
        "attention", inputs, (bias, *mix), queries=queries, keys=tokens, talking_heads=int(bool(mix)), **options
    )
    if form == "talking":
        out = b.step("upsample", (out,))
    p.convolution(out, 24)
    assert keys == b.channels(inputs[0]) or form in ("joined", "apart", "talking")
    return b.finish()


def image(batch: int, size: tuple[int, int], memory_format: str = "nchw", dtype: torch.dtype = torch.float32):
    return make_image(batch, 24, *size, memory_format).to(dtype)


def check(x: torch.Tensor, of: Block) -> None:
    longest = max(step.kernel**2 * 300 for step in parse(of.program))
    truth = {"out": lambda: block_op.plain(x.double(), [of.weights.double()], of.program)}
    check_against(lambda: {name: f() for name, f in truth.items()}, {"out": block_op.block(x, of)}, longest)


@pytest.mark.remainders
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", ["nchw", "channels_last"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PROGRAMS)
def test_against_float64(isa, name, size, memory_format, dtype):
    if name == "other kernels":  # which leave nothing of a pixel
        size = (max(size[0], 2), max(size[1], 2))
    check(image(2, size, memory_format, dtype), make(name))


@pytest.mark.parametrize("memory_format", ["nchw", "channels_last"])
@pytest.mark.parametrize("size", [(3, 5), (7, 7)])
@pytest.mark.parametrize("form", ["joined", "apart", "halved", "talking"])
def test_softmax_attention_against_float64(isa, form, size, memory_format):
    check(image(2, size, memory_format), attention(size, form))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(7, 7), (23, 46), (90, 70)])
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.schedule
def test_same_bits_for_every_thread_count(name, size, batch):
    x, of = image(batch, size), make(name)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(block_op.block(x, of))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, results[0]) for other in results)


def test_images_of_a_batch_do_not_meet(isa):
    x, of = image(3, (9, 11)), make("MBConv")
    whole = block_op.block(x, of)
    for i in range(3):
        assert torch.equal(whole[i : i + 1], block_op.block(x[i : i + 1].clone(), of))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_come_out_as_in_torch(isa, value):
    x, of = image(2, (9, 9)), make("stem")
    x[1, 3, 4, 5] = value
    expected = block_op.plain(x, [of.weights], of.program)
    out = block_op.block(x, of)
    assert out[0].isfinite().all()
    assert torch.equal(out.isfinite(), expected.isfinite())


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS])
def test_activations_everywhere(isa, name):
    """Where they bend, far out, and at numbers that are none; a whole vector and a part of one."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-3.0, 3.0, 0.0, -0.0, 6.0, 1e4, -1e4, 1e30, -1e30])])
    special = torch.tensor([math.inf, -math.inf, math.nan])
    for given in (x, special):
        b = Builder(1)
        b.convolution(0, torch.ones(1, 1, 1, 1), None, activation=name)
        of = b.finish()
        out = block_op.block(given.reshape(1, 1, 1, -1), of).flatten()
        expected = ACTIVATIONS[name](given.double())
        if given is special:
            torch.testing.assert_close(out, expected.float(), equal_nan=True)
            continue
        error = (out - expected).abs()
        assert (error <= 2e-6 + 4e-7 * expected.abs()).all(), given[error.argmax()]


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_nothing_is_left_of_an_empty_image(size):
    with pytest.raises(RuntimeError, match="expected a larger image"):
        block_op.block(torch.ones(1, 24, *size), make("MBConv"))


def test_empty_batch(isa):
    assert block_op.block(torch.ones(0, 24, 5, 7), make("MBConv, stride 2")).shape == (0, 24, 3, 4)


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 33, 48])
def test_every_number_of_channels(isa, channels):
    b = Builder(channels)
    value = b.convolution(0, weight(channels + 1, channels, 3), vector(channels + 1), activation="relu")
    b.convolution(value, weight(2 * channels, channels + 1), vector(2 * channels))
    of = b.finish()
    x = make_image(1, channels, 10, 8)
    check_against(
        lambda: {"out": block_op.plain(x.double(), [of.weights.double()], of.program)},
        {"out": block_op.block(x, of)},
        9 * channels,
    )


def test_many_blocks_in_a_row(isa):
    """Values take the memory of others that nobody reads any more, but never that of what is added to them."""
    p = Program(24)
    value = 0
    for i in range(12):
        wide = p.convolution(value, 60, activation="relu")
        out = p.convolution(p.depthwise(wide, 3), 24)
        assert p.builder.add(out, value)
        value = p.depthwise(out, 3) if i % 3 == 2 else out
    check(image(1, (9, 10)), p.builder.finish())


@pytest.mark.parametrize("transform", ["crop", "transposed", "expanded"])
def test_any_strides(isa, transform):
    of = make("MBConv")
    x = image(2, (12, 12))
    view = {
        "crop": lambda: x[:, :, 1:8, 2:9],
        "transposed": lambda: x.transpose(2, 3),
        "expanded": lambda: x[:1].expand(2, -1, -1, -1),
    }[transform]()
    assert torch.equal(block_op.block(view, of), block_op.block(view.contiguous(), of))


# --- what is wrong ---------------------------------------------------------------------------------------------

IMAGE = "%0 = image(channels=16)\n"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("", "expected an image and a step"),
        (IMAGE, "expected an image and a step"),
        ("%0 = picture(channels=16)\n%1 = mean(%0)", "line 1: expected %0 = image"),
        (IMAGE + "%2 = mean(%0)", "line 2: expected value %1"),
        (IMAGE + "%1 = mean(%1)", "line 2: %1 is no value so far"),
        (IMAGE + "%1 = mean(%7)", "%7 is no value so far"),
        (IMAGE + "%1 = mean(%-1)", "%-1 is no value so far"),
        (IMAGE + "%1 = mean()", "expected 1 to 1 inputs"),
        (IMAGE + "%1 = mean(%0, %0)", "expected 1 to 1 inputs"),
        (IMAGE + "%1 = winograd(%0)", "unknown operation 'winograd'"),
        (IMAGE + "%1 = mean(%0", "expected ','"),
        (IMAGE + "%1 = mean(%0))", "expected nothing more"),
        (IMAGE + "%1 = mean %0", "expected '('"),
        (IMAGE + "%1 = convolution(%0)", "expected channels"),
        (IMAGE + "%1 = convolution(%0, channels=0)", "expected channels from 1"),
        (IMAGE + "%1 = convolution(%0, channels=99999999999999999999)", "expected a number"),
        (IMAGE + "%1 = convolution(%0, channels=-4)", "expected channels from 1"),
        (IMAGE + "%1 = convolution(%0, channels=4, kernel=99)", "expected kernel from 1 to"),
        (IMAGE + "%1 = convolution(%0, channels=4, stride=3)", "expected stride from 1 to 2"),
        (IMAGE + "%1 = convolution(%0, channels=4, kernel=3, padding=3)", "expected a padding below the kernel"),
        (IMAGE + "%1 = convolution(%0, channels=16, groups=2)", "a multiple of 16"),
        (IMAGE + "%1 = convolution(%0, channels=4, activation=tanh)", "unknown activation 'tanh'"),
        (IMAGE + "%1 = convolution(%0, channels=4, size=3)", "unknown option 'size'"),
        (IMAGE + "%1 = convolution(%0, channels=4, residual=%0)", "expected %0 to have 4 channels"),
        (IMAGE + "%1 = mean(%0, residual=%0)", "expected no residual"),
        (IMAGE + "%1 = depthwise(%0, channels=17)", "expected channels=16"),
        (IMAGE + "%1 = convolution(%0, channels=16, addend=%0)", "expected no addend"),
        (IMAGE + "%1 = pool_mixer(%0, kernel=2)", "expected an odd kernel"),
        (IMAGE + "%1 = layer_norm(%0, eps=-1)", "expected eps"),
        (IMAGE + "%1 = layer_norm(%0, eps=nan)", "finite float32"),
        (IMAGE + "%1 = layer_norm(%0, eps=1e99)", "finite float32"),
        (IMAGE + "%1 = linear_attention(%0, head_dim=8, eps=0)", "expected a head_dim, a multiple of 16"),
        (IMAGE + "%1 = linear_attention(%0, head_dim=16, eps=0)", "that goes into 16 / 3"),
        (IMAGE + "%1 = attention(%0, heads=1)", "expected heads, head_dim"),
        (
            IMAGE + "%1 = attention(%0, heads=1, head_dim=16, value_dim=16, queries=4, keys=9, scale=1)",
            "expected q of its own",
        ),
        (
            IMAGE + "%1 = attention(%0, heads=1, head_dim=16, value_dim=16, queries=4, keys=4, scale=1)",
            "expected %0 to have 48 channels",
        ),
        (IMAGE + "%1 = cascade(%0, head_dim=16, window=2x2)", "expected kernels"),
        (IMAGE + "%1 = cascade(%0, head_dim=16, kernels=3x4, window=2x2)", "expected odd kernels"),
        (IMAGE + "%1 = cascade(%0, head_dim=16, kernels=3x3, window=2x2)", "a multiple of 16"),
        (IMAGE + "%1 = cascade(%0, head_dim=16, kernels=3, window=9999x2)", "expected window from 1"),
        (IMAGE + "%1 = convolution(%0, channels=65536, kernel=31)\n" * 1, "expected shape"),
    ],
)
def test_malformed_programs(program, message):
    with pytest.raises(RuntimeError, match="block: ") as error:
        OPS.block(torch.ones(1, 16, 4, 4), [torch.ones(3)], program)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w: (x[0], w), "x: expected 4 dimensions"),
        (lambda x, w: (x[:, :5], w), "x: expected 24 channels, got 5"),
        (lambda x, w: (x.double(), w), "x: expected float32, bfloat16 or float16"),
        (lambda x, w: (x, []), "weights: expected 1 tensor, got 0"),
        (lambda x, w: (x, [w[0], w[0]]), "weights: expected 1 tensor, got 2"),
        (lambda x, w: (x, [w[0][:-1]]), "weights[0]: expected shape"),
        (lambda x, w: (x, [w[0].double()]), "weights[0]: expected float32"),
        (lambda x, w: (x, [w[0].unsqueeze(0)]), "weights[0]: expected shape"),
    ],
)
def test_wrong_arguments(change, message):
    of = make("MBConv")
    x, weights = change(image(1, (5, 5)), [of.weights])
    with pytest.raises(RuntimeError) as error:
        OPS.block(x, weights, of.program)
    assert message in str(error.value)


def test_an_attention_takes_images_of_one_size():
    of = attention((3, 5), "joined")
    with pytest.raises(RuntimeError, match=r"expected %1 to have 15 pixels, got 4 x 4"):
        block_op.block(image(1, (4, 4)), of)
    assert not takes(of.program, 24, 4, 4) and takes(of.program, 24, 3, 5)


def test_residuals_of_other_sizes():
    p = Program(24)
    value = p.convolution(0, 24, 3, stride=2)
    assert p.builder.add(value, 0)
    of = p.builder.finish()
    with pytest.raises(RuntimeError, match="expected %0 to be 3 x 3, got 5 x 5"):
        block_op.block(image(1, (5, 5)), of)


def test_text_and_back():
    for name in PROGRAMS:
        program = make(name).program
        assert "\n".join(step.text(i) for i, step in enumerate(parse(program))) == program


@pytest.mark.schedule
def test_any_program(isa, request):
    """With any number of threads the same bits, and those of the plain formulation up to rounding."""
    of_tier = 1000 if request.config.getoption("--full") else 40
    computed, before = 0, torch.get_num_threads()
    for seed in range(of_tier):
        of, x = random_program(seed)
        results = []
        try:
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(block_op.block(x, of))
        except RuntimeError as error:  # nothing is left of the image, or a residual has another size
            assert "expected" in str(error) and not takes(of.program, *x.shape[1:])
            continue
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(other, results[0]) for other in results), of.program
        truth = block_op.plain(x.double(), [of.weights.double()], of.program)
        apart, unavoidable = ((out - truth).norm() for out in (results[0], block_op.plain(x, [of.weights], of.program)))
        assert apart <= 2e-6 * truth.norm() + 5 * unavoidable, (of.program, x.shape)
        computed += 1
    assert computed > of_tier // 2
