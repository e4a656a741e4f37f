"""Typical calls of the kernels, in the form in which they are compiled where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from triton.runtime.jit import JITFunction

from headscope.kernels.triton.columns import columns_kernel
from headscope.kernels.triton.configurations import find
from headscope.kernels.triton.forward import forward_kernel
from headscope.kernels.triton.rows import rows_kernel
from headscope.kernels.triton.top import top_kernel


@dataclass(frozen=True)
class Specimen:
    """One kernel with everything that decides what it compiles to.

    Attributes:
        name: of this call.
        kernel: what is compiled.
        signature: for each argument, in order, a type such as "*bf16", "i32", "fp32", or "constexpr".
        constants: the value of each argument that is a constexpr, pointers that are not given (None) among them.
        num_warps, num_stages: of one program.
        aligned: arguments that are multiples of 16.
        amd: constants that are others on AMD.
    """

    name: str
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()
    amd: dict[str, object] = field(default_factory=dict)


_POINTERS = {"q", "k", "v", "output", "bias"}  # in the dtype of q
_KINDS = {
    "first": "*i32", "stop": "*i32", "positions": "*i32", "first_query": "*i32", "stop_query": "*i32", "mask": "*u8", "argmax": "*i64",
    "top_keys": "*i64", "softcap": "fp32",
}  # fmt: skip
_FLOATS = {
    "scales", "key_bias", "sink", "lse", "entropy", "p_max", "max_score", "sum_squares", "moments", "frame_max", "frame_weight",
    "received", "pooled", "top_weights",
}  # fmt: skip
_EXTRAS = ("bias", "mask", "key_bias")
_COLUMN_STRIDES = {"q_d", "k_d", "v_d", "bias_k", "mask_k", "key_bias_k"}  # 1 in a contiguous tensor, and then compiled as 1
_COUNTS = {"heads", "shared", "n_rows", "n_queries", "span", "count", "tile_rows", "tile_columns"}


def specimens(width: int, dtype: str = "bf16") -> list[Specimen]:
    """The kernels as causal calls with D = V compile them, bare and with everything.

    Args:
        width: D and V.
        dtype: of q, k and v, in triton's letters: bf16, fp16 or fp32.
    """
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    row_names = {"lse": None, "entropy": None, "p_max": None, "argmax": None, "max_score": None, "sum_squares": None}
    no_extras: dict[str, object] = dict.fromkeys((*_EXTRAS, "softcap"))
    frame: dict[str, object] = {"frame_max": None, "frame_weight": None}

    def specimen(name: str, kernel: JITFunction, table: str, left_out: dict[str, object], **constants: object) -> Specimen:
        chosen, amd = find(table, width, "nvidia", kind), find(table, width, "amd", kind)
        fixed = left_out | constants
        fixed |= {"D": width, "ROWS": chosen.rows, "KEYS": chosen.keys, "EVEN_D": True, "WIDE": False, "INTERPRETED": False}
        if kernel is forward_kernel:
            fixed |= {"V": width, "EVEN_V": True}
        for argument in kernel.arg_names:
            if argument in _COLUMN_STRIDES:
                fixed[argument] = 1
            elif any(argument.startswith(f"{extra}_") and fixed.get(extra, 0) is None for extra in _EXTRAS):
                fixed.setdefault(argument, 0)
        signature = {argument: "constexpr" if argument in fixed else _type(argument, kernel, dtype) for argument in kernel.arg_names}
        aligned = tuple(
            argument for argument, type_ in signature.items() if type_[0] == "*" or (type_ == "i32" and argument not in _COUNTS)
        )
        return Specimen(
            name, kernel, signature, fixed, chosen.warps, chosen.stages, aligned, {"ROWS": amd.rows, "KEYS": amd.keys}
        )  # fmt: skip

    bare = {**no_extras, "positions": None, "features": None, "moments": None, "sink": None, "f_b": 0, "f_h": 0}
    statistics: dict[str, object] = dict.fromkeys(("argmax", "max_score"))
    return [
        specimen("forward-base", forward_kernel, "forward", {**bare, **row_names, **frame, "lse": None}, F=16),
        specimen("forward-statistics", forward_kernel, "forward", {**bare, **statistics, **frame}, F=16),
        specimen("forward-everything", forward_kernel, "forward-biased", {"positions": None}, F=16),
        specimen("columns", columns_kernel, "columns", no_extras, TILE=64),
        specimen("rows", rows_kernel, "rows", no_extras),
        specimen("top", top_kernel, "top", no_extras, T=8),
    ]


def _type(argument: str, kernel: JITFunction, dtype: str) -> str:
    if argument in _KINDS:
        return _KINDS[argument]
    if argument in _FLOATS or (argument == "output" and kernel is rows_kernel):
        return "*fp32"
    if argument in _POINTERS:
        return f"*{dtype}"
    if argument == "features":
        return "*fp32" if dtype == "fp32" else "*bf16"
    return "i32"
