"""What one open page has done: its text and its recipe, with undo. The recipe is the only truth about edits.

The browser holds the page's id and nothing else; what it sends are commands, checked here before anything acts on them.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headscope.kernels.errors import InputError, SelectionError

Recipe = tuple["HeadScale", ...]

STRONGEST = 2.0
UNDO_CAP = 100
COALESCE = 0.8  # seconds within which changes of one head are one entry of the undo list
TEXT_CAP = 64 * 1024
PAGES = 64
ACTIONS = ("text", "scale", "remove", "clear", "undo", "redo", "show")


@dataclass(frozen=True)
class HeadScale:
    """One edit: the output z of a head, multiplied. `row` is the site's place in the list of sites."""

    row: int
    head: int
    value: float


@dataclass(frozen=True)
class Command:
    """One checked wish of the page. `number` comes back with the answer, so that the page knows what was answered."""

    number: int
    action: str
    text: str = ""
    row: int = 0
    head: int = 0
    value: float = 1.0


@dataclass(eq=False)
class Session:
    """The state of one page. Every part is replaced, never changed in place, so that a failed command can be taken back."""

    text: str
    recipe: Recipe = ()
    before: tuple[Recipe, ...] = ()
    after: tuple[Recipe, ...] = ()
    _last: tuple[str, int, int, float] = ("", -1, -1, 0.0)

    def apply(self, command: Command, now: float | None = None) -> None:
        """Carry out a command on text or recipe."""
        moment = time.monotonic() if now is None else now
        if command.action == "text":
            self.text = command.text
        elif command.action == "undo" and self.before:
            self.after = (*self.after, self.recipe)
            *rest, self.recipe = self.before
            self.before = tuple(rest)
        elif command.action == "redo" and self.after:
            self.before = (*self.before, self.recipe)
            *rest, self.recipe = self.after
            self.after = tuple(rest)
        elif command.action in ("scale", "remove", "clear"):
            self._change(command, moment)
        if command.action not in ("scale", "show"):
            self._last = ("", -1, -1, 0.0)

    def _change(self, command: Command, moment: float) -> None:
        mine = (command.row, command.head)
        kept = tuple(edit for edit in self.recipe if (edit.row, edit.head) != mine)
        if command.action == "clear":
            recipe: Recipe = ()
        elif command.action == "remove" or command.value == 1.0:
            recipe = kept
        else:
            edit = HeadScale(*mine, command.value)
            known = [(e.row, e.head) for e in self.recipe]
            place = known.index(mine) if mine in known else len(kept)
            recipe = (*kept[:place], edit, *kept[place:])
        action, row, head, then = self._last
        dragging = (action, row, head) == (command.action, *mine) and moment - then < COALESCE
        if recipe == self.recipe:
            return
        self._last = (command.action, *mine, moment)
        if not dragging:
            self.before = (*self.before, self.recipe)[-UNDO_CAP:]
        self.after = ()
        self.recipe = recipe


class Sessions:
    """Open pages by unguessable id; the ones longest unused are forgotten."""

    def __init__(self, cap: int = PAGES) -> None:
        self._cap = cap
        self._pages: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, text: str) -> tuple[str, Session]:
        """A new page's id and state."""
        name, session = secrets.token_urlsafe(16), Session(text)
        with self._lock:
            self._pages[name] = session
            while len(self._pages) > self._cap:
                self._pages.popitem(last=False)
        return name, session

    def get(self, name: object) -> Session:
        """The state of a page; `InputError` where it is unknown or has been forgotten."""
        with self._lock:
            session = self._pages.get(name) if isinstance(name, str) else None
            if session is None:
                raise InputError("this page is no longer known to the server; reload it to start afresh")
            self._pages.move_to_end(str(name))
            return session


def read_command(data: object, heads: Sequence[int]) -> Command:
    """Check what a page sent.

    Args:
        data: the JSON it sent.
        heads: how many heads each site has.

    Raises:
        InputError: it is not a command.
        SelectionError: it names a site or head that the model does not have.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"a command is an object, not {type(data).__name__}")
    unknown = set(data) - {"number", "action", "text", "row", "head", "value"}
    if unknown:
        raise InputError(f"a command has no field {sorted(map(str, unknown))[0]!r}")
    action = data.get("action")
    if action not in ACTIONS:
        raise InputError(f"no action {action!r}: there are {', '.join(ACTIONS)}")
    text = data.get("text", "")
    if not isinstance(text, str):
        raise InputError(f"the text is {type(text).__name__}, not a string")
    if len(text.encode("utf-8", "replace")) > TEXT_CAP:
        raise InputError(f"the text has {len(text.encode('utf-8', 'replace')):,} bytes; the workbench takes {TEXT_CAP:,}")
    row, head = _whole(data, "row"), _whole(data, "head")
    if row >= len(heads):
        raise SelectionError(f"no site {row}: this model has {len(heads)}, 0 to {len(heads) - 1}")
    if head >= heads[row]:
        raise SelectionError(f"no head {head}: site {row} has {heads[row]} heads, 0 to {heads[row] - 1}")
    value = data.get("value", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= STRONGEST:
        raise InputError(f"a head is scaled by a number from 0 to {STRONGEST:g}, not {value!r}")
    return Command(_whole(data, "number"), str(action), text, row, head, float(value))


def _whole(data: Mapping[object, object], name: str) -> int:
    value = data.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise InputError(f"{name} is a whole number from 0 up, not {value!r}")
    return value
