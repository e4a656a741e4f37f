"""Attention, normalisation, activations, and functions whose own gradient must do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe.attribution import functions, rules, written
from headscope.probe.attribution.booking import Booking, Rule
from headscope.probe.attribution.calls import base, depends, in_place, leading, share


def attention(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """softmax(q kᵀ) v in the model's own kernel: its gradient, times the shares of q, k and v in the two products."""
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    q, k, v = given["query"], given["key"], given["value"]
    mask = given.get("attn_mask")
    scored = q.requires_grad or k.requires_grad or (isinstance(mask, Tensor) and mask.requires_grad)
    if mode.rules.softmax == "tempered":
        followed = mode.reenter(written.attention, (), given)
        with torch.no_grad():
            shown = func(**given)
        return functions.Replaced.apply(followed, shown)  # type: ignore[no-untyped-call]
    if mode.rules.softmax == "stop":
        q, k, scored = q.detach(), k.detach(), False
    weight = 0.5 if mode.rules.split and scored and v.requires_grad else 1.0
    both = 0.5 if mode.rules.split and q.requires_grad and k.requires_grad else 1.0
    operands = [("query", q, weight * both), ("key", k, weight * both), ("value", v, weight)]
    if isinstance(mask, Tensor) and mask.requires_grad:  # a bias that was looked up: a summand, with what reaches the scores
        operands.append(("attn_mask", mask.detach() if mode.rules.softmax == "stop" else mask, weight))
    ins = [share(tensor, part) for _, tensor, part in operands]
    given |= {name: tensor for (name, _, _), tensor in zip(operands, ins, strict=True)}
    shares = [part for _, _, part in operands]
    result: Tensor = func(**given)
    mode.book("softmax", name, ins, result, shares)
    return result


def softmax(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if mode.rules.softmax == "stop":
        with torch.no_grad():
            return func(*args, **kwargs)
    if mode.rules.softmax == "tempered":
        (x, *rest), kwargs = leading(args, kwargs, "input")
        dim = kwargs.get("dim", rest[0] if rest else -1)
        source = share(x, 1.0)
        result = functions.Tempered.apply(source, lambda t: func(t, *rest, **kwargs), dim, mode.rules.temperature)  # type: ignore[no-untyped-call]
        mode.book("softmax", name, [source], result, (1.0,))
        return result
    return mode.tapped("softmax", func, name, args, kwargs)


def norm(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A normalisation: its mean is subtracted, its scale held fixed, its shift absorbs."""
    if not mode.rules.frozen:
        return func(*args, **kwargs)
    names = {
        "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
        "rms_norm": ("input", "normalized_shape", "weight", "eps"),
        "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
        "instance_norm": ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    }  # fmt: skip
    given = dict(zip(names.get(name, ()), args, strict=False)) | kwargs
    if name not in names or (name == "instance_norm" and not given.get("use_input_stats", True)):
        return mode.tapped("norm shift" if name in ("batch_norm", "instance_norm") else "unruled", func, name, args, kwargs)
    x, weight, bias = given["input"], given.get("weight"), given.get("bias")
    if depends((weight, bias), {}):
        return mode.tapped("unruled", func, name, args, kwargs)
    if name == "rms_norm":
        dims, eps = tuple(range(-len(given["normalized_shape"]), 0)), given.get("eps")
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        options = {key: value for key, value in given.items() if key != "input"}
        return functions.RootMeanSquare.apply(x, lambda t: func(t, **options), dims, weight, eps)  # type: ignore[no-untyped-call]
    eps = given.get("eps", 1e-5)
    if name == "layer_norm":
        result = functions.LayerNorm.apply(x, tuple(given["normalized_shape"]), weight, bias, eps)  # type: ignore[no-untyped-call]
    else:
        options = {key: value for key, value in given.items() if key != "input"}
        groups = given.get("num_groups", x.shape[1])
        result = functions.GroupNorm.apply(x, lambda t: func(t, **options), groups, weight, eps)  # type: ignore[no-untyped-call]
        bias = None if bias is None else bias.reshape(-1, *([1] * (x.dim() - 2)))
    if bias is not None:
        mode.book_constant("norm shift", name, result, bias, 1)
    return result


def identity(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An element-wise function through the origin."""
    if not mode.rules.identity:
        return mode.tapped("gate", func, name, args, kwargs)
    plain = base(name)
    (x, *rest), kwargs = leading(args, kwargs, "input")
    options = {key: value for key, value in kwargs.items() if key != "inplace"}
    if plain in ("elu", "selu", "celu", "silu", "mish", "hardswish") and rest and rest[-1] is True:
        rest = rest[:-1]  # the flag `inplace`
        options["inplace"] = kwargs["inplace"] = True
    inplace = in_place(name) or bool(kwargs.get("inplace"))
    options.pop("inplace", None)
    run = (getattr(torch, plain, None) or getattr(nn.functional, plain)) if inplace else func
    result: Tensor = functions.Identity.apply(  # type: ignore[no-untyped-call]
        x.clone() if inplace else x, lambda t: run(t, *rest, **options), rules.IDENTITY[plain]
    )
    return x.copy_(result) if inplace else result


def power(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """xⁿ: the identity rule for n > 0; a negative power is a normaliser's and a constant, a power of two data a gate."""
    x = args[0] if args else kwargs.get("input")
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if isinstance(exponent, Tensor) and exponent.numel() == 1 and not exponent.requires_grad:
        exponent = float(exponent)
    if not isinstance(exponent, int | float) or not isinstance(x, Tensor) or not x.requires_grad or in_place(name):
        return mode.tapped("gate", func, name, args, kwargs)
    if exponent < 0:
        return constant(mode, func, name, args, kwargs)
    if exponent == 0 or not mode.rules.identity:
        return mode.tapped("gate", func, name, args, kwargs)
    if exponent >= 1:
        return functions.Power.apply(x, lambda t: func(t, exponent), exponent)  # type: ignore[no-untyped-call]
    return functions.Identity.apply(x, lambda t: func(t, exponent), 0.0)  # type: ignore[no-untyped-call]


def constant(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of a normaliser: no relevance passes."""
    if not mode.rules.frozen:
        return func(*args, **kwargs)
    with torch.no_grad():
        result = func(*args, **kwargs)
    return result.detach()


def written_out(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A fused function run as the plain operations that it stands for."""
    followed = mode.reenter(written.FUNCTIONS[base(name)], args, kwargs)
    with torch.no_grad():
        shown = func(args[0].clone(), *args[1:], **kwargs) if in_place(name) else func(*args, **kwargs)
    result = functions.Replaced.apply(followed, shown)  # type: ignore[no-untyped-call]
    return args[0].copy_(result) if in_place(name) else result


def clamp(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.tapped("clamp", func, name, args, kwargs)


def gate(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.tapped("gate", func, name, args, kwargs)


def unruled(mode: Booking, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.tapped("unruled", func, name, args, kwargs)


RULES: dict[str, Rule] = {
    "attention": attention, "softmax": softmax, "norm": norm, "identity": identity, "power": power, "constant": constant,
    "written": written_out, "clamp": clamp, "gate": gate, "unruled": unruled,
}  # fmt: skip
