"""Kernels as machine code: their instructions, basic blocks, and the shortest way through what a tile takes."""

from __future__ import annotations

import heapq
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path


def cuobjdump() -> str:
    """The toolkit's, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    assert found is not None, "cuobjdump is missing: the CUDA toolkit and triton have it"
    return found


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str  # without the predicate
    predicate: str

    @property
    def op(self) -> str:
        return self.text.split(maxsplit=1)[0]

    @property
    def registers(self) -> list[str]:
        """In the order of the operands: of what computes, the result first."""
        return re.findall(r"\bR\d+\b", self.text)


@dataclass(frozen=True)
class Block:
    instructions: tuple[Instruction, ...]

    def count(self, op: str) -> int:
        """Of instructions whose name begins like this."""
        return sum(i.op.startswith(op) for i in self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)


class Kernel:
    def __init__(self, name: str, instructions: Sequence[Instruction]) -> None:
        self.name = name
        self.instructions = list(instructions)

    @cached_property
    def _starts(self) -> list[int]:
        """Of the basic blocks, as indices of instructions."""
        index = {i.address: n for n, i in enumerate(self.instructions)}
        starts = {0}
        for n, instruction in enumerate(self.instructions):
            if _ends_block(instruction):
                starts.add(n + 1)
            target = _target(instruction)
            if target in index:
                starts.add(index[target])
        return sorted(start for start in starts if start < len(self.instructions))

    @cached_property
    def blocks(self) -> list[Block]:
        ends = [*self._starts[1:], len(self.instructions)]
        return [Block(tuple(self.instructions[a:b])) for a, b in zip(self._starts, ends, strict=True)]

    @cached_property
    def successors(self) -> list[list[int]]:
        of_address = {block.instructions[0].address: n for n, block in enumerate(self.blocks)}
        found = []
        for n, block in enumerate(self.blocks):
            last, following = block.instructions[-1], []
            target = _target(last)
            if target is not None:
                following.append(of_address[target])
            if not (last.op.startswith(("BRA", "EXIT")) and not _is_conditional(last)) and n + 1 < len(self.blocks):
                following.append(n + 1)
            found.append(following)
        return found

    def where(self, wanted: Callable[[Block], bool]) -> list[int]:
        return [n for n, block in enumerate(self.blocks) if wanted(block)]

    def shortest(self, start: int, to: int) -> list[int] | None:
        """The blocks behind ``start`` up to ``to`` with the fewest instructions; a cycle if both are the same."""
        queue, seen = [(len(self.blocks[n]), n, [n]) for n in self.successors[start]], set()
        heapq.heapify(queue)
        while queue:
            length, n, path = heapq.heappop(queue)
            if n == to:
                return path
            if n in seen:
                continue
            seen.add(n)
            for following in self.successors[n]:
                heapq.heappush(queue, (length + len(self.blocks[following]), following, [*path, following]))
        return None

    def cycle(self, *stations: Callable[[Block], bool]) -> list[Block]:
        """The shortest way from a block of the first kind over the others, in order, and back: what a tile takes.

        Branches that are not taken where everything is whole and aligned are longer, or lack what is asked for.
        """
        best: list[int] | None = None

        def go(path: list[int], begin: int, rest: Sequence[Callable[[Block], bool]]) -> None:
            nonlocal best
            if best is not None and self._length(path) >= self._length(best):
                return
            for to in self.where(rest[0]) if rest else [begin]:
                way = self.shortest(path[-1] if path else begin, to)
                if way is None:
                    continue
                if rest:
                    go([*path, *way], begin, rest[1:])
                elif best is None or self._length([*path, *way]) < self._length(best):
                    best = [*path, *way]

        for begin in self.where(stations[0]):
            go([], begin, stations[1:])
        assert best is not None, f"{self.name}: no loop has all of this"
        return [self.blocks[n] for n in best]

    def _length(self, path: Sequence[int]) -> int:
        return sum(len(self.blocks[n]) for n in path)


def _is_conditional(instruction: Instruction) -> bool:
    return bool(instruction.predicate) or re.match(r"BRA\S*\s+!?U?P\d", instruction.text) is not None


def _ends_block(instruction: Instruction) -> bool:
    return instruction.op.startswith(("BRA", "EXIT", "RET", "BRX", "JMP"))


def _target(instruction: Instruction) -> int | None:
    match = re.match(r"BRA\S*\s+(?:!?U?P\d+,\s*)?0x([0-9a-f]+)", instruction.text)
    return int(match[1], 16) if match else None


def kernels(library: Path, arch: str, names: Sequence[str]) -> dict[str, Kernel]:
    """Those with these mangled names."""
    command = [cuobjdump(), "-sass", "-arch", arch, "-fun", ",".join(names), str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text: str) -> dict[str, Kernel]:
    """What cuobjdump -sass says."""
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, body = part.split("\n", 1)
        instructions = [
            Instruction(int(address, 16), code.strip(), predicate.strip())
            for address, predicate, code in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*);", body)
        ]
        found[name] = Kernel(name, instructions)
    return found
