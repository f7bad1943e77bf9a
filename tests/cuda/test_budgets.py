"""What the main kernels' inner loops take, read from the machine code for sm_90a: a budget an instance.

A budget is what a count without the compiler predicts, plus what addresses take; what was before and what changed it
is in benchmarks/NOTES.md. They are for the code that runs where everything is whole and aligned.
"""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from machine_code import Block, Kernel, cuobjdump, kernels

from effattn import _library

LIBRARY = _library.library_path.with_name("libeffattn_cuda.so")
ARCH = "sm_90a"

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists() and shutil.which("nvcc") is None,
    reason="no nvcc here, so there are no CUDA kernels to look at",
)


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, int]]:
    """By mangled name, what a thread takes."""
    command = [cuobjdump(), "-res-usage", "-arch", ARCH, str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text)
    return {name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for name, line in found}


@pytest.fixture(scope="module")
def named(usage):
    """The one kernel whose name and template arguments these are."""

    def find(name: str, *arguments: str) -> tuple[Kernel, int]:
        pattern = f"{len(name)}{name}I" + "".join(arguments) + "E"
        matching = [kernel for kernel in usage if pattern in kernel]
        assert len(matching) == 1, (pattern, matching)
        (kernel,) = kernels(LIBRARY, ARCH, matching).values()
        return kernel, usage[matching[0]]["REG"]

    return find


BF16, FP16 = "NS_8BFloat16E", "NS_7Float16E"


def number(n: int) -> str:
    return f"Li{n}E"


def flag(value: bool) -> str:
    return f"Lb{int(value)}E"


def has(**least: int):
    """Whether a block has so many instructions of each kind; a double underscore is a dot."""
    return lambda block: all(block.count(op.replace("__", ".")) >= n for op, n in least.items())


def length(blocks: list[Block]) -> int:
    return sum(map(len, blocks))


def count(blocks: list[Block], op: str) -> int:
    return sum(block.count(op) for block in blocks)


@pytest.mark.parametrize("token_major", [False, True], ids=["channel_major", "token_major"])
@pytest.mark.parametrize(
    ("dtype", "channels", "instructions", "products", "registers"),
    [
        pytest.param(BF16, 32, 450, 80, 168, id="bfloat16-32"),  # 2700 before; predicted 390
        pytest.param(BF16, 16, 260, 24, 128, id="bfloat16-16"),
        pytest.param(FP16, 32, 700, 160, 208, id="float16-32"),
    ],
)
def test_attend_64_tokens(named, dtype, channels, instructions, products, registers, token_major):
    """Of linear attention: products with both parts of the state, division, the next tile's loads, stores."""
    kernel, used = named("attend", dtype, number(channels), flag(token_major), flag(True))
    tile = kernel.cycle(has(HMMA=8), has(LDG__E=2), has(STG__E=2))
    assert count(tile, "HMMA") == products
    assert length(tile) <= instructions
    assert used <= registers


@pytest.mark.parametrize("token_major", [False, True], ids=["channel_major", "token_major"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
def test_sums_ask_for_the_next_keys_and_values_before_they_use_these(named, dtype, token_major):
    """32 tokens of 32 channels: 16 bytes a load where memory has them side by side, all of k and v in flight."""
    kernel, used = named("accumulate_kv_state", dtype, number(32), flag(token_major), "LNS1_7VariantE1E")
    loads = 8 if token_major else 4
    width = "LDG.E.64" if token_major else "LDG.E.128"
    load = lambda block: block.count(width) >= loads  # noqa: E731
    step = kernel.cycle(load, load, has(HMMA=20), load, load, has(HMMA=20))
    assert count(step, width) == 4 * loads
    in_order = [i for block in step for i in block.instructions]
    loaded: set[str] = set()
    # The cycle begins behind the first station, whose loads are the last of it: here come those of v.
    for instruction in in_order[: next(n for n, i in enumerate(in_order) if i.op.startswith("HMMA"))]:
        registers = instruction.registers
        assert not loaded & set(registers[1:]), instruction
        if instruction.op.startswith(width):
            first = int(registers[0].removeprefix("R"))
            loaded |= {f"R{first + n}" for n in range(int(width[-3:].strip(".")) // 32)}
    assert len(loaded) == 16, "words of v, a lane"
    assert length(step) <= 2 * (160 if token_major else 110)
    assert used <= 168


@pytest.mark.parametrize("slot", [16, 32, 64])
def test_a_product_of_the_cascade(named, slot):
    """A 16 x 16 x 16 step in two parts each: 8 products; 212 instructions for half of it before."""
    kernel, used = named("small_windows", BF16, number(slot))
    projection = kernel.cycle(has(LDSM=4, HMMA=8))
    steps = count(projection, "HMMA") / 8
    assert length(projection) / steps <= 40
    loop = kernel.cycle(has(LDSM__16__MT88=2, HMMA=8))
    assert count(loop, "HMMA") == 8 * slot / 16
    assert used <= 168


@pytest.mark.parametrize(("kernel_size", "instructions"), [(5, 700), (3, 560)])
def test_a_tile_of_multi_scale(named, kernel_size, instructions):
    """16 x 8 pixels of k and of v: staged, convolved, mixed, multiplied; 1665 before for each."""
    kernel, used = named("accumulate_kv_state_narrow", BF16, number(16), number(kernel_size))
    taps = 8 * kernel_size**2
    tile = kernel.cycle(
        *[has(FFMA=taps), has(LDGSTS=1), has(LDSM=4, HMMA=8)],
        *[has(FFMA=taps), has(LDGSTS=1), has(LDSM=4, HMMA=8), has(HMMA=12)],
    )
    vectors = 16 * (8 + kernel_size - 1) * 4 // 256  # of 8 pixels, a thread, and for some one more
    assert count(tile, "LDGSTS") >= 2 * vectors
    assert length(tile) <= 2 * instructions
    assert used <= 128


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(("kernel_size", "instructions"), [(5, 700), (3, 535)])
def test_queries_of_multi_scale(named, kernel_size, instructions, channels_last):
    """16 x 8 pixels: staged, convolved, mixed, multiplied with the state, divided, stored; 882 before."""
    kernel, used = named("attend_narrow_tiles", BF16, number(16), number(kernel_size), flag(channels_last))
    mixing, last_product = has(LDSM=4, HMMA=8), lambda block: block.count("HMMA") == 8 and block.count("LDSM") == 2
    stores = [lambda block: block.count("STG") == 1 and block.count("F2FP") == 1] * 4
    tile = kernel.cycle(has(FFMA=8 * kernel_size**2), has(LDGSTS=1), mixing, last_product, *stores)
    assert count(tile, "STG") == 4
    assert count(tile, "LDGSTS") >= 16 * (8 + kernel_size - 1) * 4 // 256
    assert count(tile, "HMMA") == (20 if channels_last else 24)
    assert length(tile) <= instructions
    assert used <= 80
