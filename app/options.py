"""What the commands of the shell have in common: their parser, and the options that name a model and its input.

Nothing heavy is imported.
"""

from __future__ import annotations

import argparse
from typing import NoReturn

from headscope.kernels.errors import InputError


class Parser(argparse.ArgumentParser):
    """Bad arguments become our own error, which `main` prints as one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see `{self.prog} --help`)")


Commands = argparse._SubParsersAction  # of `Parser`


def add_command(
    commands: Commands[Parser], name: str, module: str, purpose: str, example: str, function: str | None = None
) -> argparse.ArgumentParser:
    """A command that calls `function` (`run_` and its name, if left out) of a module of the app with its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module, function=function or f"run_{name}")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def add_model(parser: argparse.ArgumentParser, default: str | None = "embedded:lm") -> None:
    """The options that say which model."""
    told = "" if default is None else f" (default {default})"
    names = f"embedded:lm, embedded:vit, embedded:mmdit, a folder, or a hub id{told}"
    parser.add_argument("--model", default=default, metavar="NAME", help=names)
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--task", help="the head on top, where the saved one is not wanted, such as causal-lm")
    parser.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    parser.add_argument("--dtype", help="type of the weights, such as float16 (default: float32 on a CPU)")


def add_input(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """The options that say what the model reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="what the model reads; - takes it from standard input")
    source.add_argument("--text-file", metavar="FILE", help="a UTF-8 file that the model reads")
    source.add_argument("--image", type=int, metavar="N", help="for embedded:vit: the N-th of its held-out digits")
    return source
