"""What is said of an operator that is measured on a GPU, in a file of its own, and how its cases are made of that.

Images are in a narrow type, weights in float32, as under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks.floor import Work
from benchmarks.gpu.runner import Arguments, Function, GpuCase
from effattn.ops._operator import Operator
from effattn.testing import make_arguments

NARROW = torch.bfloat16
BATCHES = (1, 16, 256)
#: Of a case, the size of every name of the operator's specification, and its options.
Sizes = Mapping[str, Any]


class Shape(NamedTuple):
    """A case of an operator, whatever it is measured for; ``order`` is one of ``effattn.testing.ORDERS``."""

    name: str
    sizes: Sizes
    dtype: torch.dtype = NARROW
    order: str = "first"


@dataclass(frozen=True)
class Measured:
    """An operator that is measured. Functions take the arguments of the specification, tensors and options.

    Args:
        operator: whose kernels.
        ours: what users call.
        peers: of a case, by name, who computes the same; the first is what models have without effattn.
        flops: of a case, of one forward.
        tiny: the smallest of each kind, for who wants no figures.
        smoke: small ones, no multiples of a tile, which take different ways through the kernels; by the form that
            the kernels are tried in, as what stands behind the operator's name: "", or " with ...".
        suite: of its cases; those of training have "-training" behind it.
        title: for readers.
        shapes: of the cases, of real models.
        context: of a case of inference, by name, what is compared with and computes something else.
        main: names of those of its cases that are measured before all others.
        profiled: and of those whose kernels a profiler looks at.
        make: (sizes, dtype, order) -> arguments.
        on_a_gpu: large enough for what a GPU does beside a call, for tests, by form as ``smoke``.
        memory: what the peak of a training step of these may be, in units of plain PyTorch's.
    """

    operator: Operator
    ours: Function
    peers: Callable[[Sizes], Mapping[str, Function]]
    flops: Callable[[Sizes], int]
    tiny: Sequence[Shape]
    smoke: Mapping[str, Sequence[Shape]]
    suite: str
    title: str
    shapes: Sequence[Shape] = ()
    context: Callable[[Sizes], Mapping[str, Function]] = lambda sizes: {}
    main: Sequence[str] = ()
    profiled: Sequence[str] = ()
    make: Callable[[Sizes, torch.dtype, str], list[Any]] | None = None
    on_a_gpu: Mapping[str, Shape] = field(default_factory=dict)
    memory: float = 0.7

    def case(self, shape: Shape, training: bool, dtype: torch.dtype | None = None) -> GpuCase:
        """In the dtype of the shape, or another."""
        operator, sizes, dtype = self.operator, shape.sizes, dtype or shape.dtype
        tensors = operator.signature.num_tensors
        options = [sizes[argument.name] for argument in operator.signature.arguments[tensors:]]
        make = self.make or partial(make_arguments, operator)

        def with_options(functions: Mapping[str, Function]) -> dict[str, Function]:
            return {name: _with(function, options) for name, function in functions.items()}

        def arguments() -> Arguments:
            return make(sizes, dtype, shape.order)[:tensors]

        return GpuCase(
            suite=self.suite + ("-training" if training else ""),
            name=shape.name,
            dtype=dtype,
            sizes={name: size for name, size in sizes.items() if isinstance(size, int)}
            | ({"groups": math.prod(sizes["..."])} if "..." in sizes else {}),
            work=self._work(sizes, training, dtype),
            make=arguments,
            truth=_with(operator.plain, options),
            ours=_with(self.ours, options),
            peers=with_options(self.peers(sizes)),
            context={} if training else with_options(self.context(sizes)),
            training=training,
        )

    def cases(self, training: bool) -> list[GpuCase]:
        return [self.case(shape, training) for shape in self.shapes]

    def _work(self, sizes: Sizes, training: bool, dtype: torch.dtype) -> Work:
        """Elements that are read and written; a training step also reads the output's gradient, and writes the inputs'
        gradients."""
        signature = self.operator.signature
        shapes = [argument.shapes[0] for argument in signature.arguments if argument.is_activation]
        inputs = sum(math.prod(shape.sizes(dict(sizes))) for shape in shapes)
        outputs = math.prod(signature.out.shape.sizes(dict(sizes)))
        elements = 2 * (inputs + outputs) + inputs if training else inputs + outputs
        return Work(bytes=elements * dtype.itemsize, flops=self.flops(sizes) * (3 if training else 1), dtype=dtype)


def _with(function: Function, options: Sequence[Any]) -> Function:
    """A function of tensors alone."""
    return lambda *tensors: function(*tensors, *options)
