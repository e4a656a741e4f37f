"""Which tokens of an attention are text, image or anything else: told by the user, or read off the model.

Reading: while every head writes nothing, tokens do not learn of each other; then the queries and keys that change when one input of the
model changes are those that were made from it. This needs no knowledge of any model's layout.

Letters: B batch, H heads, Q queries, K keys, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from headscope.interventions.positions import Role
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception import intercept

Positions: TypeAlias = Sequence[int] | range | slice
Roles: TypeAlias = Mapping[str, "Positions | Mapping[str, tuple[int, ...]]"]


def known_roles(roles: Roles | None, wanted: Sequence[Role]) -> dict[Role, Any]:
    """The positions of each role that is wanted, as a region looks them up.

    Raises:
        SelectionError: a role that was not given, or that has no token.
    """
    found: dict[Role, Any] = {}
    for role in wanted:
        if roles is None or role.name not in roles:
            known = f"known are {', '.join(roles)}" if roles else "none were given"
            raise SelectionError(
                f"role({role.name!r}): {known}; give plan.on(model, roles={{{role.name!r}: range(...)}}), or what "
                "find_roles(model, inputs, ...) found"
            )
        positions = roles[role.name]
        if isinstance(positions, Mapping):
            found[role] = positions
            continue
        if isinstance(positions, slice):
            raise SelectionError(f"role {role.name!r} is a slice: give a range or list of positions")
        listed = tuple(int(position) for position in positions)
        if not listed:
            raise SelectionError(f"role {role.name!r} has no token: leave it out")
        found[role] = [listed]
    return found


def find_roles(
    model: nn.Module, inputs: Mapping[str, Any], of: Mapping[str, str | Sequence[str]], *, seed: int = 0
) -> dict[str, dict[str, tuple[int, ...]]]:
    """For each role, its queries (`site/q`) and keys (`site/k`) at every site, and before rotation where two streams are projected.

    Args:
        model: in eval mode; nothing of it is changed.
        inputs: its keyword inputs.
        of: for each role the inputs that its tokens are made from, such as {"text": "encoder_hidden_states", "image": "hidden_states"}.
        seed: of the change.

    Raises:
        InputError: an input that is not there or cannot be changed.
        SelectionError: a role whose input changes no token, or two roles that share tokens.
    """
    base = _tokens(model, inputs)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    generator = torch.Generator().manual_seed(seed)
    for role, names in of.items():
        changed = dict(inputs)
        for name in [names] if isinstance(names, str) else names:
            if not isinstance(inputs.get(name), Tensor):
                raise InputError(f"role {role!r}: there is no tensor {name!r} among the inputs {', '.join(inputs)}")
            changed[name] = _altered(inputs[name], generator)
        other = _tokens(model, changed)
        places: dict[str, tuple[int, ...]] = {}
        for place, tensor in base.items():
            if place in other and other[place].shape == tensor.shape:
                moved = (other[place] != tensor).any(0).any(0).any(-1)  # [tokens]
                if bool(moved.any()):
                    places[place] = tuple(moved.nonzero().flatten().tolist())
        if not places:
            raise SelectionError(f"role {role!r}: no query and no key changes with {names!r}")
        found[role] = places
    for place in base:
        told = [(role, set(places[place])) for role, places in found.items() if place in places]
        for index, (role, mine) in enumerate(told):
            for other_role, theirs in told[:index]:
                if mine & theirs:
                    raise SelectionError(
                        f"at {place} the roles {other_role!r} and {role!r} share {len(mine & theirs)} tokens: the model mixes these inputs "
                        "outside of attention; give roles by position instead"
                    )
    return found


def _altered(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
        return tensor + drawn * (tensor.float().std().to(tensor) if tensor.numel() > 1 else 1)
    if tensor.dtype == torch.bool:
        raise InputError("an input of true and false cannot tell which tokens come from it: name the one that they are made from")
    return torch.where(tensor > 0, tensor - 1, tensor + 1)


@dataclass(eq=False)
class _Unmixed:
    """A handler that lets no head write, and keeps queries and keys."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    changes: bool = True

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"q.pre", "k.pre", "z"}) if site.mechanism == "module" else frozenset({"z"})

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        if stage == "z":
            return torch.zeros_like(value)
        if call.part:
            self.kept[f"{call.site.name}@{call.part}/{stage[0]}"] = value.detach().clone()
        return value

    def see(self, call: AttentionCall) -> None:
        if call.step == 0:
            self.kept[f"{call.site.name}/q"] = call.q.detach().clone()
            self.kept[f"{call.site.name}/k"] = call.k.detach().clone()


def _tokens(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Queries and keys of every site, while no token learns of another."""
    handler = _Unmixed()
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), torch.no_grad(), intercept(model, handler):
        model(**inputs)
    return handler.kept
