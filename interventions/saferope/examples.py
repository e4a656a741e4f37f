"""What SafeRoPE learns from: inputs of a model, and which of their tokens name the subject.

Letters: B samples of one input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import InputError


@dataclass(frozen=True, eq=False)
class Prompted:
    """One batch of prompts, as the model is given them.

    Attributes:
        inputs: keyword inputs of the model.
        subject: for each of the B samples the tokens that name what the prompt is about, counted within the role that SafeRoPE edits (the
            text tokens), or within the sequence where there are no roles.
    """

    inputs: Mapping[str, Any]
    subject: Sequence[Sequence[int]]

    @property
    def samples(self) -> int:
        """B."""
        return len(self.subject)


def checked(
    unsafe: Iterable[Prompted], safe: Iterable[Prompted], told_by: Sequence[str] | None = None
) -> tuple[list[Prompted], list[Prompted]]:  # fmt: skip
    """Both sets as lists.

    Args:
        unsafe, safe: the examples.
        told_by: the inputs that say what a prompt is, such as the encoded text; all tensors where it is None. Two samples that agree in
            them are one prompt, whatever noise they come with.

    Raises:
        InputError: an empty set, samples without a subject, or a prompt that stands in both.
    """
    found = list(unsafe), list(safe)
    for name, examples in zip(("unsafe", "safe"), found, strict=True):
        if not examples:
            raise InputError(f"the {name} set is empty: give at least one Prompted(inputs, subject)")
        for number, example in enumerate(examples):
            if not isinstance(example, Prompted):
                raise InputError(f"{name}[{number}] is {type(example).__name__}: give Prompted(inputs, subject)")
            sizes = {value.shape[0] for value in example.inputs.values() if isinstance(value, Tensor) and value.ndim > 1}
            if example.samples not in sizes and sizes:
                raise InputError(
                    f"{name}[{number}] has inputs for {', '.join(map(str, sorted(sizes)))} samples and subjects for {example.samples}: "
                    "give a list of token positions for each sample"
                )
            if not example.samples or any(not list(tokens) for tokens in example.subject):
                raise InputError(f"{name}[{number}] has a sample without a subject: name at least one token of each")
    known = {key: place for place in _samples(found[0]) for key in [_identity(found[0], place, told_by)]}
    for place in _samples(found[1]):
        twin = known.get(_identity(found[1], place, told_by))
        if twin is not None:
            raise InputError(
                f"sample {twin[1]} of unsafe[{twin[0]}] and sample {place[1]} of safe[{place[0]}] are the same prompt: "
                "the two sets must not overlap"
            )
    return found


def _samples(examples: Sequence[Prompted]) -> list[tuple[int, int]]:
    return [(number, sample) for number, example in enumerate(examples) for sample in range(example.samples)]


def _identity(examples: Sequence[Prompted], place: tuple[int, int], told_by: Sequence[str] | None) -> tuple[object, ...]:
    """What makes a sample the prompt that it is."""
    example, sample = examples[place[0]], place[1]
    parts: list[object] = []
    for name in sorted(example.inputs if told_by is None else told_by):
        value = example.inputs.get(name)
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == example.samples:
            raw = value[sample].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            parts.append((name, value.dtype, tuple(value.shape[1:]), raw.numpy().tobytes()))
    return tuple(parts) or (id(example), sample)  # nothing can be compared
