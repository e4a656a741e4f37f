"""`attribute`: one forward under the rules, one backward, and the books.

Letters: B batch, S tokens, H query heads, Q queries, K keys, V width of a value.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, InputError, NonFiniteError, SelectionError
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.baselines import METHODS, answer, check_options
from headscope.probe.attribution.elementwise import settled
from headscope.probe.attribution.engine import Leaf, RuleMode
from headscope.probe.attribution.ledger import Books, Ledger
from headscope.probe.attribution.question import Question, at_least, floating
from headscope.probe.attribution.rules import RULE_SETS, RuleSet, rule_set
from headscope.probe.attribution.target import Scalar, Target, one_number, value_of
from headscope.probe.call import AttentionCall, AttentionSite, Handler
from headscope.probe.interception.intercept import intercept
from headscope.probe.interception.mode import beneath
from headscope.probe.interception.place import clean_path
from headscope.probe.keep import Keep
from headscope.probe.record import Record
from headscope.probe.recorder import Recorder

RULE_OPTIONS = {"attnlrp-gamma": ("gamma",), "gim": ("temperature",)}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


@dataclass(eq=False)
class Taps:
    """An interception handler that keeps each head's output z, in the graph, and what a map needs."""

    maps: bool
    z: dict[str, list[Tensor]] = field(default_factory=dict)
    sites: dict[str, AttentionSite] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    changes: bool = False

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"z"})

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"pattern"}) if self.maps else frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        alias = value.view_as(value)
        self.z.setdefault(call.site.name, []).append(alias)
        return alias

    def see(self, call: AttentionCall) -> None:
        self.sites[call.site.name] = call.site
        if self.maps and not call.recomputed:
            self.records[call.site.name] = Recorder(Keep(qk=True, v=True), None).record(call)


