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


def checked(unsafe: Iterable[Prompted], safe: Iterable[Prompted]) -> tuple[list[Prompted], list[Prompted]]:
    """Both sets as lists.

    Raises:
        InputError: an empty set, samples without a subject, or an input that stands in both.
    """
    found = list(unsafe), list(safe)
    for name, examples in zip(("unsafe", "safe"), found, strict=True):
        if not examples:
            raise InputError(f"the {name} set is empty: give at least one Prompted(inputs, subject)")
        for number, example in enumerate(examples):
            sizes = {value.shape[0] for value in example.inputs.values() if isinstance(value, Tensor) and value.ndim > 1}
            if example.samples not in sizes and sizes:
                raise InputError(
                    f"{name}[{number}] has inputs for {', '.join(map(str, sorted(sizes)))} samples and subjects for {example.samples}: "
                    "give a list of token positions for each sample"
                )
            if any(not list(tokens) for tokens in example.subject):
                raise InputError(f"{name}[{number}] has a sample without a subject: name at least one token of each")
    for number, example in enumerate(found[0]):
        twin = next((place for place, other in enumerate(found[1]) if _same(example.inputs, other.inputs)), None)
        if twin is not None:
            raise InputError(f"unsafe[{number}] and safe[{twin}] are the same input: the two sets must not overlap")
    return found


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    for name, value in one.items():
        theirs = other[name]
        if isinstance(value, Tensor) != isinstance(theirs, Tensor):
            return False
        if isinstance(value, Tensor):
            if value.shape != theirs.shape or not torch.equal(value, theirs):
                return False
        elif value != theirs:
            return False
    return True
