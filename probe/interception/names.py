"""Scoped replacement of a plain function under every name it was imported as.

For the few calls that the function mode cannot see because they are no torch functions. The wrapper falls through in
threads that watch nothing; the last scope to leave puts every name back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Replacement:
    """One function's wrapper, installed while anyone is inside `installed`.

    Args:
        find: where the original is now; None while its library is not imported.
        wrap: makes the wrapper from the original.
        prefix: only modules whose name starts so are searched; "" for all.
    """

    def __init__(
        self, find: Callable[[], tuple[str, str] | None], wrap: Callable[[Callable[..., Any]], Callable[..., Any]], prefix: str = ""
    ) -> None:
        self.find, self.wrap, self.prefix = find, wrap, prefix
        self.users = 0
        self.lock = threading.Lock()
        self.counted = 0
        self.searched: set[str] = set()  # modules looked through already: looking through thousands takes longer than a forward
        self.places: list[tuple[dict[str, Any], str]] = []
        self.undo: list[tuple[dict[str, Any], str, Any]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        with self.lock:
            self.users += 1
            if self.users == 1:
                self._install()
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    for space, name, original in reversed(self.undo):
                        space[name] = original
                    self.undo.clear()

    def _install(self) -> None:
        home = self.find()
        if home is None or home[0] not in sys.modules:
            return
        original = vars(sys.modules[home[0]]).get(home[1])
        if original is None:
            return
        if len(sys.modules) != self.counted:
            self.counted = len(sys.modules)
            self.searched.update(new := sys.modules.keys() - self.searched)
        else:
            new = set()
        for module_name in new | {"__main__"}:  # a notebook binds names at any time
            space = getattr(sys.modules.get(module_name), "__dict__", None)
            if isinstance(space, dict) and (module_name == "__main__" or module_name.startswith(self.prefix)):
                found = [(space, name) for name, value in list(space.items()) if value is original]
                self.places.extend(place for place in found if not any(place[0] is s and place[1] == n for s, n in self.places))
        wrapper = self.wrap(original)
        for space, name in self.places:
            if space.get(name) is original:
                self.undo.append((space, name, original))
                space[name] = wrapper
