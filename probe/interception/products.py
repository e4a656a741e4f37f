"""Every way to write a batched matrix product, read as one contraction.

`matmul`, `@`, `bmm`, `mm`, `baddbmm`, `linalg.matmul` and two-operand `einsum` all become a `Product`: two operands whose dimensions carry
letters. Letters that both operands share and the result keeps are batch-like; letters of one operand alone are its own;
letters that the result lacks are summed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_letters
from typing import Any

from torch import Size, Tensor

OPERANDS = {
    "matmul": ("input", "other"), "__matmul__": ("self", "other"), "__rmatmul__": ("self", "other"), "bmm": ("input", "mat2"),
    "mm": ("input", "mat2"), "baddbmm": ("input", "batch1", "batch2"), "linalg_matmul": ("input", "other"),
}  # fmt: skip
NAMES = frozenset({*OPERANDS, "einsum"})


@dataclass(eq=False)
class Product:
    """A contraction of two tensors.

    Attributes:
        first, second: the operands.
        first_letters, second_letters, result_letters: one letter a dimension; `.` marks a broadcast dimension of size 1.
        rebuild: runs the same call on other operands.
        fixed: the operand that is a parameter, if one is. Learned queries are; learned keys make no attention.
    """

    first: Tensor
    second: Tensor
    first_letters: str
    second_letters: str
    result_letters: str
    rebuild: Callable[[Tensor, Tensor], Tensor]
    fixed: int | None = None

    def operand(self, which: int) -> tuple[Tensor, str]:
        return (self.first, self.first_letters) if which == 0 else (self.second, self.second_letters)

    @property
    def shape(self) -> Size:
        """Shape of the result."""
        sizes = {
            c: n
            for t, cs in ((self.first, self.first_letters), (self.second, self.second_letters))
            for c, n in zip(cs, t.shape, strict=True)
        }
        return Size(sizes.get(c, 1) for c in self.result_letters)

    def owners(self, letter: str) -> str:
        """`0`, `1` or `01`: which operands carry this letter of the result."""
        return ("0" if letter in self.first_letters else "") + ("1" if letter in self.second_letters else "")


def _broadcast_letters(first: Sequence[int], second: Sequence[int]) -> tuple[str, str, str]:
    """Letters for the leading dimensions of a matmul, aligned from the right."""
    n = max(len(first), len(second))
    a, b, out = "", "", ""
    for i in range(n):
        letter = ascii_letters[i]
        left = first[i - n + len(first)] if i >= n - len(first) else None
        right = second[i - n + len(second)] if i >= n - len(second) else None
        both_one = left == 1 and right == 1
        if left is not None:
            a += letter if left != 1 or both_one or right is None else "."
        if right is not None:
            b += letter if right != 1 or both_one or left is None else "."
        out += letter
    return a, b, out


def read(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    """The contraction that a torch call is, or None where it is not one of two tensors of two or more dimensions."""
    if name == "einsum":
        return _read_einsum(func, args, kwargs)
    names = OPERANDS[name]
    given = dict(zip(names, args, strict=False)) | {n: v for n, v in kwargs.items() if n in names}
    if len(args) > len(names) and name != "baddbmm" or "out" in kwargs or names[-1] not in given:
        return None
    rest, options = args[len(names) :], {n: v for n, v in kwargs.items() if n not in names}
    swapped = name == "__rmatmul__"
    first, second = (given[n] for n in (reversed(names[-2:]) if swapped else names[-2:]))
    before = [given[n] for n in names[:-2]]  # what a baddbmm adds; the operands themselves are not held

    def rebuild(a: Tensor, b: Tensor) -> Tensor:
        pair = (b, a) if swapped else (a, b)
        result: Tensor = func(*before, *pair, *rest, **options)
        return result

    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.ndim < 2 or second.ndim < 2:
        return None
    a, b, out = _broadcast_letters(first.shape[:-2], second.shape[:-2])
    return Product(first, second, a + "YZ", b + "ZX", out + "YX", rebuild)


def _read_einsum(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product | None:
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if len(operands) != 2 or not all(isinstance(x, Tensor) and x.ndim >= 2 for x in operands):
        return None
    equation = args[0].replace(" ", "")
    left, arrow, out = equation.partition("->")
    a, comma, b = left.partition(",")
    if not comma:
        return None
    names = ""
    if "..." in equation:
        widths = [x.ndim - len(t.replace("...", "")) for x, t in zip(operands, (a, b), strict=True)]
        free = [c for c in ascii_letters if c not in equation]
        width = max(w if "..." in t else 0 for w, t in zip(widths, (a, b), strict=True))
        names = "".join(free[:width])
        a = a.replace("...", names[width - widths[0] :] if widths[0] else "")
        b = b.replace("...", names[width - widths[1] :] if widths[1] else "")
        out = out.replace("...", names)
    if not arrow:
        counts = {c: (a + b).count(c) for c in a + b}
        out = names + "".join(sorted(c for c, n in counts.items() if n == 1 and c not in names))
    if len(set(a)) < len(a) or len(set(b)) < len(b) or len(a) != operands[0].ndim or len(b) != operands[1].ndim:
        return None
    listed = isinstance(args[1], list | tuple)

    sizes = {c: n for t, x in ((a, operands[0]), (b, operands[1])) for c, n in zip(t, x.shape, strict=True) if n != 1}
    first_letters = "".join("." if n == 1 and sizes.get(c, 1) != 1 else c for c, n in zip(a, operands[0].shape, strict=True))
    second_letters = "".join("." if n == 1 and sizes.get(c, 1) != 1 else c for c, n in zip(b, operands[1].shape, strict=True))

    def rebuild(x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = func(args[0], [x, y], **kwargs) if listed else func(args[0], x, y, **kwargs)
        return result

    return Product(operands[0], operands[1], first_letters, second_letters, out, rebuild)
