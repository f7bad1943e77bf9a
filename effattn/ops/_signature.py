"""Signatures: what an operator takes and returns, as a text. csrc/build.py makes tables of it for csrc/signature.h.

A line an argument, ``name kind (shape)``, then ``->`` and what is returned: the output, then, in float32, what is kept
for the backward:

    q        tensor (..., N, D)
    bias     weight (heads, N, M)
    weights  weights[heads] (2 * key_dim + d, d, 1, 1)
    eps      number >= 0
    ->
    out      (..., N, D)
    kv_state (..., D + 1, D)

Kinds of arguments:

- ``tensor``, ``image``: of one dtype, which is the output's; images (B, C, H, W) have rows that follow each other
- ``weight``, ``weight?``, ``weights[n]``, ``weights[n]?``: float32, one or a list of n, which may be missing where
  there is a ``?``. Several shapes are those of the list's elements in turn. Operators take None for an empty list.
- ``integer >= 1``, ``integer 1..32767``, ``number``, ``number >= 0``, ``numbers[n]``: options; numbers are finite in
  float32

An output that the backward takes too is ``out kept (shape)``: callers then get all that is returned, and there is no
operator for inference. ``out alone (shape)`` is that of an operator for inference alone.

A name in a shape or a length stands for one size everywhere; each element of a list may have its own if the name stands
nowhere else. ``odd k`` and ``positive k`` say more. Sizes are found from integers, lengths of lists, then shapes, in
order; a product with one unknown name is solved for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

#: A sum of products: (factor, names) each.
Sum = tuple[tuple[int, tuple[str, ...]], ...]
_IN_KERNELS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_FLOAT = torch.finfo(torch.float32).max
_TOKENS = re.compile(r"\d+|\w+|[()+*]")


@dataclass(frozen=True)
class Dim:
    """One size of a shape."""

    text: str
    sum: Sum
    needs: str = ""  # "odd", "positive" or nothing

    @classmethod
    def of(cls, text: str) -> Dim:
        needs = text.split()[0] if text.startswith(("odd ", "positive ")) else ""
        text = text.removeprefix(needs).strip()
        tokens = _TOKENS.findall(text)
        return cls(text, _parsed_sum(tokens), needs)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, names in self.sum for name in names))

    def value(self, sizes: dict[str, Any]) -> Any:
        """None where a name has no size yet."""
        total: Any = 0
        for factor, names in self.sum:
            product: Any = factor
            for name in names:
                if name not in sizes:
                    return None
                product = product * sizes[name]
            total = product + total
        return total

    def solve(self, size: Any, sizes: dict[str, Any]) -> None:
        """Finds the one name without a size, if this is a product."""
        if len(self.sum) != 1:
            return
        factor, names = self.sum[0]
        unknown = [name for name in names if name not in sizes]
        if len(unknown) != 1:
            return
        known: Any = factor
        for name in names:
            if name != unknown[0]:
                known = known * sizes[name]
        if len(names) == 1 and factor == 1:
            sizes[unknown[0]] = size
        elif known > 0 and size % known == 0:
            sizes[unknown[0]] = size // known


def _parsed_sum(tokens: list[str]) -> Sum:
    total = _parsed_product(tokens)
    while tokens and tokens[0] == "+":
        del tokens[0]
        total += _parsed_product(tokens)
    return total


def _parsed_product(tokens: list[str]) -> Sum:
    product: Sum = ((1, ()),)
    while True:
        token = tokens.pop(0)
        if token == "(":
            factor = _parsed_sum(tokens)
            del tokens[0]
        else:
            factor = ((int(token), ()),) if token.isdigit() else ((1, (token,)),)
        product = tuple((a * b, m + n) for a, m in product for b, n in factor)
        if not tokens or tokens[0] != "*":
            return product
        del tokens[0]


@dataclass(frozen=True)
class Shape:
    """``(B, C, H, W)``, or with any leading sizes."""

    text: str
    dims: tuple[Dim, ...]
    has_leading: bool

    @classmethod
    def of(cls, text: str) -> Shape:
        parts = [part.strip() for part in text[1:-1].split(", ")]
        has_leading = parts[0] == "..."
        dims = tuple(Dim.of(part) for part in parts[has_leading:])
        shown = ", ".join(["..."] * has_leading + [dim.text for dim in dims])
        return cls(f"({shown})", dims, has_leading)

    @property
    def names(self) -> Iterable[str]:
        return (name for dim in self.dims for name in dim.names)

    def wrong_rank(self, shape: Sequence[Any]) -> str | None:
        if self.has_leading:
            fits, expected = len(shape) >= len(self.dims), f"at least {len(self.dims)} dimensions"
        else:
            fits = len(shape) == len(self.dims)
            expected = f"{len(self.dims)} dimension{'s' * (len(self.dims) != 1)}"
        return None if fits else f"expected {expected} {self.text}, got shape {_shown(shape)}"

    def solve(self, shape: Sequence[Any], sizes: dict[str, Any]) -> None:
        if self.has_leading and "..." not in sizes:
            sizes["..."] = tuple(shape[: len(shape) - len(self.dims)])
        for dim, size in zip(self.dims, shape[len(shape) - len(self.dims) :], strict=True):
            dim.solve(size, sizes)

    def wrong_sizes(self, shape: Sequence[Any], sizes: dict[str, Any]) -> str | None:
        own = shape[len(shape) - len(self.dims) :]
        for dim, size in zip(self.dims, own, strict=True):
            if dim.needs == "odd" and size % 2 != 1:
                return f"expected an odd {dim.text} in {self.text}, got shape {_shown(shape)}"
            if dim.needs == "positive" and size < 1:
                return f"expected a positive {dim.text} in {self.text}, got shape {_shown(shape)}"
        fits = not self.has_leading or tuple(shape[: len(shape) - len(self.dims)]) == sizes["..."]
        for dim, size in zip(self.dims, own, strict=True):
            value = dim.value(sizes)
            fits = fits and value is not None and value == size
        if fits:
            return None
        known = [f"... = {_shown(sizes['...'])}"] if self.has_leading else []
        known += [f"{name} = {sizes[name]}" for name in dict.fromkeys(self.names) if name in sizes]
        return f"expected shape {self.text}{' with ' + ', '.join(known) if known else ''}, got {_shown(shape)}"

    def sizes(self, sizes: dict[str, Any]) -> tuple[Any, ...]:
        return *(sizes["..."] if self.has_leading else ()), *(dim.value(sizes) for dim in self.dims)


@dataclass(frozen=True)
class Argument:
    """One line of a signature."""

    name: str
    kind: str
    shapes: tuple[Shape, ...] = ()
    length: Dim | None = None  # of a list
    may_be_empty: bool = False
    minimum: float = -math.inf
    maximum: float = math.inf

    @property
    def is_list(self) -> bool:
        return self.length is not None

    @property
    def is_activation(self) -> bool:
        """Whether it has the dtype of the output."""
        return self.kind in ("tensor", "image")

    @property
    def is_option(self) -> bool:
        return self.kind in ("integer", "number", "numbers")

    def elements(self, given: Any) -> list[tuple[str, Any, Shape]]:
        """Its tensors, each with its name and its shape as declared."""
        if not self.is_list:
            return [(self.name, given, self.shapes[0])] if given is not None or not self.may_be_empty else []
        return [(f"{self.name}[{i}]", t, self.shapes[i % len(self.shapes)]) for i, t in enumerate(given)]


@dataclass(frozen=True)
class Returned:
    """One line behind the arrow."""

    name: str
    shape: Shape
    kind: str  # "kept", "alone" or nothing


class Signature:
    """A parsed signature.

    Attributes:
        arguments: all of them, options last.
        num_activations: how many leading arguments have the dtype of the output.
        num_tensors: how many leading arguments are tensors or lists of them.
        out: the output, in the memory order of the first argument.
        kept: what the backward needs beside the arguments and the output, in float32.
    """

    def __init__(self, text: str) -> None:
        taken, returned = text.split("->")
        self.arguments = tuple(_argument(line) for line in taken.strip().splitlines())
        self.out, *kept = (_returned(line) for line in returned.strip().splitlines())
        self.kept: tuple[Returned, ...] = tuple(kept)
        #: What the backward takes between the tensors and the options.
        self.backward_takes = (self.out, *kept) if self.out.kind == "kept" else self.kept
        self.num_activations = sum(argument.is_activation for argument in self.arguments)
        self.num_tensors = sum(not argument.is_option for argument in self.arguments)
        self.is_of_images = self.arguments[0].kind == "image"
        stands_in: dict[str, set[str]] = {}
        for argument in self.arguments:
            for name in (*(name for shape in argument.shapes for name in shape.names), *_names_of(argument.length)):
                stands_in.setdefault(name, set()).add(argument.name)
        lists = {argument.name for argument in self.arguments if argument.is_list}
        bound = {argument.name for argument in self.arguments if argument.kind == "integer"}
        bound |= {name for argument in self.arguments for name in _names_of(argument.length)}
        #: Names that may differ from element to element of the one list in which they stand.
        self.local = {name for name, where in stands_in.items() if len(where) == 1 and where <= lists} - bound

    def schemas(self, name: str) -> list[str]:
        """Of those that there are of the operators for inference, the forward of training, and its backward."""
        types = {"integer": "int", "number": "float", "numbers": "float[]"}
        tensors, options, grads = [], [], []
        for a in self.arguments:
            if a.is_option:
                options.append(f"{types[a.kind]} {a.name}")
                continue
            tensors.append(f"Tensor{'[]' * a.is_list}{'?' * self._may_be_none(a)} {a.name}")
            grads.append(f"Tensor{'[]' * a.is_list} grad_{a.name}")
        kept = [f"Tensor {k.name}" for k in self.kept]
        taken = [f"Tensor {k.name}" for k in self.backward_takes]
        grad_out = f"Tensor grad_{self.out.name}"
        outs = f"(Tensor {self.out.name}, {', '.join(kept)})" if kept else "Tensor"
        inference = f"{name}({', '.join((*tensors, *options))}) -> Tensor"
        training = [
            f"{name}_forward({', '.join((*tensors, *options))}) -> {outs}",
            f"{name}_backward({', '.join((grad_out, *tensors, *taken, *options))}) -> ({', '.join(grads)})",
        ]
        return [*([] if self.out.kind == "kept" else [inference]), *([] if self.out.kind == "alone" else training)]

    def _may_be_none(self, argument: Argument) -> bool:
        """Whether the list may have no elements, for which AOTInductor hands None to an operator."""
        at_least_one = {name for a in self.arguments if a.length and a.length.needs for name in a.length.names}
        names = _names_of(argument.length)
        return argument.may_be_empty or (bool(names) and not at_least_one.intersection(names))

    def without_none(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """With lists that are empty where they are missing."""
        pairs = zip(self.arguments, arguments, strict=True)
        return tuple(() if given is None and argument.is_list else given for argument, given in pairs)

    def sizes(self, arguments: Sequence[Any]) -> dict[str, Any]:
        """The size of every name, for arguments that are right."""
        sizes: dict[str, Any] = {}
        self._solve(arguments, sizes)
        return sizes

    def error(self, arguments: Sequence[Any], *, of_kernels: bool = False) -> Exception | None:
        """The first thing wrong with the arguments, as the error to raise; None if nothing is.

        Args:
            arguments: as the operator for inference takes them; what has a ``?`` may be None.
            of_kernels: as a backend's torch operator has it: no float64, and weights in float32 alone.
        """
        first: torch.Tensor | None = None
        for argument, given in zip(self.arguments, arguments, strict=True):
            wrong = self._wrong_kind(argument, given, first, of_kernels)
            if wrong is not None:
                return wrong
            first = given if first is None else first
        sizes: dict[str, Any] = {}
        self._solve(arguments, sizes)
        return self._wrong_sizes(arguments, sizes)

    def error_of_backward(
        self, grad_out: torch.Tensor, arguments: Sequence[Any], kept: Sequence[torch.Tensor]
    ) -> Exception | None:
        """The first thing wrong with what a backward takes beside the forward's arguments, which are right.

        Args:
            kept: of ``backward_takes``.
        """
        first, sizes = arguments[0], self.sizes(arguments)
        for line, name, t in (
            (self.out, f"grad_{self.out.name}", grad_out),
            *((line, line.name, t) for line, t in zip(self.backward_takes, kept, strict=True)),
        ):
            of = Argument(name, "tensor" if line is self.out else "weight")
            wrong = self._wrong_tensor(name, of, t, line.shape, first, of_kernels=True)
            if wrong is not None:
                return wrong
            sizes_wrong = line.shape.wrong_sizes(t.shape, sizes)
            if sizes_wrong is not None:
                return ValueError(f"{name}: {sizes_wrong}")
        return None

    def _wrong_kind(
        self, argument: Argument, given: Any, first: torch.Tensor | None, of_kernels: bool
    ) -> Exception | None:
        if argument.is_option:
            return _wrong_option(argument, given)
        if argument.is_list:
            if given is None and argument.may_be_empty:
                return None
            if not isinstance(given, Sequence) or isinstance(given, str):
                return TypeError(f"{argument.name}: expected a sequence of tensors, got {type(given).__name__}")
        for name, t, shape in argument.elements(given):
            wrong = self._wrong_tensor(name, argument, t, shape, first, of_kernels)
            if wrong is not None:
                return wrong
        return None

    def _wrong_tensor(
        self, name: str, argument: Argument, t: Any, shape: Shape, first: torch.Tensor | None, of_kernels: bool
    ) -> Exception | None:
        if not isinstance(t, torch.Tensor):
            return TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
        if t.layout != torch.strided or t.is_nested:
            return TypeError(f"{name}: expected a dense (strided) tensor, got layout {t.layout}")
        if first is None:
            *others, last = _IN_KERNELS if of_kernels else (*_IN_KERNELS, torch.float64)
            if t.dtype not in (*others, last):
                dtypes = f"{', '.join(map(_dtype_name, others))} or {_dtype_name(last)}"
                return TypeError(f"{name}: expected {dtypes}, got {t.dtype}")
        else:
            of = self.arguments[0].name
            if argument.is_activation:
                if t.dtype != first.dtype:
                    return TypeError(f"{name}: expected the dtype of {of}, {first.dtype}, got {t.dtype}")
            elif t.dtype != torch.float32 and (of_kernels or t.dtype != first.dtype):
                like = "" if of_kernels else f"the dtype of {of}, {first.dtype}, or "
                return TypeError(f"{name}: expected {like}float32, got {t.dtype}")
            if t.device != first.device:
                return ValueError(f"{name}: expected the device of {of}, {first.device}, got {t.device}")
        wrong = shape.wrong_rank(t.shape)
        return None if wrong is None else ValueError(f"{name}: {wrong}")

    def _solve(self, arguments: Sequence[Any], sizes: dict[str, Any]) -> None:
        for argument, given in zip(self.arguments, arguments, strict=True):
            if argument.kind == "integer":
                sizes[argument.name] = given
            elif argument.length is not None and not argument.is_option and not (argument.may_be_empty and not given):
                argument.length.solve(len(given), sizes)
        for argument in self.arguments:  # lists that bind a length and are empty
            for name in _names_of(argument.length):
                sizes.setdefault(name, 0)
        for argument, given in zip(self.arguments, arguments, strict=True):
            if not argument.is_option:
                for _, t, shape in argument.elements(() if given is None and argument.is_list else given):
                    shape.solve(t.shape, sizes)
                    for name in self.local:
                        sizes.pop(name, None)

    def _wrong_sizes(self, arguments: Sequence[Any], sizes: dict[str, Any]) -> Exception | None:
        for argument, given in zip(self.arguments, arguments, strict=True):
            if argument.length is not None:
                wrong = self._wrong_length(argument, argument.length, given, sizes)
                if wrong is not None:
                    return ValueError(f"{argument.name}: {wrong}")
        for argument, given in zip(self.arguments, arguments, strict=True):
            if argument.is_option:
                continue
            for name, t, shape in argument.elements(() if given is None and argument.is_list else given):
                shape.solve(t.shape, sizes)
                wrong = shape.wrong_sizes(t.shape, sizes)
                if wrong is not None:
                    return ValueError(f"{name}: {wrong}")
                for local in self.local:
                    sizes.pop(local, None)
        return None

    def _wrong_length(self, argument: Argument, length: Dim, given: Any, sizes: dict[str, Any]) -> str | None:
        count, value = len(given or ()), length.value(sizes)
        of = "number" if argument.is_option else "tensor"
        if length.needs == "positive" and count == 0:
            return f"expected at least one {of}, got none"
        if count == value or (count == 0 and argument.may_be_empty):
            return None
        meant = f"{length.text} = {value}" if length.names else length.text
        return f"expected {'none or ' * argument.may_be_empty}{meant} {of}s, got {count}"


def _names_of(length: Dim | None) -> tuple[str, ...]:
    return () if length is None else length.names


def _wrong_option(argument: Argument, given: Any) -> Exception | None:
    name = argument.name
    if argument.kind == "numbers":
        if not isinstance(given, Sequence) or isinstance(given, str):
            return TypeError(f"{name}: expected a sequence of numbers, got {type(given).__name__}")
        for i, number in enumerate(given):
            wrong = _wrong_number(f"{name}[{i}]", argument, number)
            if wrong is not None:
                return wrong
        return None
    if argument.kind == "number":
        return _wrong_number(name, argument, given)
    if not isinstance(given, (Integral, torch.SymInt)) or isinstance(given, bool):
        return TypeError(f"{name}: expected an int, got {type(given).__name__}")
    whole = given if isinstance(given, (int, torch.SymInt)) else int(given)
    if not argument.minimum <= whole <= argument.maximum:
        maximum = "" if argument.maximum == math.inf else f" and <= {argument.maximum:.0f}"
        return ValueError(f"{name}: expected an int >= {argument.minimum:.0f}{maximum}, got {given}")
    return None


def _wrong_number(name: str, argument: Argument, given: Any) -> Exception | None:
    if not isinstance(given, (Real, torch.SymFloat, torch.SymInt)) or isinstance(given, bool):
        return TypeError(f"{name}: expected a number, got {type(given).__name__}")
    # Not float() of an int, which may be too large for it; of all else, so that NumPy's float16 can be compared.
    number = given if isinstance(given, int) else float(given)
    if not max(argument.minimum, -_MAX_FLOAT) <= number <= _MAX_FLOAT:  # kernels take it as a float32
        minimum = "" if argument.minimum == -math.inf else f" >= {argument.minimum:.0f}"
        return ValueError(f"{name}: expected a finite float32{minimum}, got {given}")
    return None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))})"


_LINE = re.compile(r"(?P<name>\w+) +(?P<kind>\w+)(\[(?P<length>[^\]]+)\])?(?P<empty>\??) *(?P<rest>.*)")
_SHAPE = re.compile(r"\([^()]*(?:\([^()]*\)[^()]*)*\)")


def _argument(line: str) -> Argument:
    found = _LINE.fullmatch(line.strip())
    if found is None:
        raise ValueError(f"no line of a signature: {line!r}")
    kind, rest, length = found["kind"].removesuffix("s"), found["rest"], found["length"]
    if kind not in ("tensor", "image", "weight", "integer", "number"):
        raise ValueError(f"no kind of an argument: {line!r}")
    minimum, maximum = -math.inf, math.inf
    if rest.startswith(">="):
        minimum = float(rest[2:])
    elif ".." in rest and "(" not in rest:
        minimum, maximum = map(float, rest.split(".."))
    return Argument(
        found["name"],
        "numbers" if kind == "number" and length else kind,
        tuple(Shape.of(text) for text in _SHAPE.findall(rest)),
        Dim.of(length) if length else None,
        bool(found["empty"]),
        minimum,
        maximum,
    )


def _returned(line: str) -> Returned:
    name, kind = line.split()[:2]
    return Returned(name, Shape.of(_SHAPE.findall(line)[0]), kind if kind in ("kept", "alone") else "")
