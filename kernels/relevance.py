"""Relevance through one attention, without holding its pattern: AttnLRP, or the ordinary gradient.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value.

    found = relevance(q, k, v, grad, causal=True)
    of_values = v * found.v

Relevance is carried as a modified gradient g: that of an input x is x * g. So what comes out can be handed to the rule of the
layer below without a division, and rotary positions, reshapes and linear layers pass it on as ordinary gradients.

The rules (Achtibat et al. 2024, "AttnLRP", Proposition 3.1 for the softmax, 3.3 for a product of two inputs, and its identity rule
for functions of one input), with U = q kᵀ, τ = scale / temperature, S = τU or c·tanh(τU / c), P the pattern and z = P v:

    z = P v        R_z is split in halves:  R_P,ij = Σ_d P_ij v_jd · R_z,id / (2 z_id + ε sign z_id),  R_v likewise, summed over i
    softmax        R_A,ij = A_ij · (R_P,ij - P_ij Σ_j R_P,ij)    for the whole score A = S + bias + key_bias
    sum            each summand its part of R_A; what falls to biases (and to a sink) ends there
    softcap, τ     R_U = R_S
    U = q kᵀ       R_U is split in halves as R_z was, with ε_s

As modified gradients, from g arriving at z (R_z = z g_z), which is what the fast implementations compute:

    G   = g_z / 2 · |z| / (|z| + ε/2)                  [Q, V], finite at z = 0; 0 there if ε > 0, g_z / 2 if ε = 0
    δ_i = Σ_d G_id z_id                                = Σ_j R_P,ij
    g_v = Pᵀ G
    W   = P · (G vᵀ - δ) · φ · S / (τU),   φ = 1/2 · |U| / (|U| + ε_s/2)       S / (τU) is 1 at U = 0 and without a softcap
    g_q = τ W k,    g_k = τ Wᵀ q                       summed over the query heads that share a key head

There is one factor 1/2 on the way to v and there are two, one of each product, on the way to q and to k.

What is conserved, for each query head, with ε = ε_s = 0: Σ R_v = Σ_i δ_i = Σ R_z / 2, and Σ R_q = Σ R_k = Σ_ij S_ij g_A,ij / 2 with
g_A = P · (G vᵀ - δ). So

    Σ R_q + Σ R_k + Σ R_v  =  Σ R_z  -  Σ_i [ δ_i - Σ_j A_ij g_A,ij ]  -  Σ_ij (bias + key_bias)_ij g_A,ij

The first bracket is what the softmax takes in: it is not 0, in general it is not small, and it hangs on where the scores have
their zero. A sink s with share p of a row is one more score: s · p · (0 - δ_i) joins Σ_j A g_A and then ends in the sink. ε takes in
R_z · (ε/2) / (|z| + ε/2) of each output, ε_s the same of each product. A gate is a constant: it multiplies g on the way in.
A mask takes in nothing: a hidden key has P = 0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headscope.kernels import choose as forwards
from headscope.kernels.backward import Backward, Relevance, Rule, blockwise, dense, stock, stock_refuses, ungated
from headscope.kernels.checks import shown
from headscope.kernels.errors import InputError, SelectionError, ShapeError
from headscope.kernels.problem import Problem, Wanted, make_problem

NAMES = ("triton", "stock", "blockwise", "reference")
RULES = ("attnlrp", "gradient")


@torch.no_grad()
def relevance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    rule: str = "attnlrp",
    epsilon: float = 0.0,
    epsilon_scores: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    temperature: Tensor | None = None,
    gate: Tensor | None = None,
    sink: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    output: Tensor | None = None,
    lse: Tensor | None = None,
    implementation: str | None = None,
) -> Relevance:
    """Modified gradients of q, k and v from that of the output of an attention; memory grows with Q + K, not with Q × K.

    A dead row passes nothing on. NaN in a row shows in its modified gradient and in those of the keys it sees. What is returned
    belongs to no autograd graph.

    Args:
        q: [B, H, Q, D], k: [B, G, K, D], v: [B, G, K, V], as in `headscope.kernels.attention.attention`, like all of the structure.
        grad: [B, H, Q, V] in the dtype of q, the modified gradient of the output: relevance of the output / output.
        rule: "attnlrp", or "gradient" for the ordinary gradients.
        epsilon: ε, takes in relevance where z is near 0; in the unit of v. Nothing here divides by z, so 0 is safe.
        epsilon_scores: ε_s, the same for the products q·k before the scale; in their unit.
        output, lse: what `attention` returned for this call, to save computing it again.
        implementation: one of `NAMES`; None takes the fastest that can do it.

    Raises:
        ShapeError: tensors whose shapes, dtypes or devices do not fit together; the message gives both.
        InputError: an epsilon, scale, softcap, window or length that makes no sense; an implementation that cannot do this.
        SelectionError: a rule or implementation that does not exist.

    Source: Achtibat et al. 2024, AttnLRP, Propositions 3.1 and 3.3; as modified gradients, Arras et al. 2025.
    """
    if rule not in RULES:
        raise SelectionError(f"no rule {rule!r}: there are {', '.join(RULES)}")
    chosen_rule = Rule(rule == "attnlrp", epsilon, epsilon_scores)
    problem = make_problem(
        q, k, v, scale=scale, causal=causal, offset=offset, window=window, softcap=softcap, bias=bias, mask=mask, key_bias=key_bias,
        temperature=temperature, gate=gate, sink=sink, lengths=lengths, key_lengths=key_lengths,
    )  # fmt: skip
    _check_rows(problem, v, grad=grad, output=output, lse=lse)
    name = choose_backward(problem, chosen_rule, implementation)
    batch, heads, queries, keys = problem.shape
    if 0 in (batch, queries, keys):
        rows, columns = (q.new_zeros(batch, heads, size, dtype=problem.precision) for size in (queries, keys))
        return Relevance(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), rows, columns)
    with torch.autocast(q.device.type, enabled=False):  # it would take float32 products back to half
        if name in ("triton", "blockwise") and (output is None or lse is None):
            forced = name if implementation is not None else None
            wanted = Wanted(frozenset({"lse"}))
            made, statistics = forwards.choose(problem, wanted, forced)(problem, wanted)
            output, lse = made if output is None else output, statistics.lse
        if output is None or lse is None:  # the others look at neither
            output, lse = grad, grad[..., 0]
        z, grad_z = ungated(problem, output, grad)
        return _backward(name)(replace(problem, gate=None), z, lse, grad_z, chosen_rule)


def choose_backward(problem: Problem, rule: Rule, forced: str | None = None) -> str:
    """The name of the fastest implementation that can do this, or the one that is forced.

    | name | where | what it cannot do |
    |---|---|---|
    | triton | CUDA, ROCm; anywhere under TRITON_INTERPRET=1 | float64; heads wider than 256 |
    | stock | any device | softcap, biases, masks, sinks, temperatures, ε_s; what torch would hold a whole pattern for |
    | blockwise | any device | nothing |
    | reference | any device | nothing; holds the whole pattern, in float64 |

    Raises:
        SelectionError: there is no implementation of that name.
        InputError: the one that is forced cannot do this; the message says why.
    """
    if forced is None:
        if problem.q.device.type == "cuda" and _refuses("triton", problem, rule) is None:
            return "triton"
        return "stock" if _refuses("stock", problem, rule) is None else "blockwise"
    if forced not in NAMES:
        raise SelectionError(f"no implementation {forced!r}: there are {', '.join(NAMES)}")
    reason = _refuses(forced, problem, rule)
    if reason is not None:
        raise InputError(f"implementation {forced!r} cannot do this: {reason}; leave it out, or take 'blockwise'")
    return forced


def _refuses(name: str, problem: Problem, rule: Rule) -> str | None:
    if name == "stock":
        return stock_refuses(problem, rule)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        from headscope.kernels.triton import backward  # triton is there only where it was asked for

        return backward.why_not(problem)
    return None


def _backward(name: str) -> Backward:
    if name == "triton":
        from headscope.kernels.triton import backward

        return backward.backward
    return {"stock": stock, "blockwise": blockwise, "reference": dense}[name]


def _check_rows(problem: Problem, v: Tensor, *, grad: Tensor, output: Tensor | None, lse: Tensor | None) -> None:
    batch, heads, queries, _ = problem.shape
    whole = (batch, heads, queries, v.shape[3])
    for name, tensor, shape, dtypes in (
        ("grad", grad, whole, (problem.q.dtype,)),
        ("output", output, whole, (problem.q.dtype,)),
        ("lse", lse, whole[:3], (torch.float32, torch.float64)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != problem.q.device):
            raise ShapeError(
                f"{name} is {shown(tensor)} of {tensor.dtype} on {tensor.device}; give {list(shape)} of {dtypes[0]} on {problem.q.device}"
            )
