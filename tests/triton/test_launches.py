"""The table of launches, what is chosen from it, and the search for faster ones; no kernel runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from effattn._triton import autotune, configs
from effattn._triton.configs import Launch
from effattn.backends.triton import _tuning

GPU = "a GPU"
OP = {"attend": {16: Launch(64, 16), 128: Launch(32, 32, keys=32)}, "multiply": {128: Launch(32, 32, keys=32)}}


TABLES = {
    f"{path.stem} {kernel}": table
    for path in Path(configs.__file__).parent.glob("*.py")
    if "\nLAUNCHES = " in path.read_text()
    for kernel, table in configs.launches(path.stem).items()
}


@pytest.fixture(autouse=True)
def nothing_found_before(monkeypatch):
    by_gpu: dict = {}
    of_files = configs.launches
    monkeypatch.setattr(configs, "launches", lambda op: OP if op == "op" else of_files(op))
    monkeypatch.setattr(configs, "BY_GPU", by_gpu)
    monkeypatch.setattr(autotune, "BY_GPU", by_gpu)


def test_a_size_takes_the_first_entry_that_is_large_enough(monkeypatch):
    small, large = Launch(64), Launch(32)
    monkeypatch.setattr(configs, "launches", {"op": {"kernel": {16: small, 64: large}}}.get)
    found = {size: configs.find("op", "kernel", size) for size in (1, 16, 17, 64, 65, 1000)}
    assert found == {1: small, 16: small, 17: large, 64: large, 65: large, 1000: large}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_entries_are_in_order(table):
    assert list(table) == sorted(table)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_a_tile_is_a_power_of_two(table):
    for launch in table.values():
        for size in (launch.tokens, launch.channels, launch.keys, launch.num_warps):
            assert size is None or size & (size - 1) == 0


def test_split_is_a_function_of_sizes_alone():
    for groups, tokens, tile in ((1, 1, 64), (1, 65536, 64), (3, 1000, 16), (5000, 4096, 32), (0, 0, 16)):
        part, count = configs.split(groups, tokens, tile)
        assert part % tile == 0 and part * count >= tokens and (tokens == 0 or part * (count - 1) < tokens)


def test_neighbours_differ_in_one_thing_and_fit():
    launch = Launch(64, 32, num_warps=4, num_stages=1, keys=32)
    found = list(autotune.neighbours(launch))
    for other in found:
        different = [name for name in vars(launch) if getattr(launch, name) != getattr(other, name)]
        assert len(different) == 1
        assert other.tokens * max(other.channels, other.keys) <= autotune.MAX_ELEMENTS * 32 * other.num_warps
    assert Launch(64, 32, 8, 1, 32) in found and Launch(32, 32, 4, 1, 32) in found and Launch(64, 32, 4, 2, 32) in found
    assert all(other.num_stages > 0 for other in found)
    assert Launch(256, 64, num_warps=2) not in set(autotune.neighbours(Launch(128, 64, num_warps=2)))


def test_tuning_descends_and_remembers():
    """A call that is the faster the more warps it has; one candidate cannot be launched at all."""
    looked_up = []

    def call():
        looked_up.append(configs.find("op", "attend", 64, GPU))

    def seconds(call):
        call()
        if looked_up[-1].keys == 16:
            raise RuntimeError("out of shared memory")
        return 1.0 / looked_up[-1].num_warps

    found = autotune.tune(call, GPU, seconds)
    ((key, launch),) = found.items()
    assert key == ("op", "attend", 128)
    assert launch.num_warps == 8 and configs.find("op", "attend", 64, GPU) == launch
    assert configs.find("op", "attend", 64) != launch, "found for another GPU"
    assert configs.find("op", "multiply", 64, GPU) != launch, "found for another kernel"
    assert autotune.tune(call, GPU, seconds) == {}, "looked for again"


def test_noise_changes_nothing():
    moments = iter([1.0, *[0.99] * 50])
    found = autotune.tune(lambda: configs.find("op", "attend", 8, GPU), GPU, lambda call: next(moments))
    assert list(found.values()) == [OP["attend"][16]]


def test_launches_are_kept_in_a_file(tmp_path):
    file = tmp_path / "launches.json"
    mine = {("op", "attend", 16): Launch(128, 16), ("op", "multiply", 128): Launch(keys=16)}
    configs.BY_GPU[GPU] = dict(mine)
    autotune.write(file)
    configs.BY_GPU.clear()
    autotune.read(file)
    assert {GPU: mine} == configs.BY_GPU
    assert [path.name for path in tmp_path.iterdir()] == ["launches.json"]


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '{"gpu": [{}]}', json.dumps({"gpu": [{"op": "no such", "kernel": "attend", "size": 16}]})],
)
def test_files_of_something_else_are_refused(tmp_path, content):
    file = tmp_path / "launches.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"launches\.json: expected launches that were written here, got"):
        autotune.read(file)


def test_a_file_of_something_else_is_never_written_over(tmp_path, monkeypatch):
    file = tmp_path / "launches.json"
    file.write_text("mine")
    monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, str(file))
    monkeypatch.setattr(_tuning, "_file", None)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected launches that were written here"):
            _tuning.before(lambda: None, torch.device("cpu"), ())
    assert file.read_text() == "mine"
    monkeypatch.setenv(_tuning.ENVIRONMENT_VARIABLE, "")
    assert not _tuning.is_on()
