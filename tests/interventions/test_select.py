"""Which sites, heads and positions a selector names, and what it says when they do not exist."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headscope.interventions import select, span
from headscope.interventions.region import find_region
from headscope.interventions.select import Selector
from headscope.interventions.spans import locate
from headscope.kernels.errors import EditError, RecipeError, SelectionError, ShapeError
from tests.interventions.dense import make_call, make_site, selected

indices = st.lists(st.integers(0, 40), min_size=1, max_size=6)
slices = st.builds(slice, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.none() | st.integers(1, 3))
positions = st.lists(st.integers(-9, 40), min_size=1, max_size=6) | slices | st.text(min_size=1).map(span)


@st.composite
def selectors(draw: st.DrawFn) -> Selector:
    conditions = {
        "sites": st.lists(st.text(min_size=1), min_size=1, max_size=3),
        "layers": indices | st.builds(range, st.integers(0, 3), st.integers(4, 90)),
        "heads": indices,
        "queries": positions,
        "keys": positions,
        "steps": indices | st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
        "samples": indices,
        "kind": st.sampled_from(["self", "cross", "joint", "window"]),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(conditions))))
    return select(**{name: draw(conditions[name]) for name in chosen})


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        (select(), True),
        (select("*layers.3*"), True),
        (select("model.layers.3.self_attn"), True),
        (select("model.layers.3.self_attn#0"), True),
        (select("model.layers.3.self_attn#1"), False),
        (select(["*cross*", "*self*"]), True),
        (select("*cross*"), False),
        (select(layer=3), True),
        (select(layers=range(4, 8)), False),
        (select("*cross*", layer=3), False),
        (select(kind="self"), True),
        (select(kind="cross"), False),
    ],
)
def test_a_site_matches_if_every_condition_holds(selector: Selector, matches: bool) -> None:
    assert selector.matches(make_site()) is matches


def test_a_site_without_a_layer_number_is_in_no_layer() -> None:
    assert not select(layers=range(100)).matches(make_site("head.attention#0", layer=None))


@given(selectors())
def test_a_selector_comes_back_from_its_plain_form(selector: Selector) -> None:
    assert Selector.from_dict(selector.to_dict()) == selector


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: select(layer=1, layers=[2]), "layer=1 and layers=[2] say the same thing: give one of them"),
        (lambda: select(head=1, kv_group=0), "heads and kv_groups were both given"),
        (lambda: select(heads=[]), "heads=[] selects nothing: leave it out to select all"),
        (lambda: select(heads=-1), "heads -1: heads are counted from 0"),
        (lambda: select(heads=1.5), "heads=1.5: give an int, a list of ints or a range"),
        (lambda: select(heads=True), "heads=True: give an int, a list of ints or a range"),
        (lambda: select(layers=slice(1, 2)), "slices are for queries, keys and steps"),
        (lambda: select(steps=slice(-2, None)), "how many steps there will be is not known"),
        (lambda: select(kind="own"), "kind='own': kind is one of self, cross, joint, window"),
        (lambda: select(branch="both"), "branch='both': branch is one of cond, uncond"),
        (lambda: select(sites=[]), "sites=[]: give a site name or glob"),
        (lambda: select(samples=0, branch="cond"), "samples and branch were both given"),
        (lambda: select(keys=range(10_000_000)), "the most is 1,000,000"),
        (lambda: span(""), "a span needs the text to look for"),
    ],
)
def test_a_malformed_condition_is_named(make: object, message: str) -> None:
    with pytest.raises(SelectionError) as caught:
        make()  # type: ignore[operator]
    assert message in str(caught.value)


def test_an_unknown_key_is_named_with_those_that_there_are() -> None:
    with pytest.raises(RecipeError, match="unknown selector key 'layer': the keys are sites, layers, heads, kv_groups"):
        Selector.from_dict({"layer": 3})


CHOICES = {
    "q": [select(), select(head=1), select(heads=[0, 3]), select(kv_group=1), select(queries=[0, -1]), select(queries=slice(-2, None))],
    "v": [select(), select(heads=[2, 3]), select(kv_group=0), select(keys=[1, -1]), select(keys=slice(1, 4, 2)), select(samples=1)],
    "pattern": [
        select(queries=3, keys=[0, 2]),
        select(head=2, keys=-1),
        select(branch="cond"),
        select(branch="uncond", queries=4),
        select(steps=[2]),
    ],
    "bias": [select(keys=0), select(heads=[1, 2], queries=[4], keys=[1])],
    "o": [select(queries=range(2, 9))],
}


@pytest.mark.parametrize(("stage", "selector"), [(stage, selector) for stage, listed in CHOICES.items() for selector in listed], ids=str)
@pytest.mark.parametrize("queries", [5, 2])
def test_the_region_holds_the_entries_that_a_look_at_each_one_gives(stage: str, selector: Selector, queries: int) -> None:
    for fold, step in ((1, 0), (2, 2)):
        call = make_call(make_site(fold=fold), batch=4, queries=queries, keys=5, step=step)
        shape = {"q": (4, 4, queries, 6), "v": (4, 2, 5, 5), "o": (4, 4, queries, 7)}.get(stage, (4, 4, queries, 5))
        value = torch.zeros(()) if stage == "bias" else torch.zeros(shape)
        region = find_region(selector, call, stage, value, {})
        expected = torch.zeros(shape, dtype=torch.bool)
        for place in itertools.product(*map(range, shape)):
            expected[place] = selected(selector, stage, place, value, call)
        mask = torch.zeros(()).bool() if region is None else region.mask()
        assert torch.equal((torch.ones(()).bool() if mask is None else mask).expand(shape), expected)
        assert (region is None) == (not expected.any())


def test_in_a_decode_step_a_query_keeps_its_absolute_position() -> None:
    decode = make_call(queries=1, keys=9)
    assert find_region(select(queries=8), decode, "z", torch.zeros(2, 4, 1, 5), {}) is not None
    assert find_region(select(queries=-1), decode, "z", torch.zeros(2, 4, 1, 5), {}) is not None
    assert find_region(select(queries=0), decode, "z", torch.zeros(2, 4, 1, 5), {}) is None
    cross = make_call(make_site(kind="cross"), queries=1, keys=9)
    assert find_region(select(queries=0), cross, "z", torch.zeros(2, 4, 1, 5), {}) is not None


@pytest.mark.parametrize(
    ("selector", "stage", "error", "message"),
    [
        (select(head=7), "z", SelectionError, "no head 7: this site has 4 heads, 0 to 3"),
        (select(kv_groups=[1, 5]), "k", SelectionError, "no kv group 5: this site has 2 kv groups, 0 to 1"),
        (select(samples=2), "z", SelectionError, "no sample 2: this call has a batch of 2, 0 to 1"),
        (select(head=1), "v", EditError, "heads 0 to 1 of model.layers.3.self_attn#0 share key/value group 0; select kv_group=0"),
        (
            select(keys=span("word")),
            "k",
            SelectionError,
            "span('word') has no place yet: give plan.on(model, tokenizer=..., input_ids=...)",
        ),
    ],
)
def test_what_is_not_there_is_named_with_what_is(selector: Selector, stage: str, error: type[Exception], message: str) -> None:
    call = make_call()
    with pytest.raises(error) as caught:
        find_region(selector, call, stage, call.k if stage in ("k", "v") else call.q, {})
    assert message in str(caught.value)


def test_a_batch_of_three_has_no_branches() -> None:
    call = make_call(batch=3)
    with pytest.raises(SelectionError, match="a batch of 3 has no two halves"):
        find_region(select(branch="cond"), call, "q", call.q, {})


class Pieces:
    """A tokenizer of fixed pieces; a piece in bytes is part of a character."""

    def __init__(self, *pieces: str | bytes) -> None:
        self.pieces = [piece.encode() if isinstance(piece, str) else piece for piece in pieces]

    def decode(self, token_ids: list[int], **options: bool) -> str:
        return b"".join(self.pieces[token] for token in token_ids).decode(errors="replace").removeprefix(" ")  # as sentencepiece does


@pytest.mark.parametrize(
    ("pieces", "text", "tokens"),
    [
        ([" the", " pass", "word", " is", " a", " password"], "password", (1, 2, 5)),
        (["<s>", " the", " pass", "word"], "s", (0, 2)),
        ([" pass", "", "word"], "passw", (0, 1, 2)),
        ([" a", b"\xe2\x82", b"\xac", " b"], "€", (1, 2)),
        ([" a", b"\xe2\x82", b"\xac", " b"], " b", (3,)),
        ([" aa", "a"], "aa", (0, 1)),
    ],
)
def test_a_span_covers_each_token_that_its_text_overlaps(pieces: list[str | bytes], text: str, tokens: tuple[int, ...]) -> None:
    assert locate([span(text)], Pieces(*pieces), list(range(len(pieces)))) == {span(text): [tokens]}


def test_a_span_is_looked_up_in_each_sample() -> None:
    call = make_call(batch=2, queries=3, keys=3)
    spans = locate([span("b")], Pieces("a", "b"), torch.tensor([[0, 0, 1], [1, 0, 0]]))
    region = find_region(select(keys=span("b")), call, "k", call.k, spans)
    assert region is not None
    assert region.rows is not None
    assert region.rows.tolist() == [[False, False, True], [True, False, False]]
    with pytest.raises(ShapeError, match="looked up in 2 rows of input_ids, this call has a batch of 3"):
        find_region(select(keys=span("b")), make_call(batch=3), "k", make_call(batch=3).k, spans)


def test_a_span_that_does_not_occur_is_refused_with_the_text() -> None:
    with pytest.raises(SelectionError, match=r"span\('zebra'\) does not occur in the text given: 'ab'"):
        locate([span("zebra")], Pieces("a", "b"), [0, 1])
    with pytest.raises(SelectionError, match="needs the tokens it stands in"):
        locate([span("zebra")], None, [0, 1])
    with pytest.raises(SelectionError, match="input_ids of shape"):
        locate([span("zebra")], Pieces("a"), torch.zeros(1, 1, 1, dtype=torch.long))