def attribute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: int | Target | Scalar | None = None,
    method: str = "attnlrp",
    *,
    tokenizer: Any = None,
    heads: bool = True,
    layers: bool = True,
    maps: bool = False,
    training: bool = False,
    **options: Any,
) -> Attribution:
    """Relevance of inputs, heads and layers for a target, by rules of layer-wise relevance propagation; any model, one backward pass.

    Other methods go by the same name and give the same result, with relevance of inputs only and without books.

    Args:
        model: any nn.Module; nothing of it is changed.
        inputs: its keyword inputs. Relevance goes to floating-point tensors and to embedding lookups by integer tensors.
        target: a class or token, a `Target`, or a function of the output that returns one number; None takes the largest logit.
        method: rules, `attnlrp`, `cp-lrp`, `relp`, `gim`, `attnlrp-position`, `attnlrp-gamma` or `gradient-x-input`; or
            `integrated-gradients`, `layer-integrated-gradients`, `layer-gradient-x-activation`, `shapley-sampling`, `kernel-shap`,
            `lime`, `feature-ablation`, `occlusion`, `attention`, `rollout`, `flow`, `chefer`, `value-zeroing`, `gradient-norm`,
            `random` or `position`.
        tokenizer: names the tokens of the result.
        heads: give the relevance of every head.
        layers: give the relevance at the residual stream, and of the parts of each block.
        maps: keep what `Attribution.map` needs: q, k and v of every site.
        training: allow a model in training mode, where dropout makes the result random.
        options: of the method: `gamma` of attnlrp-gamma, `temperature` of gim; for the others see `gradient_methods`,
            `perturbation_methods`, `attention_methods` and `baselines`, where each is a function of its options.

    Raises:
        AttributionError: a target that is no single number or does not depend on the inputs; inputs without anything differentiable.
        SelectionError: a method, class, token or position that does not exist.
        InputError: a model in training mode, unless allowed; a last token that is padding; an option that the method has not.
        HeadscopeError: the method needs a library that is not installed.
        NonFiniteError: a relevance is NaN or infinite.
        NotIntercepted: attention that cannot be followed.
    """
    question = Question.of(model, inputs, target, tokenizer, training)
    if method in METHODS:
        if maps:
            raise InputError(f"{method} makes no maps: those are of the rules {', '.join(RULE_SETS)}")
        return _by_method(method, question, options)
    if method not in RULE_SETS:
        near = difflib.get_close_matches(method, [*RULE_SETS, *METHODS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SelectionError(f"no method {method!r}: there are {', '.join([*RULE_SETS, *METHODS])}{hint}")
    allowed = RULE_OPTIONS.get(method, ())
    check_options(method, options, dict.fromkeys(allowed, False))
    at_least(0, **options)
    return _by_rules(replace(rule_set(method), **options), question, heads, layers, maps)


def _by_method(method: str, question: Question, options: Mapping[str, Any]) -> Attribution:
    """What a method without rules found, in the form of all attributions."""
    started = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        output = question.model(**question.inputs)
        value = float(question.read(output).sum(dtype=torch.float64))
        named = question.named(output)
    with torch.inference_mode(False), torch.enable_grad():
        found = answer(method, question, options)
    for relevances in (found.inputs, found.blocks, found.parts):
        _check_finite(list(relevances), list(relevances.values()))
    return Attribution(
        method=method,
        target=named.describe(),
        value=value,
        inputs=found.inputs,
        blocks=found.blocks,
        parts=found.parts,
        warnings=found.warnings,
        tokens=question.tokens(),
        pieces=question.pieces(),
        special=question.special(),
        settings={**found.settings, **_settings(named, started)},
    )


def _settings(question: Question, started: float) -> dict[str, object]:
    return {
        "target": question.scalar.to_dict() if isinstance(question.scalar, Target) else None,
        "seconds": time.perf_counter() - started,
    }


@contextmanager
def ruled(question: Question, handler: Handler, rules: RuleSet, books: Books | None = None) -> Iterator[tuple[RuleMode, dict[str, Tensor]]]:
    """While the block runs, the model's forward pass records the rules.

    Gives the mode, and the floating-point inputs to call the model with.
    """
    floats = {name: value.detach().clone().requires_grad_() for name, value in question.floats.items()}
    with ExitStack() as stack:
        session = stack.enter_context(intercept(question.model, handler, strict=False))
        mode = RuleMode(rules, books, session, question.indices, exact=rules.conserves and _is_double(question.model))
        if rules.identity:
            stack.enter_context(settled(question.model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(beneath(mode))
        yield mode, floats


def _by_rules(rules: RuleSet, question: Question, heads: bool, layers: bool, maps: bool) -> Attribution:
    """One forward under the rules, one backward."""
    started = time.perf_counter()
    inputs, indices = question.inputs, question.indices
    taps, stream = Taps(maps), Stream()
    books = Books() if rules.conserves else None
    with stream.watched(question.model) if layers else nullcontext(), ruled(question, taps, rules, books) as (mode, floats):
        output = question.model(**{**inputs, **floats})
        value = one_number(question.read(output).sum())
    named = question.named(output)
    leaves = [*mode.leaves, *(Leaf(name, False, tensor) for name, tensor in floats.items())]
    if not leaves:
        raise AttributionError(
            "no input of this model is differentiable: give floating-point inputs, or integers that it looks up by embedding"
        )
    wanted: dict[str, Tensor] = {}
    if heads:
        wanted |= {f"z {name}": z for name, found in taps.z.items() for z in found[-1:] if z.requires_grad}
    if layers:
        wanted |= {f"stream {path}": tensor for path, tensor in stream.kept(taps.sites.values()).items()}
    gradients = torch.autograd.grad(value, [*(leaf.tensor for leaf in leaves), *wanted.values()], allow_unused=True)
    relevance = [
        torch.zeros_like(x.real if x.is_complex() else x) if g is None else _product(x.detach(), g)
        for x, g in zip([*(leaf.tensor for leaf in leaves), *wanted.values()], gradients, strict=True)
    ]
    _check_finite([*(leaf.name for leaf in leaves), *wanted], relevance)
    at_leaves, rest = relevance[: len(leaves)], dict(zip(wanted, relevance[len(leaves) :], strict=True))
    found, constants = _by_input(leaves, at_leaves, inputs)
    ledger = None
    if books is not None:
        dtype = next((leaf.tensor.dtype for leaf in leaves), torch.float32)
        ledger = Ledger(
            value_of(value), sum(float(r.sum(dtype=torch.float64)) for r in found.values()), constants, books.entries(), TOLERANCE[dtype]
        )
    unruled = () if books is None else tuple((*key, count) for key, count in books.unruled.items())
    sites = tuple(taps.sites.values())
    z_gradients = {name: g for name, g in zip(wanted, gradients[len(leaves) :], strict=True) if name.startswith("z ")}
    return Attribution(
        method=rules.name,
        target=named.describe(),
        value=value_of(value),
        inputs={name: r.sum(-1) if name in indices else r for name, r in found.items()},
        heads={name[2:]: r.sum(-1) for name, r in rest.items() if name.startswith("z ")},
        blocks={name[7:]: _over_width(r) for name, r in rest.items() if name.startswith("stream ") and name[7:] in stream.blocks},
        parts={name[7:]: _over_width(r) for name, r in rest.items() if name.startswith("stream ") and name[7:] not in stream.blocks},
        sites=sites,
        ledger=ledger,
        unruled=unruled,
        warnings=_warnings(rules, ledger, unruled, sites, taps),
        tokens=question.tokens(),
        pieces=question.pieces(),
        special=question.special(),
        settings={"rules": rules.name, "source": rules.source, **_options(rules), **_settings(named, started)},
        maps=(lambda site, rows: _map(taps.records[site], z_gradients.get(f"z {site}"), rows)) if maps else None,
    )  # fmt: skip


@dataclass(eq=False)
class Stream:
    """What the blocks of a model, and their parts, give out."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    blocks: set[str] = field(default_factory=set)

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Note the outputs of everything that stands in a list of modules, and of its children."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                path = clean_path(name)
                if re.search(r"(^|\.)\d+$", path) is None:
                    continue
                for part, child in (("", module), *module.named_children()):
                    if isinstance(child, torch.jit.ScriptModule):  # takes no hooks
                        continue
                    where = f"{path}.{part}" if part else path
                    stack.callback(child.register_forward_hook(self._noting(where)).remove)
            yield

    def _noting(self, path: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            first = result[0] if isinstance(result, tuple | list) and result else result
            with torch._C.DisableTorchFunction():  # to look is no call of the model
                if isinstance(first, Tensor) and first.requires_grad and first.is_floating_point():
                    self.outputs[path] = first

        return note

    def kept(self, sites: Any) -> dict[str, Tensor]:
        """The outputs of the blocks that hold a site, and of their parts that have weights."""
        for site in sites:
            match = re.match(r"(.*?(?:^|\.)\d+)(?=\.|$)", site.module)
            if match is not None:
                self.blocks.add(match[1])
        return {path: tensor for path, tensor in self.outputs.items() if path in self.blocks or path.rpartition(".")[0] in self.blocks}


def _options(rules: RuleSet) -> dict[str, object]:
    return {name: getattr(rules, name) for name in RULE_OPTIONS.get(rules.name, ())}


def _is_double(model: nn.Module) -> bool:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32) == torch.float64


def _check_finite(names: Sequence[str], relevance: Sequence[Tensor]) -> None:
    for name, r in zip(names, relevance, strict=True):
        if math.isfinite(float(r.sum(dtype=torch.float64))):  # NaN and infinity never sum to a number
            continue
        if not bool(torch.isfinite(r).all()):
            raise NonFiniteError(
                f"the relevance of {name} is not finite: the model or its gradient overflows; use float32 instead of half precision"
            )


def _by_input(leaves: Sequence[Leaf], relevance: Sequence[Tensor], inputs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Relevance by input, and that at lookups which no input's values decide."""
    found: dict[str, Tensor] = {}
    constants: dict[str, float] = {}
    for leaf, r in zip(leaves, relevance, strict=True):
        if leaf.constant:
            constants[leaf.name] = constants.get(leaf.name, 0.0) + float(r.sum(dtype=torch.float64))
            continue
        given = inputs.get(leaf.name)
        if isinstance(given, Tensor) and not floating(given) and r.shape[:-1] != given.shape:
            r = r.transpose(0, 1) if r.shape[:-1] == given.mT.shape else r.reshape(*given.shape, -1)
        found[leaf.name] = r if leaf.name not in found else _added(found[leaf.name], r)
    return found, constants


def _added(a: Tensor, b: Tensor) -> Tensor:
    """Two lookups by one input: their widths may differ."""
    return a + b if a.shape == b.shape else torch.cat([a, b], dim=-1)


def _product(x: Tensor, g: Tensor) -> Tensor:
    """x·g, a real number also where they are complex."""
    return x.real * g.real + x.imag * g.imag if x.is_complex() else x * g


def _over_width(r: Tensor) -> Tensor:
    return r.sum(-1) if r.dim() > 2 else r


def _warnings(
    rules: RuleSet, ledger: Ledger | None, unruled: Sequence[tuple[str, str, int]], sites: Sequence[AttentionSite], taps: Taps
) -> tuple[str, ...]:
    found = []
    if ledger is None:
        found.append(f"{rules.name} does not conserve relevance: its numbers do not sum to anything")
    elif not ledger.closes:
        found.append(f"the books do not close: {ledger.residual:.3g} of {ledger.target:.6g} is unaccounted for")
    if unruled:
        names = sorted({operation for operation, _, _ in unruled})
        found.append(f"no rule for {', '.join(names)}: relevance passed by the plain gradient")
    if ledger is not None:
        gates = ledger.by_kind().get("gate", 0.0)
        if abs(gates) > 0.1 * max(abs(ledger.target), 1e-12):
            found.append(f"gates that are not zero at zero (sigmoid, exp and the like) absorbed {gates:.3g} of {ledger.target:.6g}")
    if not sites:
        found.append("no attention was caught in this model")
    several = [name for name, z in taps.z.items() if len(z) > 1]
    if several:
        found.append(f"{len(several)} sites ran more than once; the relevance of heads is that of their last call")
    return tuple(found)


def _map(record: Record, gradient: Tensor | None, rows: Sequence[int] | None) -> Tensor:
    """pattern · ⟨v, g⟩, [B, H, rows, K]."""
    pattern = record.pattern(None, None if rows is None else list(rows))
    v = record.get("v")
    if gradient is None:
        return torch.zeros_like(pattern)
    g = gradient if rows is None else gradient[:, :, list(rows)]
    if v.shape[1] != g.shape[1]:
        v = v.repeat_interleave(g.shape[1] // v.shape[1], dim=1)
    return pattern * (g @ v.transpose(-2, -1))
