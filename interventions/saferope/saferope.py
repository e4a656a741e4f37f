"""`SafeRoPE`: what was found of a concept, head by head, and the plan that turns it away.

Letters: N selected heads of a side, D width, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.interventions import gates
from headscope.interventions.edit import Edit
from headscope.interventions.ops import Op
from headscope.interventions.plan import Plan
from headscope.interventions.positions import role as role_named
from headscope.interventions.roles import Roles, find_roles
from headscope.interventions.saferope import saved
from headscope.interventions.saferope.examples import Prompted, checked
from headscope.interventions.saferope.subspaces import basis_of, check_rank, scores_of, separate
from headscope.interventions.saferope.tokens import Side, first_inputs, read_tokens
from headscope.interventions.saferope.training import Schedule, learn, output_of
from headscope.interventions.select import select
from headscope.interventions.subspace import project, rotate
from headscope.kernels.errors import EditError, HeadscopeError, InputError, SelectionError
from headscope.probe.models import model_fingerprint

if TYPE_CHECKING:
    from pandas import DataFrame

KINDS = ("rotate", "half-turn", "project")
SIDES = ("q", "k")


@dataclass(frozen=True, eq=False)
class Turned:
    """The selected heads of one side of one site.

    Attributes:
        side: site and stage.
        heads: [N], query heads at the query side, key/value heads at the key side.
        basis: U, [N, D, R], the subspace of the concept.
        threshold: [N], of the risk score.
        gap: [N], by how much the threshold tells unsafe from safe, as shares.
        skew: A, [N, R, R], exactly skew-symmetric; 0 where nothing was learned.
    """

    side: Side
    heads: tuple[int, ...]
    basis: Tensor
    threshold: Tensor
    gap: Tensor
    skew: Tensor


@dataclass(frozen=True, eq=False)
class SafeRoPE:
    """A concept's subspaces, thresholds and rotations. Made by `fit`, or read by `load`.

    A token x of a selected head becomes U exp(g A) Uᵀ x + (1 - U Uᵀ) x, with g = l · [l > threshold] and the risk score
    l = ‖Uᵀx‖² / ‖x‖². Queries and keys alone are edited: the values carry the concept on to whoever attends to it nevertheless.

    Attributes:
        parts: the sides of the sites at which there are selected heads.
        role: whose tokens are edited; None for all.
        roles: where they are, as `Plan.on(model, roles=saferope.roles)` takes it; None without a role.
        info: rank, counts, schedule, losses at the end, fingerprint and class of the model.
    """

    parts: tuple[Turned, ...]
    role: str | None
    roles: Roles | None
    info: Mapping[str, Any]

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        unsafe: Sequence[Prompted],
        safe: Sequence[Prompted],
        *,
        rank: int = 2,
        role: str | None = None,
        made_from: Mapping[str, str | Sequence[str]] | None = None,
        before: bool = True,
        held_out: float = 0.5,
        least_gap: float = 0.5,
        most_heads: int | None = None,
        schedule: Schedule | None = Schedule(),  # noqa: B008
        train_safe: Sequence[Prompted] | None = None,
        read: Callable[[Any], Tensor] = output_of,
        run: Callable[[Prompted], object] | None = None,
        vary: Callable[[Mapping[str, Any], torch.Generator], Mapping[str, Any]] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> SafeRoPE:
        """Find the concept in every head, choose the heads that tell it apart, and learn how to turn it.

        Args:
            model: in eval mode; nothing of it is changed.
            unsafe, safe: prompts with and without the concept, with their subject tokens. They must not overlap.
            rank: R of the subspaces.
            role: whose tokens are edited, such as "text" in a model that joins text and image; needs `made_from`.
            made_from: for each role the inputs it is made from, as `find_roles` takes it.
            before: edit before rotation wherever the model has a place for it; else after.
            held_out: share of the subject tokens that the thresholds are calibrated on, and not the subspaces.
            least_gap: heads are selected that tell the two sets apart by at least that difference of shares.
            most_heads: and of those the best so many, counted over all sides; None for all.
            schedule: how the rotation is learned; None learns none, for the training-free plans.
            train_safe: what must not change, if more than `safe`, such as safe prompts without a subject.
            read: the tensor of the model's output whose change counts.
            run: how a prompt is run to read its tokens, such as all steps of a pipeline; by default one call of the model.
            vary: fresh inputs at every step of learning; see `learn`.
            progress: told (what, done, in all).

        Raises:
            InputError: sets that are empty or overlap; subjects that are not there.
            EditError: a rank above the width of the heads; no head that tells the sets apart.
        """
        if model.training:
            raise InputError("SafeRoPE.fit() of a model in training mode: call model.eval() first")
        if role is not None and (made_from is None or role not in made_from):
            raise InputError(
                f"role={role!r}: say which inputs its tokens are made from, made_from={{{role!r}: 'encoder_hidden_states', ...}}"
            )
        told_by = None if role is None or made_from is None else made_from[role]
        unsafe, safe = checked(unsafe, safe, [told_by] if isinstance(told_by, str) else told_by)
        if not 0 < held_out < 1:
            raise InputError(f"held_out={held_out!r}: give a share between 0 and 1")
        if most_heads is not None and most_heads < 1:
            raise InputError(f"most_heads={most_heads!r}: give 1 or more, or None for all")
        roles = None if made_from is None else find_roles(model, first_inputs(unsafe), made_from)
        places = None if role is None or roles is None else roles[role]

        def told(what: str) -> Callable[[int, int], None] | None:
            return None if progress is None else lambda done, total: progress(what, done, total)

        bad = read_tokens(model, unsafe, places, before=before, run=run, progress=told("unsafe prompts"))
        good = read_tokens(model, safe, places, before=before, run=run, progress=told("safe prompts"))
        parts = _selected(bad, good, rank, held_out, least_gap, most_heads)
        info: dict[str, Any] = {
            "counts": {f"{side.site} {side.stage}": tokens.shape[1] for side, tokens in bad.items()},
            "rank": rank, "unsafe_tokens": len(next(iter(bad.values()))), "safe_tokens": len(next(iter(good.values()))),
            "heads": sum(len(part.heads) for part in parts), "heads_in_all": sum(tokens.shape[1] for tokens in bad.values()),
            "least_gap": least_gap, "held_out": held_out, "model": type(model).__name__, "fingerprint": model_fingerprint(model),
        }  # fmt: skip
        found = cls(parts, role, roles, info)
        if schedule is None or schedule.steps == 0:
            return found
        random = torch.Generator().manual_seed(schedule.seed)
        starts = [schedule.start * torch.randn(part.skew.shape, generator=random) / 2 for part in parts]

        def plan(matrices: Sequence[Tensor]) -> Plan:
            return found.with_skew(matrices).plan()

        learned, history = learn(
            model, starts, plan, unsafe, safe if train_safe is None else train_safe, schedule, read=read, roles=roles, vary=vary,
            progress=None if progress is None else lambda done, total, words: progress(f"learning, {words}", done, total),
        )  # fmt: skip
        last = {name: [step[name] for step in history if name in step] for name in ("unsafe", "safe")}
        ends = {f"change_{name}": sum(values[-20:]) / len(values[-20:]) for name, values in last.items() if values}
        return replace(found.with_skew(learned), info={**info, "schedule": asdict(schedule), **ends})

    def with_skew(self, matrices: Sequence[Tensor]) -> SafeRoPE:
        """The same with other rotations, one [N, R, R] for each part."""
        return replace(self, parts=tuple(replace(part, skew=matrix) for part, matrix in zip(self.parts, matrices, strict=True)))

    def plan(self, kind: str = "rotate", *, strength: float = 1.0, sides: Sequence[str] = SIDES, gated: bool = True) -> Plan:
        """The edits. `with saferope.plan().on(model, roles=saferope.roles):`

        Args:
            kind: `rotate` by what was learned; without learning `half-turn`, by π in each plane, or `project`, which takes the part away.
            strength: multiplies the angle, or the part taken away; 0 changes nothing to the bit.
            sides: `q`, `k` or both.
            gated: edit a token by its risk, and not below the threshold; else all alike.

        Raises:
            EditError: an unknown kind or side, half-turns of an odd rank, a rotation where none was learned.
        """
        if kind not in KINDS:
            raise EditError(f"kind={kind!r}: the kinds are {', '.join(KINDS)}")
        if not sides or not set(sides) <= set(SIDES):
            raise EditError(f"sides={tuple(sides)!r}: give 'q', 'k' or both")
        if kind == "rotate" and all(not part.skew.requires_grad and not bool(part.skew.any()) for part in self.parts):
            raise EditError("no rotation was learned: fit with a schedule, or use kind='half-turn' or kind='project'")
        edits = []
        for part in self.parts:
            side = part.side.stage[0]
            if side not in sides:
                continue
            heads: dict[str, Any] = {"heads": part.heads} if side == "q" else {"kv_groups": part.heads}
            tokens: dict[str, Any] = {} if self.role is None else {"queries" if side == "q" else "keys": role_named(self.role)}
            gate = gates.risk(part.basis, part.threshold) if gated else 1.0
            edits.append(Edit(part.side.stage, self._op(part, kind, strength), select(part.side.site, **heads, **tokens), gate))
        return Plan(edits)

    def _op(self, part: Turned, kind: str, strength: float) -> Op:
        if kind == "project":
            return project(part.basis, strength)
        return rotate(part.basis, strength * (part.skew if kind == "rotate" else half_turn(part.basis.shape[-1]).expand_as(part.skew)))

    def random_heads(self, seed: int = 0) -> SafeRoPE:
        """A control: as many heads of each side, chosen by chance among those there are, each with the subspace of the one it stands for.

        Raises:
            EditError: every head is selected, so that there is none to choose instead; a part whose number of heads is not known.
        """
        if self.info["heads"] == self.info["heads_in_all"]:
            raise EditError(
                f"all {self.info['heads']} heads are selected, so chance has nothing to choose: fit with most_heads= or least_gap="
            )
        random = torch.Generator().manual_seed(seed)
        parts = []
        for part in self.parts:
            count = self.info.get("counts", {}).get(f"{part.side.site} {part.side.stage}")
            if count is None:
                raise EditError(f"{part.side.site}: it is not known how many heads there are to choose from")
            chosen = tuple(sorted(torch.randperm(count, generator=random)[: len(part.heads)].tolist()))
            parts.append(replace(part, heads=chosen))
        return replace(self, parts=tuple(parts))

    def to_dict(self) -> dict[str, object]:
        """What there is to know but the tensors: sites, stages, heads, thresholds, gaps, and the largest angle of each rotation."""
        parts = [
            {
                "site": part.side.site, "stage": part.side.stage, "heads": list(part.heads), "threshold": part.threshold.tolist(),
                "gap": part.gap.tolist(), "angle": angles(part.skew).tolist(),
            }
            for part in self.parts
        ]  # fmt: skip
        return {"role": self.role, "parts": parts, "info": dict(self.info)}

    def to_json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line a selected head: site, stage, head, gap, threshold, angle; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        rows = [
            {
                "site": part.side.site, "stage": part.side.stage, "head": head, "gap": float(part.gap[place]),
                "threshold": float(part.threshold[place]), "angle": float(angles(part.skew)[place]),
            }
            for part in self.parts
            for place, head in enumerate(part.heads)
        ]  # fmt: skip
        return pandas.DataFrame(rows)

    def save(self, path: str | Path) -> Path:
        """One safetensors file, whole or absent."""
        return saved.write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None, *, force: bool = False) -> SafeRoPE:
        """What `save` wrote.

        Raises:
            RecipeError: no such file, a damaged one, or one that was fitted to another model than `model` (unless `force`, which warns).
        """
        parts, role, roles, info = saved.read(Path(path), model, force)
        return cls(tuple(Turned(*part) for part in parts), role, roles, info)

    def __str__(self) -> str:
        kind = "learned" if any(bool(part.skew.any()) for part in self.parts) else "not learned"
        return f"SafeRoPE(rank {self.info['rank']}, {self.info['heads']} of {self.info['heads_in_all']} heads, rotation {kind})"


def angles(skew: Tensor) -> Tensor:
    """[N], the largest angle of exp(A) in radians, for each A of [N, R, R]."""
    found: Tensor = torch.linalg.eigvalsh(1j * skew.detach().double()).amax(-1).float()
    return found


def half_turn(rank: int) -> Tensor:
    """[R, R], the skew matrix whose exponential turns each of R / 2 planes by π.

    Raises:
        EditError: an odd rank.
    """
    if rank % 2:
        raise EditError(f"half-turns of rank {rank}: planes come in pairs of directions, so the rank has to be even")
    plane = torch.tensor([[0.0, -math.pi], [math.pi, 0.0]])
    return torch.kron(torch.eye(rank // 2), plane)


def _selected(
    bad: Mapping[Side, Tensor], good: Mapping[Side, Tensor], rank: int, held_out: float, least_gap: float, most_heads: int | None
) -> tuple[Turned, ...]:
    """The heads of each side that tell unsafe from safe, with their subspaces and thresholds."""
    best = -1.0
    whole: list[tuple[Side, Tensor, Tensor, Tensor]] = []
    for side, tokens in bad.items():
        if side not in good:
            continue
        check_rank(rank, tokens.shape[2])
        cut = max(rank, round(len(tokens) * (1 - held_out)))
        if cut >= len(tokens):
            raise InputError(
                f"{len(tokens)} unsafe subject tokens for rank {rank}: give more prompts, for some are held out to calibrate on"
            )
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        basis = basis_of(tokens[order[:cut]], rank)
        found = separate(scores_of(tokens[order[cut:]], basis), scores_of(good[side], basis))
        best = max(best, float(found.gap.max()))
        whole.append((side, basis, found.threshold, found.gap))
    if not whole:
        raise SelectionError("unsafe and safe prompts have no side in common")
    gaps = torch.cat([gap for *_, gap in whole])
    limit = least_gap
    if most_heads is not None and int((gaps >= least_gap).sum()) > most_heads:
        limit = max(limit, float(gaps.sort(descending=True).values[most_heads - 1]))
    parts = []
    left = len(gaps) if most_heads is None else most_heads
    for side, basis, threshold, gap in whole:
        chosen = [head for head in range(len(gap)) if float(gap[head]) >= limit][:left]
        left -= len(chosen)
        if chosen:
            parts.append(
                Turned(side, tuple(chosen), basis[chosen], threshold[chosen].float(), gap[chosen], basis.new_zeros(len(chosen), rank, rank))
            )
    if not parts:
        raise EditError(
            f"no head tells the two sets apart by {least_gap}: the best by {best:.2f}; give more prompts, another rank, or lower least_gap"
        )
    return tuple(parts)
