"""Datatypes written as nested calls, e.g. `vector(1024, 4, 16, float)`, turned into IR without any MPI.

For `undertow mpi explain` and the measurements: the constructors have MPI's argument order (counts and lengths first,
the old type last), lists where MPI takes arrays, and element names with fixed sizes. The text is parsed as an
expression tree and never evaluated.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from .errors import InterposeError

ELEMENTS = {"char": 1, "byte": 1, "short": 2, "int": 4, "float": 4, "long": 8, "double": 8, "complex": 16}


@dataclass(frozen=True)
class Spec:
    """IR text with MPI's lower bound, upper bound and number of data bytes."""

    ir: str
    lb: int
    ub: int
    size: int

    @property
    def extent(self) -> int:
        return self.ub - self.lb


def element(name: str) -> Spec:
    return Spec(f"(bytes {ELEMENTS[name]})", 0, ELEMENTS[name], ELEMENTS[name])


def _blocks(parts: list[tuple[int, int, Spec]]) -> Spec:
    """`parts`: (byte offset, number of elements, type), in order."""
    used = [(off, n, old) for off, n, old in parts if n > 0]
    text = " ".join(f"{off} (loop {n} {old.extent} {old.ir})" for off, n, old in used)
    lb = min((off + old.lb for off, _, old in used), default=0)
    ub = max((off + (n - 1) * old.extent + old.ub for off, n, old in used), default=0)
    return Spec(f"(seq {text})" if used else "(bytes 0)", lb, ub, sum(n * old.size for _, n, old in used))


def contiguous(n: int, old: Spec) -> Spec:
    return _blocks([(0, n, old)])


def hvector(n: int, length: int, stride: int, old: Spec) -> Spec:
    bounds = _blocks([(i * stride, length, old) for i in ((0, n - 1) if n > 1 else range(n))])
    return Spec(
        f"(loop {n} {stride} (loop {length} {old.extent} {old.ir}))", bounds.lb, bounds.ub, n * length * old.size
    )


def vector(n: int, length: int, stride: int, old: Spec) -> Spec:
    return hvector(n, length, stride * old.extent, old)


def hindexed(lengths: list[int], offsets: list[int], old: Spec) -> Spec:
    return _blocks([(off, n, old) for n, off in zip(lengths, offsets, strict=True)])


def indexed(lengths: list[int], displacements: list[int], old: Spec) -> Spec:
    return hindexed(lengths, [d * old.extent for d in displacements], old)


def indexed_block(length: int, displacements: list[int], old: Spec) -> Spec:
    return indexed([length] * len(displacements), displacements, old)


def struct(lengths: list[int], offsets: list[int], olds: list[Spec]) -> Spec:
    return _blocks([(off, n, old) for n, off, old in zip(lengths, offsets, olds, strict=True)])


def resized(lb: int, extent: int, old: Spec) -> Spec:
    return Spec(old.ir, lb, lb + extent, old.size)


def subarray(sizes: list[int], subsizes: list[int], starts: list[int], old: Spec) -> Spec:
    """C order: the last dimension is the fastest."""
    ir, step, offset, size = old.ir, old.extent, 0, old.size
    for whole, part, start in reversed(list(zip(sizes, subsizes, starts, strict=True))):
        ir = f"(loop {part} {step} {ir})"
        offset, step, size = offset + start * step, step * whole, size * part
    return Spec(f"(seq {offset} {ir})", 0, step, size)


CONSTRUCTORS = {
    f.__name__: f for f in (contiguous, vector, hvector, indexed, hindexed, indexed_block, struct, resized, subarray)
}


def read(text: str) -> Spec:
    """The datatype that `text` writes; InterposeError names what is wrong."""
    try:
        tree = ast.parse(text, mode="eval").body
        result = _value(tree)
    except (SyntaxError, TypeError, ValueError) as error:
        raise InterposeError(f"cannot read the datatype '{text[:80]}': {error}; expected, for example, "
                             "'vector(1024, 4, 16, float)'") from error  # fmt: skip
    if not isinstance(result, Spec):
        raise InterposeError(f"'{text[:80]}' is not a datatype; expected, for example, 'vector(1024, 4, 16, float)'")
    return result


def leaf(text: str) -> int:
    """Bytes of the only kind of element that a notation names; 1 where there are several, as the preload counts it."""
    sizes = {word for word in re.findall(r"[a-z]+", text.lower()) if word in ELEMENTS}
    return ELEMENTS[sizes.pop()] if len(sizes) == 1 else 1


def _value(node: ast.expr):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id not in CONSTRUCTORS:
            raise ValueError(f"'{node.func.id}' is not one of {', '.join(CONSTRUCTORS)}")
        return CONSTRUCTORS[node.func.id](*map(_value, node.args))
    if isinstance(node, ast.Name):
        if node.id.lower() not in ELEMENTS:
            raise ValueError(f"'{node.id}' is not one of {', '.join(ELEMENTS)}")
        return element(node.id.lower())
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only calls, lists, element names and whole numbers are understood")
