"""What an error of a launch says: of which operator, sizes and kernel, and what ran before."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HEADER = Path(__file__).resolve().parents[2] / "kernels" / "cuda" / "core" / "launch_record.h"
PROGRAM = """
#include <cstdio>
#include <thread>
#include "{header}"

using namespace effattn::cuda;

void record(const char* function, int64_t blocks) {{
  const char* const parameters = "LaunchRecord record(const void*, const Grid&) [with Parameters = Tokens; more]";
  last_launches().add({{current_call(), nullptr, parameters, blocks, 1024, 128, 2}});
}}

int main() {{
  const auto print = [] {{
    const LaunchRecord last = last_launches().last(), before = last_launches().before();
    const char* const error = "an illegal memory access was encountered";
    std::puts(failed_launch(error, launches_are_waited_for(), last, "attend<float>", before, "").c_str());
  }};
  print();
  current_call() = {{"/some/where/csrc/one_attention.cpp",
                    "Tensor effattn::{{anonymous}}::inference(const Tensor&)", "bfloat16", 4, {{1, 16, 8192, 16}}}};
  record("inference", 12);
  std::thread([] {{  // a backward's, which knows nothing of the other thread's call
    record("nobody's", 1);
    current_call() = {{"another_attention.cpp", "backward(const Tensor&)", "float32", 9, {{1, 2, 3, 4, 5, 6}}}};
    record("backward", 34);
  }}).join();
  print();
  record("again", 56);
  print();
  current_call() = {{"a_third.cpp", "forward(const Tensor&)", "float16", 2, {{7, 8}}}};
  std::puts(failed_call("a device: no memory", launches_are_waited_for(), current_call(), last_launches().last(),
                        "attend<float>").c_str());
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launches")
    (folder / "program.cpp").write_text(PROGRAM.format(header=HEADER))
    command = [os.environ.get("CXX", "g++"), "-std=gnu++20", "-Wall", "-Wextra", "-pthread"]
    done = subprocess.run([*command, "program.cpp", "-o", "program"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stderr, done.stderr
    return folder / "program"


def printed(program, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("EFFATTN_CUDA_SYNC", "CUDA_LAUNCH_BLOCKING")}
    return subprocess.run(
        [program], capture_output=True, text=True, check=True, env={**inherited, **environment}
    ).stdout


def test_an_error_says_where_it_comes_from(program):
    nothing, backward, inference, before_a_launch = printed(program).splitlines()
    assert "of none; the launch before it was none" in nothing
    assert backward.startswith(
        "effattn: an illegal memory access was encountered, "
        "of another_attention, backward, float32 (1, 2, 3, 4, 5, 6, ...): "
        "attend<float>, 34 blocks of 128 threads in clusters of 2, 1024 bytes of shared memory; "
        "the launch before it was a call that nobody described: the kernel of Tokens, 1 blocks"
    )
    assert "of one_attention, inference, bfloat16 (1, 16, 8192, 16): attend<float>, 56 blocks" in inference
    assert "the launch before it was another_attention, backward, float32" in inference
    assert inference.endswith("EFFATTN_CUDA_SYNC=1 tells of which")
    assert before_a_launch.startswith(
        "effattn: a device: no memory, in a_third, forward, float16 (7, 8); "
        "the launch before it was one_attention, inference, bfloat16 (1, 16, 8192, 16): attend<float>, 56"
    )
    assert before_a_launch.endswith("EFFATTN_CUDA_SYNC=1 tells of which")


@pytest.mark.parametrize("name", ["EFFATTN_CUDA_SYNC", "CUDA_LAUNCH_BLOCKING"])
def test_where_launches_are_waited_for_it_is_that_one(program, name):
    assert "tells of which" not in printed(program, **{name: "1"})
    assert "tells of which" in printed(program, **{name: "0"})
