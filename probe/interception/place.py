"""Where in a watched model the running code stands, read off the Python frames."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING

import torch.utils.checkpoint
from torch import nn

if TYPE_CHECKING:
    from headscope.probe.interception.session import Session

WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_original_component)(?=\.|$)")
PREFIXES = re.compile(r"^(module\.|base_model\.model\.)")
CHECKPOINT = torch.utils.checkpoint.__file__


def clean_path(path: str) -> str:
    """A module path without what wrappers (compile, FSDP, DataParallel, peft) put into it."""
    path = WRAPPERS.sub("", path).lstrip(".")
    return PREFIXES.sub("", path)


@dataclass(frozen=True)
class Place:
    """Where in the model a torch call was made."""

    session: Session
    path: str
    module: nn.Module
    frame: FrameType | None = field(repr=False, default=None)  # the innermost frame that holds the module
    forward: FrameType | None = field(repr=False, default=None)  # its forward()
    checkpointed: bool = False  # inside a checkpointed region that will be run again for the backward
    reentrant: bool = False
    recomputed: bool = False  # this is that second run

    def without_frames(self) -> Place:
        """The same place, to be held beyond the call: a frame holds every local of the model's code, maps and all."""
        return replace(self, frame=None, forward=None)


def locate(sessions: list[Session]) -> Place | None:
    """The innermost module of a watched model whose code is running, found by walking up the Python frames."""
    frame: FrameType | None = sys._getframe(1)
    found: tuple[Session, str, nn.Module, FrameType] | None = None
    forward: FrameType | None = None
    checkpointed = reentrant = recomputed = False
    while frame is not None:
        code = frame.f_code
        if (found is None or (forward is None and code.co_name == "forward")) and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if found is not None and owner is found[2]:
                forward = frame
                owner = None
            elif found is not None:
                owner = None
            if isinstance(owner, nn.Module):
                for session in sessions:
                    path = session.paths.get(id(owner))
                    if path is not None:
                        found = (session, path, owner, frame)
                        forward = frame if code.co_name == "forward" else None
                        break
        if code.co_filename == CHECKPOINT:
            if code.co_name == "checkpoint":
                checkpointed = True
            elif code.co_name == "forward":
                reentrant = True
            elif code.co_name in {"recompute_fn", "backward"}:
                recomputed = True
        frame = frame.f_back
    if found is None:
        return None
    return Place(
        *found, forward, checkpointed=checkpointed and not recomputed, reentrant=reentrant and not recomputed, recomputed=recomputed
    )


def recomputing() -> bool:
    """Whether this code runs because a checkpoint makes its region a second time, for the backward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == CHECKPOINT and frame.f_code.co_name in {"recompute_fn", "backward", "unpack_hook"}:
            return True
        frame = frame.f_back
    return False
