"""The files of a recipe: strict YAML in, YAML and tensors out, each whole or absent."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import yaml

from headscope.kernels.errors import RecipeError, StoreError
from headscope.probe.whole_file import write_whole

MOST_BYTES = 64 * 1024
MOST_TENSOR_BYTES = 1 << 30


class _Loader(yaml.SafeLoader):
    """Safe, and without aliases (which let a small file grow without bound) and repeated keys (of which the last would win)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[object] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is not text", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """In double quotes where there is one of Unicode's own line breaks: in single ones U+0085 is read back as a space."""
        if any(sign in data for sign in "\x85\u2028\u2029"):
            return self.represent_scalar("tag:yaml.org,2002:str", data, style='"')
        return super().represent_str(data)


_Dumper.add_representer(str, _Dumper.represent_str)

# YAML 1.1 reads 1e-4 as text; a person who writes it means the number. The dumper has to know, to quote text that looks so.
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def parse(path: Path) -> object:
    """The plain values that a YAML file holds.

    Raises:
        RecipeError: it cannot be read, is too large, or is not plain YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"no recipe can be read there: {error.strerror}") from error
    if len(content) > MOST_BYTES:
        raise RecipeError(f"the file has more than {MOST_BYTES} bytes: a recipe has at most that")
    try:
        document: object = yaml.load(content, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"not a YAML recipe: {' '.join(str(error).split())}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"not a YAML recipe: {type(error).__name__} while reading it") from error
    return document


def dump(document: Mapping[str, object]) -> bytes:
    """Plain values as YAML."""
    return yaml.dump(dict(document), Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=140).encode()


def write(path: Path, content: bytes) -> None:
    """Replace a file whole: it is on disk before it gets its name.

    Raises:
        RecipeError: the folder takes no file.
    """
    try:
        write_whole(path, content)
    except StoreError as error:
        raise RecipeError(str(error)) from error


def read_plain(path: Path) -> bytes:
    """The bytes of a regular file that is no link, neither symbolic nor hard.

    Raises:
        RecipeError: it is not one, too large, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                raise RecipeError(f"{path.name} is not a plain file, or a link: put the file itself beside the recipe")
            if found.st_size > MOST_TENSOR_BYTES:
                raise RecipeError(f"{path.name} has {found.st_size} bytes: a recipe's tensors have at most {MOST_TENSOR_BYTES}")
            return file.read()
    except OSError as error:
        raise RecipeError(
            f"the recipe's tensors in {path.name} cannot be read: {error.strerror}; keep the file beside the recipe"
        ) from error
