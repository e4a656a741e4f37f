"""A target's value with some units of the input removed: what every perturbation and every faithfulness measure asks for.

Letters: n candidate sets, U units, B batch, S tokens, H query heads, Q queries, V width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, InputError, NonFiniteError, SelectionError, ShapeError
from headscope.probe.attribution.head_removal import head_units, zeroed_heads
from headscope.probe.attribution.target import Scalar, Target, as_target, logits_of, one_number_of
from headscope.probe.attribution.units import Units, units_of

OF_TEXT = ("token", "delete", "attention", "zero-embedding", "mean-embedding")
OF_IMAGES = ("zero", "mean", "blur")
REMOVALS = (*OF_TEXT, *OF_IMAGES, "heads")
BLUR = 9  # pixels of the box that blurs, applied twice


class Value:
    """value(keep) is the target's value of one sample, [n] for keep [n, U] bool, with the units that are not kept removed.

    Args:
        model: in eval mode; nothing of it is changed.
        inputs: keyword inputs of one sample.
        target: as in `attribute`; the largest logit is that of the intact input.
        removal: for text `token` (another token stands there), `delete` (the text closes up), `attention` (the mask hides it),
            `zero-embedding` or `mean-embedding`; for images `zero`, `mean` or `blur`. None takes `token` and `zero`. For any
            model `heads`: the units are its attention heads, and a removed one's output z is zero at every position.
        units: what is removed; None for tokens or patches. `heads` has its own.
        tokenizer: names tokens, and knows which token to put in place of a removed one.
        replacement: that token's id.
        batch: sets that are run together.

    Raises:
        InputError: more than one sample, a removal that this input cannot have, a model in training mode.
        SelectionError: there is no such removal.
        AttributionError: a target that is no single number.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: int | Target | Scalar | None = None,
        *,
        removal: str | None = None,
        units: Units | None = None,
        tokenizer: Any = None,
        replacement: int | None = None,
        batch: int = 32,
    ) -> None:
        if batch < 1:
            raise InputError(f"batch {batch}: give 1 or more")
        self.model, self.inputs, self.batch = model, dict(inputs), batch
        if any(module.training for module in model.modules()):
            raise InputError("the model is in training mode, where dropout makes values random: call model.eval() first")
        if removal is not None and removal not in REMOVALS:
            raise SelectionError(f"no removal {removal!r}: there are {', '.join(REMOVALS)}")
        if removal == "heads" and units is not None:
            raise InputError("the units of the removal 'heads' are the heads of the model: leave units= out")
        if removal == "heads":
            units = head_units(model, inputs)
        self.units = units_of(inputs, tokenizer, apart=placeholders(model)) if units is None else units
        self.removal = _fitting(removal, self.units, inputs)
        self.replacement = replacement
        if self.removal == "token" and replacement is None:
            self.replacement = neutral_token(tokenizer, model)
        self.forwards = 0  # sets that went through the model
        scalar = as_target(target)
        if isinstance(scalar, Target):
            if self.removal == "delete" and set(scalar.positions) != {-1}:
                raise InputError("deletion moves the positions of a target: choose another removal, or the target at the last token")
            with torch.no_grad():
                scalar = scalar.resolved(model(**self.inputs))
        self.target: Target | Scalar = scalar

    def __call__(self, keep: Tensor) -> Tensor:
        """[n] in float64, the value with only these units kept, keep [n, U] bool.

        Raises:
            ShapeError: keep of another shape.
            NonFiniteError: a value is NaN or infinite.
        """
        return self.read(keep)[0]

    def read(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The value, and the probability of the target's tokens or classes, both [n] in float64.

        A contrast, a function, and a model with a single output have no probability: theirs is the value again.

        Raises:
            ShapeError: keep of another shape.
            NonFiniteError: a value is NaN or infinite.
        """
        if keep.dim() == 1:
            raise ShapeError(f"keep is {list(keep.shape)}; give [n, {len(self.units)}]")
        stay = self.units.cover(keep)
        found = torch.empty(2, len(keep), dtype=torch.float64)
        for chosen, inputs, hooks in self._batches(stay):
            with torch.no_grad(), hooks:
                found[:, chosen] = self._read(self.model(**inputs), len(chosen)).cpu()
            self.forwards += len(chosen)
        if not bool(torch.isfinite(found).all()):
            raise NonFiniteError(
                f"the target is not finite with some units removed by {self.removal!r}: choose another removal, or float32 for 16 bits"
            )
        return found[0], found[1]

    def whole(self) -> float:
        """The value of the intact input."""
        return float(self(torch.ones(1, len(self.units), dtype=torch.bool))[0])

    def _read(self, output: Any, count: int) -> Tensor:
        """[2, count], value and probability."""
        if isinstance(self.target, Target):
            values = self.target.each(output).double()
            return torch.stack([values, values if not has_probability(self.target, output) else _probability(self.target, output)])
        if count != 1:
            raise AttributionError("a function as target sees one sample at a time: give batch=1")
        return one_number_of(self.target(output)).double().reshape(1).expand(2, 1)

    def _batches(self, stay: Tensor) -> Iterator[tuple[list[int], dict[str, Any], ExitStack]]:
        """The sets in batches: their places, the model's inputs, and what must be entered to run them."""
        if self.removal == "delete":
            by_length: dict[int, list[int]] = {}
            for place, length in enumerate(stay.sum(1).tolist()):
                by_length.setdefault(length, []).append(place)
            orders = list(by_length.values())
        else:
            orders = [list(range(len(stay)))]
        size = self.batch if isinstance(self.target, Target) else 1
        for order in orders:
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                hooks = ExitStack()
                yield chosen, self._removed(stay[chosen], hooks), hooks

    def _removed(self, stay: Tensor, hooks: ExitStack) -> dict[str, Any]:
        """The inputs of a batch with what does not stay [n, *places] removed."""
        count = len(stay)
        inputs = {name: repeated(value, count) for name, value in self.inputs.items()}
        if self.removal == "heads":
            hooks.enter_context(zeroed_heads(self.model, stay))
            return inputs
        name = self.units.input
        given: Tensor = inputs[name]
        stay = stay.to(given.device)
        if self.removal == "token":
            inputs[name] = torch.where(stay, given, given.new_tensor(self.replacement))
        elif self.removal == "attention":
            key = name.replace("input_ids", "attention_mask")
            mask = inputs.get(key)
            inputs[key] = stay.long() if mask is None else mask * stay.to(mask.dtype)
        elif self.removal == "delete":
            along = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.shape[:2] == given.shape[:2]}
            for key, value in along.items():
                left = value[stay].reshape(count, -1, *value.shape[2:])
                inputs[key] = value[:, : left.shape[1]] if key == "position_ids" else left
            if inputs[name].shape[1] == 0:
                raise InputError("deleting every token leaves no text: choose another removal, or units= that leave a token")
        elif self.removal.endswith("-embedding"):
            hooks.enter_context(blanked(self.model, given, stay, self.removal == "mean-embedding"))
        else:
            stay = stay.reshape(count, *[1] * (given.dim() - 1 - len(self.units.shape)), *self.units.shape)
            inputs[name] = torch.where(stay, given, self._background(given))
        return inputs

    def _background(self, image: Tensor) -> Tensor:
        if self.removal == "zero":
            return torch.zeros_like(image)
        if self.removal == "mean":
            return image.mean(list(range(-len(self.units.shape), 0)), keepdim=True).expand_as(image)
        side = min(BLUR, *(size - 1 + size % 2 for size in image.shape[-2:]))
        blurred = image
        for _ in range(2):
            blurred = nn.functional.avg_pool2d(blurred, side, 1, side // 2, count_include_pad=False)
        return blurred


@contextmanager
def blanked(model: nn.Module, ids: Tensor, stay: Tensor, mean: bool) -> Iterator[None]:
    """While the block runs, every lookup of `ids` [n, S] gives zero, or the mean over the sample, in place of what does not stay.

    Lookups of anything else, such as positions or the tokens of a decoder, stay as they are.

    Raises:
        InputError: these ids were never looked up by an embedding.
    """
    hits = 0

    def hook(module: nn.Module, args: tuple[Any, ...], found: Tensor) -> Tensor:
        nonlocal hits
        if not (args and isinstance(args[0], Tensor) and torch.equal(args[0], ids)):
            return found
        hits += 1
        instead = found.mean(1, keepdim=True) if mean else torch.zeros_like(found)
        return torch.where(stay[..., None], found, instead)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(hook).remove)
        yield
    if not hits:
        raise InputError(
            f"no embedding of {type(model).__name__} looked the tokens up as they were given: choose the removal token, delete or attention"
        )


