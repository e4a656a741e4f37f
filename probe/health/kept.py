"""A capture of every call's queries and keys that goes on where they are not finite, and knows which rows count."""

from __future__ import annotations

from torch import Tensor

from headscope.kernels.errors import NonFiniteError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.capture import Capture
from headscope.probe.health.inputs import Tokens
from headscope.probe.keep import Keep


class Kept(Capture):
    """The calls of one forward.

    Attributes:
        tokens: which of them count.
        rows: (site, step) -> [B, Q] bool, the queries that count; None for all.
        broken: site -> why its numbers are undefined.
    """

    def __init__(self, tokens: Tokens) -> None:
        super().__init__(Keep())
        self.tokens = tokens
        self.rows: dict[tuple[str, int], Tensor | None] = {}
        self.broken: dict[str, str] = {}

    def see(self, call: AttentionCall) -> None:
        """Keep what a pattern follows from."""
        self.rows[call.site.name, call.step] = self.tokens.rows(call)
        try:
            super().see(call)
        except NonFiniteError as error:
            self.broken[call.site.name] = str(error)

    def seen_site(self, name: str) -> AttentionSite:
        """A site that was seen, also where nothing of it was kept."""
        return self._seen[name]
