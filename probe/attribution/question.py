"""What an attribution is asked, and where a model's inputs become differentiable.

Letters: B batch, S tokens, E width of the embedding, n copies of the batch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, HeadscopeError, InputError
from headscope.probe.attribution.engine import same_values
from headscope.probe.attribution.target import Scalar, Target, as_target, logits_of, one_number_of
from headscope.probe.attribution.words import pieces_of
from headscope.probe.interception.intercept import check_model


@dataclass(frozen=True, eq=False)
class Question:
    """Why a model gave this value for these inputs.

    Attributes:
        model: nothing of it is changed.
        inputs: its keyword inputs.
        scalar: the target, a `Target` or a function of the output.
        tokenizer: names tokens, or None.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    scalar: Target | Scalar
    tokenizer: Any = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        inputs: Mapping[str, Any],
        target: int | Target | Scalar | None,
        tokenizer: Any = None,
        training: bool = False,
    ) -> Question:
        """A question that can be answered.

        Raises:
            InputError: no keyword inputs; a model in training mode, unless allowed; a last token that is padding.
            AttributionError: a target that is none.
        """
        question = cls(check_model(model), inputs, as_target(target), tokenizer)
        question._check(training)
        return question

    def _check(self, training: bool) -> None:
        if not isinstance(self.inputs, Mapping):
            raise InputError(
                f"inputs is {type(self.inputs).__name__}: give the model's keyword inputs, such as tokenizer(text, return_tensors='pt')"
            )
        if not training and any(module.training for module in self.model.modules()):
            raise InputError(
                "the model is in training mode, where dropout makes results random: call model.eval() first, or pass training=True"
            )
        mask = self.inputs.get("attention_mask")
        if (
            isinstance(self.scalar, Target)
            and -1 in self.scalar.positions
            and isinstance(mask, Tensor)
            and mask.dim() == 2
            and not bool(mask[:, -1].all())
        ):
            raise InputError(
                "the last token of a sample is padding, so its prediction means nothing: pad on the left, or give target positions"
            )

    @property
    def batch(self) -> int:
        """B, by the first input that is a tensor with axes."""
        return next((v.shape[0] for v in self.inputs.values() if isinstance(v, Tensor) and v.dim()), 1)

    @property
    def floats(self) -> dict[str, Tensor]:
        """The floating-point inputs."""
        return {name: v for name, v in self.inputs.items() if floating(v)}

    @property
    def indices(self) -> dict[str, Tensor]:
        """The integer inputs."""
        return {name: v for name, v in self.inputs.items() if isinstance(v, Tensor) and not floating(v) and v.dtype != torch.bool}

    def samples(self) -> Iterator[Question]:
        """One question for each sample of the batch.

        Raises:
            InputError: the target is a function, which may look at the whole batch, and there are several samples.
        """
        count = self.batch
        if count > 1 and not isinstance(self.scalar, Target):
            raise InputError(
                f"this method takes {count} samples one by one, but the target is a function of the whole output: give a Target"
            )
        for place in range(count):
            own = {
                name: v[place : place + 1] if isinstance(v, Tensor) and v.dim() and v.shape[0] == count else v
                for name, v in self.inputs.items()
            }
            yield replace(self, inputs=own)

    def resolved(self) -> Question:
        """The same for one sample, with the largest logit of these inputs named. One forward where there is something to name."""
        if not isinstance(self.scalar, Target) or self.scalar.ids is not None:
            return self
        with torch.no_grad():
            return replace(self, scalar=self.scalar.resolved(self.model(**self.inputs)))

    def named(self, output: Any) -> Question:
        """The same with the largest logit of this output named, where it is of one sample."""
        if not isinstance(self.scalar, Target) or self.scalar.ids is not None or logits_of(output).shape[0] != 1:
            return self
        with torch.no_grad():
            return replace(self, scalar=self.scalar.resolved(output))

    def describe(self) -> str:
        """The target in words."""
        if not isinstance(self.scalar, Target):
            return f"{getattr(self.scalar, '__name__', type(self.scalar).__name__)}(output)"
        return self.scalar.describe(str if self.tokenizer is None else lambda id: repr(self.tokenizer.decode([id])))

    def tokens(self) -> list[list[str]] | None:
        """[B][S], the text of each token; None without a tokenizer or text."""
        ids = self.inputs.get("input_ids")
        if self.tokenizer is None or not isinstance(ids, Tensor):
            return None
        return [[self.tokenizer.decode([int(id)]) for id in row] for row in ids]

    def pieces(self) -> list[list[str]] | None:
        """[B][S], each token as it stands in the text; None without a tokenizer or text."""
        ids = self.inputs.get("input_ids")
        if self.tokenizer is None or not isinstance(ids, Tensor):
            return None
        return [pieces_of(self.tokenizer, row.tolist()) for row in ids]

    def special(self) -> Tensor | None:
        """[B, S] bool, tokens that are no part of the text; None where the tokenizer does not tell."""
        ids, given = self.inputs.get("input_ids"), getattr(self.tokenizer, "all_special_ids", None)
        if not isinstance(ids, Tensor) or given is None:
            return None
        return torch.isin(ids, torch.tensor(list(given), dtype=ids.dtype, device=ids.device))

    # -- differentiable inputs -------------------------------------------------------------------------------------

    def entrances(self) -> dict[str, Tensor]:
        """By input, what the model reads of it: the embeddings [B, S, E] of token ids, floating-point tensors themselves. One forward.

        Raises:
            AttributionError: nothing is differentiable, or token ids are not looked up by an embedding module.
        """
        found: dict[str, Tensor] = {}

        def note(name: str, looked_up: Tensor) -> None:
            found.setdefault(name, looked_up.detach().clone())

        with torch.no_grad(), self._lookups(self.inputs, note):
            self.model(**self.inputs)
        found |= {name: value.detach() for name, value in self.floats.items()}
        if not found:
            raise AttributionError(
                "no input of this model is differentiable: give floating-point inputs, or integers that an embedding module looks up"
            )
        return {name: found[name] for name in self.inputs if name in found}

    def values(self, entrances: Mapping[str, Tensor]) -> Tensor:
        """[n·B], the target with these in place of what the model would read; [1] where the target is a function."""
        count = next(iter(entrances.values())).shape[0] // self.batch
        inputs = {name: copied(value, count, self.batch) for name, value in self.inputs.items()}
        own = {name: value.clone() for name, value in entrances.items()}  # the model may write into what it reads
        inputs |= {name: value for name, value in own.items() if name in self.floats}
        with self._lookups(inputs, lambda name, _: own.get(name)):
            output = self.model(**inputs)
        return self.read(output)

    def read(self, output: Any) -> Tensor:
        """The target of each sample; [1] where it is a function."""
        return self.scalar.each(output) if isinstance(self.scalar, Target) else one_number_of(self.scalar(output)).reshape(1)

    @contextmanager
    def _lookups(self, inputs: Mapping[str, Any], act: Any) -> Iterator[None]:
        """Call `act(name, what was looked up)` at every embedding of an integer input; what it returns, if anything, takes its place."""
        own = _token_embedding(self.model)
        weight = getattr(own, "weight", None)

        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
            index = args[0] if args else None
            if not isinstance(index, Tensor) or floating(index) or not isinstance(result, Tensor) or result.shape[:-1] != index.shape:
                return None
            name = next((key for key in self.indices if same_values(index, inputs[key])), None)
            if name is None or index.shape not in (inputs[name].shape, inputs[name].mT.shape):
                return None
            if index.shape == inputs[name].shape:
                return act(name, result)
            instead = act(name, result.transpose(0, 1))  # some models put the batch second
            return None if instead is None else instead.transpose(0, 1)

        with ExitStack() as stack:
            for module in self.model.modules():
                if module is own or (isinstance(module, nn.Embedding) and (weight is None or module.weight is weight)):
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def embedding(self, name: str, ids: Tensor) -> Tensor:
        """[B, S, E], what the model would read for other token ids of an input."""
        return replace(self, inputs={**self.inputs, name: ids}).entrances()[name]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method found; `attribute` makes an `Attribution` of it. Fields as there."""

    inputs: Mapping[str, Tensor]
    settings: Mapping[str, object]
    warnings: tuple[str, ...] = ()
    blocks: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)


def _token_embedding(model: nn.Module) -> Any:
    """The module that a transformers model says looks up its tokens; None where it says nothing."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        return find() if callable(find) else None
    except NotImplementedError:
        return None


def floating(value: Any) -> bool:
    """Whether this is a tensor with a gradient to it."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def copied(value: Any, count: int, batch: int) -> Any:
    """A tensor of a batch, count times; whatever is no such tensor stays itself."""
    return value.repeat(count, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value


def needs(module: str, method: str) -> Any:
    """An optional library.

    Raises:
        HeadscopeError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"captum": "captum", "sklearn": "scikit-learn", "scipy": "scipy"}[module.partition(".")[0]]
        raise HeadscopeError(f"{method} needs {package}, which is not installed: pip install 'headscope[attribution]'") from error


def at_least(one: int, **numbers: float) -> None:
    """Raises InputError for an option that is smaller."""
    for name, number in numbers.items():
        if number < one:
            raise InputError(f"{name}={number}: give {one} or more")
