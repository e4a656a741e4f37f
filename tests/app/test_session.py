"""The recipe of a page: one list, with undo."""

from __future__ import annotations

import pytest

from headscope.app.session import PAGES, UNDO_CAP, Command, HeadScale, Session, Sessions
from headscope.kernels.errors import InputError


def drag(session: Session, value: float, now: float, head: int = 5) -> None:
    session.apply(Command(1, "scale", row=3, head=head, value=value), now)


def test_a_drag_is_one_entry_of_undo() -> None:
    session = Session("text")
    for step in range(8):
        drag(session, 1 - (step + 1) / 8, step * 0.1)
    assert session.recipe == (HeadScale(3, 5, 0.0),)
    assert session.before == ((),)
    session.apply(Command(2, "undo"))
    assert session.recipe == ()
    session.apply(Command(3, "redo"))
    assert session.recipe == (HeadScale(3, 5, 0.0),)


def test_a_pause_or_another_head_starts_a_new_entry() -> None:
    session = Session("text")
    drag(session, 0.5, 0.0)
    drag(session, 0.4, 5.0)
    drag(session, 0.4, 5.1, head=6)
    assert len(session.before) == 3


def test_a_drag_that_begins_without_a_change_can_still_be_undone() -> None:
    session = Session("text")
    drag(session, 1.0, 0.0)
    drag(session, 0.5, 0.1)
    assert session.before == ((),)


def test_scale_one_takes_the_edit_out() -> None:
    session = Session("text")
    drag(session, 0.0, 0.0)
    drag(session, 1.0, 9.0)
    assert session.recipe == ()


def test_an_edit_keeps_its_place_when_it_changes() -> None:
    session = Session("text")
    drag(session, 0.0, 0.0, head=1)
    drag(session, 0.0, 2.0, head=2)
    drag(session, 0.5, 4.0, head=1)
    assert [edit.head for edit in session.recipe] == [1, 2]


def test_removing_and_clearing_can_be_undone() -> None:
    session = Session("text")
    drag(session, 0.0, 0.0, head=1)
    drag(session, 0.0, 2.0, head=2)
    session.apply(Command(1, "remove", row=3, head=1))
    assert [edit.head for edit in session.recipe] == [2]
    session.apply(Command(2, "clear"))
    assert session.recipe == ()
    session.apply(Command(3, "undo"))
    session.apply(Command(4, "undo"))
    assert [edit.head for edit in session.recipe] == [1, 2]


def test_undo_with_nothing_to_undo_does_nothing() -> None:
    session = Session("text")
    session.apply(Command(1, "undo"))
    session.apply(Command(2, "redo"))
    assert session.recipe == ()


def test_the_undo_list_is_capped() -> None:
    session = Session("text")
    for step in range(UNDO_CAP + 20):
        drag(session, (step % 7) / 10, 10.0 * step)
    assert len(session.before) == UNDO_CAP


def test_the_longest_unused_page_is_forgotten() -> None:
    sessions = Sessions()
    first, _ = sessions.open("a")
    second, _ = sessions.open("b")
    sessions.get(first)
    for _ in range(PAGES - 1):
        sessions.open("c")
    assert sessions.get(first).text == "a"
    with pytest.raises(InputError, match="reload it"):
        sessions.get(second)
