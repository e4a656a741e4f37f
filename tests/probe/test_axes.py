"""Axes are followed through any chain of layout changes, and every way to write a product is read as the same contraction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from headscope.probe.interception import axes as ax
from headscope.probe.interception import products
from headscope.probe.interception.axes import Atom, Axes
from headscope.probe.interception.layout import layout
from headscope.probe.interception.tape import base_name

SHORT = settings(deadline=None, max_examples=60, derandomize=True, database=None)
LONG = settings(SHORT, max_examples=400)
SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)
LETTERS = "abcdefgh"


def fresh(sizes: list[int]) -> tuple[Tensor, Axes]:
    """A tensor whose entries are their own flat positions, and its axes, one atom each."""
    return torch.arange(math.prod(sizes)).reshape(sizes), tuple((Atom((c,), n),) for c, n in zip(LETTERS, sizes, strict=False))


def by_letter(axes: Axes, letters: str) -> list[list[Atom]]:
    """The atoms that each letter has become, in memory order."""
    return [sorted((a for dim in axes for a in dim if a.key[0] == c), key=lambda a: a.key) for c in letters]


def check(tensor: Tensor, axes: Axes, sizes: list[int]) -> None:
    """Sizes agree, `arrange` gives one dimension per letter with positions in order, and `restore` takes it back."""
    assert tuple(ax.size_of(dim) for dim in axes) == tuple(tensor.shape)
    groups = by_letter(axes, LETTERS[: len(sizes)])
    found = ax.arrange(tensor, axes, groups)
    assert found.shape == tuple(ax.size_of(g) for g in groups)
    assert torch.equal(ax.restore(found, tensor, axes, groups), tensor)
    assert torch.equal(ax.restore(found * 3 + 1, tensor, axes, groups), tensor * 3 + 1)
    if found.numel() == 0:
        return
    flat = found
    for place in range(len(sizes) - 1, -1, -1):  # the position along each original dimension, out of the entries themselves
        along, flat = flat % sizes[place], flat // sizes[place]
        line = along.movedim(place, 0).reshape(along.shape[place], -1)
        assert bool((line == line[:, :1]).all()), "a dimension runs along more than one letter"
        positions = line[:, 0]
        assert bool((positions.diff() > 0).all()), "positions are out of order"
        if len(groups[place]) == 1:
            start = -groups[place][0].lead
            assert positions.tolist() == list(range(start, start + len(positions)))


@st.composite
def factored(draw: Any, total: int) -> list[int]:
    """A shape of `total` entries."""
    shape: list[int] = []
    while total > 1 and len(shape) < 5:
        step = draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
        shape.append(step)
        total //= step
    return [*shape, total] if total > 1 or not shape else shape


def change(draw: Any, tensor: Tensor, axes: Axes) -> tuple[Tensor, Axes | None]:
    """One random step of a model's layout."""
    kind = draw(st.sampled_from(["permute", "merge", "split", "reshape", "slice", "none", "squeeze", "swap"]))
    n = tensor.ndim
    if kind == "permute" and n:
        order = draw(st.permutations(range(n)))
        return tensor.permute(order), ax.permute(axes, order)
    if kind == "swap" and n > 1:
        first, second = draw(st.integers(-n, n - 1)), draw(st.integers(-n, n - 1))
        return tensor.transpose(first, second), ax.swap(axes, first % n, second % n)
    if kind == "merge" and n > 1:
        at = draw(st.integers(0, n - 2))
        shape = [*tensor.shape[:at], tensor.shape[at] * tensor.shape[at + 1], *tensor.shape[at + 2 :]]
        return tensor.reshape(shape), ax.reshape(axes, shape)
    if kind == "split" and n:
        at = draw(st.integers(0, n - 1))
        size = tensor.shape[at]
        part = draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0] or [1]))
        shape = [*tensor.shape[:at], size // part, part, *tensor.shape[at + 1 :]]
        return tensor.reshape(shape), ax.reshape(axes, shape)
    if kind == "reshape":
        shape = draw(factored(tensor.numel()))
        return tensor.reshape(shape), ax.reshape(axes, shape)
    if kind == "slice" and n:
        at = draw(st.integers(0, n - 1))
        start = draw(st.integers(-tensor.shape[at], tensor.shape[at]))
        stop = draw(st.one_of(st.none(), st.integers(-tensor.shape[at], tensor.shape[at] + 1)))
        part, whole = slice(start, stop), slice(None)
        key = (*(whole,) * at, part) if draw(st.booleans()) else (..., part, *(whole,) * (n - 1 - at))
        return tensor[key], ax.index(axes, tensor.shape, key)
    if kind == "none":
        key = (..., None) if draw(st.booleans()) else (None,)
        return tensor[key], ax.index(axes, tensor.shape, key)
    if kind == "squeeze":
        dims = [i for i in range(n) if tensor.shape[i] == 1][:2]
        return tensor.squeeze(dims), ax.squeeze(axes, dims)
    return tensor, axes


@LONG
@given(SIZES, st.data())
def test_axes_follow_any_chain_of_layout_changes(sizes: list[int], data: st.DataObject) -> None:
    tensor, axes = fresh(sizes)
    for _ in range(data.draw(st.integers(0, 7))):
        tensor, found = change(data.draw, tensor, axes)
        if found is None:  # said that it cannot be told: always allowed
            return
        axes = found
        check(tensor, axes, sizes)


@SHORT
@given(SIZES)
def test_a_reshape_that_only_splits_or_merges_whole_axes_is_always_followed(sizes: list[int]) -> None:
    tensor, axes = fresh(sizes)
    for shape in ([math.prod(sizes)], [1, *sizes], [*sizes, 1], [math.prod(sizes[:2]), *sizes[2:]], [*sizes[:-1], 1, sizes[-1]]):
        found = ax.reshape(axes, shape)
        assert found is not None, shape
        check(tensor.reshape(shape), found, sizes)
        back = ax.reshape(found, sizes)
        assert back is not None
        check(tensor.reshape(shape).reshape(sizes), back, sizes)


@SHORT
@given(SIZES, st.integers(0, 3), st.data())
def test_an_empty_dimension_is_followed_or_given_up_but_never_an_accident(sizes: list[int], where: int, data: st.DataObject) -> None:
    sizes = [0 if i == where % len(sizes) else n for i, n in enumerate(sizes)]
    tensor, axes = fresh(sizes)
    assert ax.reshape(axes, sizes) is not None
    for shape in ([0], [*sizes, 1], sizes[::-1], [2, 0, 3]):
        found = ax.reshape(axes, shape)
        if found is not None:
            check(tensor.reshape(shape), found, sizes)
    for _ in range(3):
        tensor, found = change(data.draw, tensor, axes)
        if found is None:
            return
        axes = found
        assert tuple(ax.size_of(dim) for dim in axes) == tuple(tensor.shape)


@SHORT
@given(SIZES, st.data())
def test_an_axis_that_was_broadcast_takes_its_full_size_only_when_asked(sizes: list[int], data: st.DataObject) -> None:
    assume(len(sizes) > 1)
    tensor, axes = fresh(sizes)
    missing = data.draw(st.integers(0, len(sizes) - 1))
    groups = [list(dim) for dim in axes]
    kept = tensor.select(missing, 0)
    kept_axes = tuple(dim for i, dim in enumerate(axes) if i != missing)
    thin = ax.arrange(kept, kept_axes, groups)
    assert torch.equal(thin, kept.unsqueeze(missing))
    wide = ax.arrange(kept, kept_axes, groups, expand=True)
    assert torch.equal(wide, kept.unsqueeze(missing).expand(sizes))
    assert torch.equal(ax.restore(thin, kept, kept_axes, groups), kept)


def test_an_axis_that_belongs_nowhere_is_an_error_and_no_reordering() -> None:
    tensor, axes = fresh([2, 3])
    with pytest.raises(ValueError, match="belongs to no group"):
        ax.arrange(tensor, axes, [axes[0]])


CALLS: list[tuple[str, Callable[[Tensor], Any], tuple[Any, ...], dict[str, Any]]] = [
    ("permute", torch.permute, ((2, 0, 1),), {}),
    ("permute", torch.Tensor.permute, (2, 0, 1), {}),
    ("movedim", torch.movedim, (0, -1), {}),
    ("movedim", torch.movedim, ((0, 1), (2, 0)), {}),
    ("transpose", torch.transpose, (0, 2), {}),
    ("transpose", torch.Tensor.transpose, (), dict(dim0=-1, dim1=-2)),
    ("swapaxes", torch.swapaxes, (0, 1), {}),
    ("mT", torch.Tensor.mT.__get__, (), {}),  # type: ignore[attr-defined]
    ("adjoint", torch.adjoint, (), {}),
    ("unsqueeze", torch.unsqueeze, (1,), {}),
    ("unsqueeze", torch.unsqueeze, (), dict(dim=-1)),
    ("flatten", torch.flatten, (1,), {}),
    ("flatten", torch.flatten, (), dict(start_dim=0, end_dim=1)),
    ("unflatten", torch.Tensor.unflatten, (1, (2, 3)), {}),
    ("view", torch.Tensor.view, (4, 2, 3, 5), {}),
    ("narrow", torch.narrow, (1, 2, 3), {}),
    ("narrow", torch.narrow, (1, -2, 2), {}),
    ("split", torch.split, (2, 1), {}),
    ("split", torch.split, ([1, 3, 2],), dict(dim=1)),
    ("chunk", torch.chunk, (4, 1), {}),
    ("chunk", torch.chunk, (2,), dict(dim=-1)),
    ("tensor_split", torch.tensor_split, (4, 1), {}),
    ("tensor_split", torch.tensor_split, ((1, 4), 1), {}),
    ("tensor_split", torch.tensor_split, ((-2,),), dict(dim=1)),
    ("tensor_split", torch.tensor_split, (torch.tensor([2, 5]), 1), {}),
    ("clone", torch.clone, (), {}),
    ("contiguous", torch.Tensor.contiguous, (), {}),
    ("mul", torch.mul, (1,), {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function", "rest", "options"), CALLS, ids=[f"{c[0]}{c[2]}{c[3]}" for c in CALLS])
def test_a_torch_call_moves_the_axes_as_it_moves_the_numbers(
    name: str, function: Callable[..., Any], rest: tuple[Any, ...], options: dict[str, Any]
) -> None:
    sizes = [4, 6, 5]
    tensor, axes = fresh(sizes)
    assert base_name(function) == name
    result = function(tensor, *rest, **options)
    parts = [(result, None)] if isinstance(result, Tensor) else [(part, i) for i, part in enumerate(result)]
    for part, pick in parts:
        found = layout(name, axes, tensor.shape, tensor, (tensor, *rest), options, part, pick)
        assert found is not None
        check(part, found, sizes)


@pytest.mark.parametrize("name", ["flip", "roll", "sort", "rot90", "gather", "index_select"])
def test_a_call_that_moves_numbers_within_an_axis_ends_the_trail(name: str) -> None:
    tensor, axes = fresh([4, 4])
    index = torch.tensor([3, 1, 0, 2])
    rest: dict[str, tuple[Any, ...]] = {
        "flip": ((0,),), "roll": (1, 0), "gather": (0, index.expand(4, 4)), "index_select": (0, index),
    }  # fmt: skip
    result = getattr(torch, name)(tensor, *rest.get(name, ()))
    output = result if isinstance(result, Tensor) else result[0]
    assert layout(name, axes, tensor.shape, tensor, (tensor, *rest.get(name, ())), {}, output, None) is None


@pytest.mark.parametrize("front", [True, False])
@pytest.mark.parametrize("way", ["cat", "pad"])
def test_columns_put_before_or_behind_tell_where_the_first_key_stands(way: str, front: bool) -> None:
    tensor, axes = fresh([2, 3])
    if way == "cat":
        extra = torch.zeros(2, 1, dtype=torch.long)
        parts = [extra, tensor] if front else [tensor, extra]
        found = layout("cat", axes, tensor.shape, tensor, (parts,), dict(dim=-1), torch.cat(parts, dim=-1), None)
    else:
        amounts = (1, 0) if front else (0, 1)
        grown = torch.nn.functional.pad(tensor, amounts)
        found = layout("pad", axes, tensor.shape, tensor, (tensor, amounts), {}, grown, None)
    assert found is not None
    assert (found[1][0].size, found[1][0].lead) == (4, int(front))
    assert found[0] == axes[0]


# -- products ---------------------------------------------------------------------------------------------------------------------------


def contracted(product: products.Product) -> Tensor:
    """What the letters say, computed by torch's own einsum."""
    operands = []
    for tensor, letters in ((product.first, product.first_letters), (product.second, product.second_letters)):
        broadcast = [i for i, c in enumerate(letters) if c == "."]
        assert all(tensor.shape[i] == 1 for i in broadcast)
        operands.append((letters.replace(".", ""), tensor.squeeze(broadcast)))
    (a, x), (b, y) = operands
    sizes = {c: n for letters, tensor in operands for c, n in zip(letters, tensor.shape, strict=True)}
    lone = [c for c in product.result_letters if c not in sizes]
    assert not lone, "a letter of the result that no operand has"
    return torch.einsum(f"{a},{b}->{product.result_letters}", x, y)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def agrees(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> products.Product:
    product = products.read(name, function, args, kwargs)
    assert product is not None
    assert product.shape == result.shape
    torch.testing.assert_close(contracted(product), result, atol=1e-12, rtol=0)
    torch.testing.assert_close(product.rebuild(product.first, product.second), result, atol=0, rtol=0)
    torch.testing.assert_close(product.rebuild(product.first * 2, product.second), result * 2, atol=1e-12, rtol=0)
    return product


MATMULS: list[tuple[str, Callable[..., Any]]] = [
    ("matmul", torch.matmul), ("matmul", torch.Tensor.matmul), ("__matmul__", torch.Tensor.__matmul__),
    ("linalg_matmul", torch.linalg.matmul),
]  # fmt: skip
LEAD = st.lists(st.sampled_from([1, 2, 3]), max_size=3)


@SHORT
@given(LEAD, LEAD, st.integers(1, 4), st.integers(2, 4), st.integers(1, 4), st.sampled_from(MATMULS))
def test_a_matmul_is_read_with_whatever_it_broadcasts(
    left: list[int], right: list[int], rows: int, inner: int, columns: int, call: tuple[str, Callable[..., Any]]
) -> None:
    try:
        torch.broadcast_shapes(left, right)
    except RuntimeError:
        assume(False)
    first, second = normal(*left, rows, inner), normal(*right, inner, columns, seed=1)
    product = agrees(call[0], call[1], (first, second), {}, torch.matmul(first, second))
    assert product.owners("Y") == "0"
    assert product.owners("X") == "1"


@SHORT
@given(st.integers(1, 3), st.integers(1, 4), st.integers(2, 4), st.integers(1, 4))
def test_the_other_matrix_products_are_read_alike(batch: int, rows: int, inner: int, columns: int) -> None:
    first, second = normal(batch, rows, inner), normal(batch, inner, columns, seed=1)
    agrees("bmm", torch.bmm, (first, second), {}, torch.bmm(first, second))
    agrees("bmm", torch.bmm, (first,), dict(mat2=second), torch.bmm(first, second))
    agrees("mm", torch.mm, (first[0], second[0]), {}, torch.mm(first[0], second[0]))
    agrees("__rmatmul__", torch.Tensor.__rmatmul__, (second, first), {}, first @ second)
    zero, added = torch.zeros(batch, rows, columns, dtype=torch.float64), normal(batch, rows, columns, seed=2)
    agrees("baddbmm", torch.baddbmm, (zero, first, second), {}, torch.bmm(first, second))
    product = products.read("baddbmm", torch.baddbmm, (added, first, second), dict(beta=0.5, alpha=2.0))
    assert product is not None
    expected = 0.5 * added + 2 * torch.bmm(first * 3, second)
    torch.testing.assert_close(product.rebuild(first * 3, second), expected, atol=1e-12, rtol=0)


@st.composite
def equations(draw: Any) -> tuple[str, list[int], list[int]]:
    """An einsum of two operands: shared, own and summed letters in any order, with ellipsis, spaces and broadcasting."""
    letters = draw(st.permutations("bhqkdBHQ"))
    shared, own_a, own_b, summed = letters[: draw(st.integers(0, 2))], letters[2:3], letters[3:4], letters[4 : 4 + draw(st.integers(1, 2))]
    sizes = {c: draw(st.sampled_from([2, 3])) for c in letters}
    a, b = (draw(st.permutations([*shared, *own, *summed])) for own in (own_a, own_b))
    out: list[str] = draw(st.permutations([*shared, *own_a, *own_b]))
    dots = draw(st.integers(0, 2))
    shape_a, shape_b = ([draw(st.sampled_from([1, sizes[c]])) if c in shared else sizes[c] for c in x] for x in (a, b))
    lead = [draw(st.sampled_from([1, 2])) for _ in range(dots)]
    given_to = draw(st.sampled_from(["both", "first"])) if dots else "none"
    text_a = ("..." if given_to != "none" else "") + "".join(a)
    text_b = ("..." if given_to == "both" else "") + "".join(b)
    shape_a = [*lead, *shape_a] if given_to != "none" else shape_a
    shape_b = [*lead, *shape_b] if given_to == "both" else shape_b
    space = draw(st.sampled_from(["", " "]))
    right = "" if draw(st.integers(0, 3)) == 0 else f"{space}->{space}" + ("..." if given_to != "none" else "") + "".join(out)
    return f"{text_a},{space}{text_b}{right}", shape_a, shape_b


@LONG
@given(equations(), st.booleans())
def test_an_einsum_is_read_with_dots_spaces_broadcasting_and_no_arrow(case: tuple[str, list[int], list[int]], listed: bool) -> None:
    text, shape_a, shape_b = case
    first, second = normal(*shape_a), normal(*shape_b, seed=1)
    assume(first.ndim >= 2 and second.ndim >= 2)
    args = (text, [first, second]) if listed else (text, first, second)
    agrees("einsum", torch.einsum, args, {}, torch.einsum(*args))


@pytest.mark.parametrize(
    ("name", "function", "args"),
    [
        ("matmul", torch.matmul, (normal(3), normal(3))),
        ("matmul", torch.matmul, (normal(2, 3), normal(3))),
        ("einsum", torch.einsum, ("ii,ij->j", normal(3, 3), normal(3, 3))),
        ("einsum", torch.einsum, ("ij,jk,kl->il", normal(2, 2), normal(2, 2), normal(2, 2))),
        ("einsum", torch.einsum, ("ij->ji", normal(2, 2))),
        ("einsum", torch.einsum, (normal(2, 2), [0, 1], normal(2, 2), [1, 2])),
        ("mm", torch.mm, (normal(2, 2),)),
    ],
)
def test_what_is_no_product_of_two_matrices_is_left_alone(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    assert products.read(name, function, args, {}) is None