def has_probability(target: Target, output: Any) -> bool:
    """Whether the target's tokens or classes have a probability: named ones, against nothing, out of two or more."""
    return target.ids is not None and not target.against and logits_of(output).shape[-1] > 1


def _probability(target: Target, output: Any) -> Tensor:
    return replace(target, log_probability=True).each(output).double().exp()


def _fitting(removal: str | None, units: Units, inputs: Mapping[str, Any]) -> str:
    """The removal itself, or the usual one where None is given; raises InputError where these units cannot be removed so."""
    if removal == "heads":
        return removal
    given = inputs.get(units.input)
    if not isinstance(given, Tensor) or given.shape[0] != 1:
        raise InputError(f"units are cut in {units.input!r}, which is not one sample's tensor among {', '.join(inputs)}")
    if tuple(given.shape[-len(units.shape) :]) != units.shape:
        raise InputError(f"{units.input} is {list(given.shape)}; its last axes must be those of the units, {list(units.shape)}")
    allowed = OF_TEXT if not given.is_floating_point() else OF_IMAGES if len(units.shape) == 2 else OF_IMAGES[:2]
    if removal is not None and removal not in allowed:
        raise InputError(f"{units.input} cannot be removed by {removal!r}: choose {', '.join(allowed)}")
    return removal or allowed[0]


def repeated(value: Any, count: int) -> Any:
    """One sample's tensor, count times; whatever is no tensor of one sample stays itself."""
    return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() and value.shape[0] == 1 else value


def placeholders(model: nn.Module) -> set[int]:
    """Token ids in whose places the model puts what it made of an image, a video or a sound: it fails where one of them is missing."""
    config = getattr(model, "config", None)
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    return {found for name in names if isinstance(found := getattr(config, name, None), int)}


def neutral_token(tokenizer: Any, model: nn.Module) -> int:
    """The id that says nothing: mask, else unknown, else padding, else the end of the text.

    Raises:
        InputError: neither tokenizer nor model names one.
    """
    for name in ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id"):
        for source in (tokenizer, getattr(model, "config", None)):
            found = getattr(source, name, None)
            if isinstance(found, int):
                return found
    raise InputError("no mask, unknown, padding or end token is known to stand in for a removed one: give replacement=")
