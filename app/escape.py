"""The one place where text from outside becomes text on a screen.

`visible` makes every character of such text show itself; `markup` also disarms it for places that read markup.
Dash and React components take text as text, so they get `visible` alone: escaping twice would show `&lt;`.
"""

from __future__ import annotations

from headscope.probe.visible import markup, visible

__all__ = ["markup", "visible"]
