"""From an attention call to what is kept of it: checked, cut to the chosen heads, within the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.kernels.errors import BudgetError, NonFiniteError, NotIntercepted, SelectionError
from headscope.kernels.panels import OF_SCORES, statistics_of_pattern
from headscope.probe.call import AttentionCall
from headscope.probe.keep import Keep, free_memory, readable
from headscope.probe.record import STATISTIC, Record, Terms, check_head, compact, positions, stored_bytes


class Recorder:
    """Makes records for one capture, and knows what they cost so far."""

    def __init__(self, keep: Keep, heads: tuple[int, ...] | None) -> None:
        self.keep, self.heads = keep, heads
        self.spent = 0
        self.budget = keep.budget
        self.extras: list[Tensor] = []  # masks and biases kept so far; usually one is every layer's

    def record(self, call: AttentionCall) -> Record:
        """What `keep` asks of a finished call.

        Raises:
            SelectionError: a chosen head that this site has not.
            NonFiniteError: q or k holds NaN or infinity.
            BudgetError: it would not fit.
            NotIntercepted: the call happened inside vmap or jacrev, whose tensors end with it.
        """
        keep = self.keep
        if torch._C._functorch.is_functorch_wrapped_tensor(call.q):
            raise NotIntercepted("tensors inside vmap or jacrev cannot be kept beyond it: capture a plain call, or loop over the samples")
        for head in self.heads or ():
            check_head(call.site, head)
        record = Record(
            call.site, call.step, self.heads, scale=call.scale, is_causal=call.is_causal, softcap=call.softcap, tile=keep.pooled,
            told=call.told, gradient=keep.gradient,
        )  # fmt: skip
        if keep == Keep(qk=False):
            return record
        self._check_budget(call)
        with torch.set_grad_enabled(keep.gradient and torch.is_grad_enabled()):  # looking must save nothing for a backward
            _check_finite(call)
            self._keep_operands(call, record)
            if keep.scores:
                self._put(record, "scores", self._chosen(_scores(call)))
            if keep.needs_pattern:
                self._keep_pattern(call, record)
        return record

    def _chosen(self, tensor: Tensor) -> Tensor:
        return tensor if self.heads is None or tensor.shape[1] == 1 else tensor[:, list(self.heads)]

    def _shared(self, tensor: Tensor, call: AttentionCall) -> Tensor:
        """k or v: the key/value head of each chosen query head."""
        return tensor if self.heads is None or tensor.shape[1] == 1 else tensor[:, [h // call.groups for h in self.heads]]

    def _put(self, record: Record, name: str, tensor: Tensor) -> None:
        keep = self.keep
        kept = tensor if keep.gradient else tensor.detach()
        if keep.device is not None or (keep.dtype is not None and kept.is_floating_point()):
            kept = kept.to(device=keep.device, dtype=keep.dtype if kept.is_floating_point() else None)
        # A view would keep all of a cache or a fused projection alive; a cache is written into again, and z may be.
        reused = name == "z" or (name in ("k", "v") and (kept.is_inference() or kept._version > 0))
        if kept.untyped_storage().nbytes() > kept.numel() * kept.element_size() or (reused and kept.data_ptr() == tensor.data_ptr()):
            kept = kept.clone()
        record.tensors[name] = kept
        self.spent += stored_bytes(kept)

    def _put_extra(self, record: Record, name: str, extra: Tensor) -> None:
        """Keep a mask, bias or sink: a copy, since many models fill one mask again at every step, but one for all layers."""
        kept = extra if self.keep.gradient else extra.detach()
        kept = kept if self.keep.device is None else kept.to(self.keep.device)
        if not self.keep.gradient:
            alike = (x for x in self.extras[-4:] if x.shape == kept.shape and x.dtype == kept.dtype)
            twin = next((x for x in alike if torch.equal(x, kept)), None)
            if twin is None:
                twin = kept.clone()
                self.extras.append(twin)
                self.spent += stored_bytes(twin)
            kept = twin
        record.tensors[name] = kept

    def _keep_operands(self, call: AttentionCall, record: Record) -> None:
        keep = self.keep
        if keep.queries_and_keys and not call.told and not keep.pattern:
            assert call.materialised is not None
            self._put(record, "pattern", self._chosen(call.materialised))
        if keep.queries_and_keys and (call.told or keep.qk):
            if call.told and call.replay is not None:
                record.replay = call.replay if keep.gradient else call.replay.detached()
            whole = record.replay is not None  # a replay runs on all heads at once
            self._put(record, "q", call.q if whole else self._chosen(call.q))
            self._put(record, "k", call.k if whole else self._shared(call.k, call))
            for name, extra in (("mask", call.mask), ("bias", call.bias)):
                if extra is not None:
                    self._put_extra(record, name, self._chosen(compact(extra)))
            if call.sink is not None:
                self._put_extra(record, "sink", call.sink if self.heads is None else call.sink[list(self.heads)])
        if keep.v and call.v is not None:
            self._put(record, "v", self._shared(call.v, call))
        if keep.z and call.z is not None:
            self._put(record, "z", self._chosen(call.z))

    def _keep_pattern(self, call: AttentionCall, record: Record) -> None:
        keep = self.keep
        pattern = call.materialised
        if pattern is None and call.replay is not None:
            pattern = call.replay.pattern(call.q, call.k)
        if pattern is not None:
            pattern = self._chosen(pattern)
        terms = Terms.of(call, self.heads) if pattern is None else None
        if terms is not None and keep.pattern:
            pattern = terms.pattern()
        if keep.pattern and pattern is not None:
            self._put(record, "pattern", pattern)
        if keep.rows is not None:
            wanted = positions(keep.rows, call.queries)
            record.rows = tuple(wanted)
            record.tensors["queries"] = torch.tensor(call.queries)
            self._put(record, "rows", pattern[:, :, wanted] if pattern is not None else _need(terms).rows(wanted))
        if keep.wanted_statistics or keep.pooled:
            if terms is None and pattern is not None:
                scores = call.materialised_scores
                if scores is None and call.replay is not None and not OF_SCORES.isdisjoint(keep.wanted_statistics):
                    scores = call.replay.scores(call.q, call.k)
                scores = None if scores is None else self._chosen(scores)
                found = statistics_of_pattern(pattern, want=keep.wanted_statistics, pooled=keep.pooled, scores=scores)
            else:
                found = _need(terms).statistics(keep.wanted_statistics, keep.pooled)
            for name, tensor in found.tensors().items():
                self._put(record, STATISTIC + name, tensor)

    def _check_budget(self, call: AttentionCall) -> None:
        keep = self.keep
        if self.budget is None:
            self.budget = free_memory(torch.device(keep.device) if keep.device is not None else call.q.device) // 2
        wide = call.q.shape[0] * (call.q.shape[1] if self.heads is None else len(self.heads))
        shared = call.k.shape[1] if self.heads is None or call.k.shape[1] == 1 else len(self.heads)
        size = call.q.element_size() if keep.dtype is None else keep.dtype.itemsize
        exact = max(4, call.q.element_size()) if keep.dtype is None else size  # statistics of half precision are single
        cells = wide * call.queries * call.keys
        value_width = 0 if call.z is None else call.z.shape[-1]
        tiles = 0 if keep.pooled is None else -(-call.queries // keep.pooled) * -(-call.keys // keep.pooled)
        sizes = [(call.keys if n == "received" else call.queries) * (8 if n == "argmax" else exact) for n in keep.wanted_statistics]
        operands = wide * call.queries * call.q.shape[-1] + call.q.shape[0] * shared * call.keys * call.k.shape[-1]
        if call.replay is not None:  # runs on all heads
            operands = call.q.numel() + call.k.numel()
        need = {
            "the pattern": cells * size * (keep.pattern or (keep.queries_and_keys and not call.told)),
            "scores": cells * size * keep.scores,
            "rows": wide * call.keys * len(keep.rows or ()) * exact,
            "the pooled map": wide * tiles * exact,
            "statistics": wide * sum(sizes),
            "q and k": operands * size * (keep.queries_and_keys and (call.told or bool(keep.qk))),
            "z": wide * call.queries * value_width * size * keep.z,
            "v": call.q.shape[0] * shared * call.keys * value_width * size * keep.v,
        }
        total = self.spent + sum(need.values())
        if total > self.budget:
            largest = max(need, key=lambda name: need[name])
            large = largest in ("the pattern", "scores", "rows", "the pooled map")
            advice = "keep statistics=True, rows=[…] or pooled=64 instead, choose" if large else "choose"
            raise BudgetError(
                f"keeping {largest} of {call.site.name} ({readable(need[largest])}) would bring this capture to {readable(total)}, "
                f"over its budget of {readable(self.budget)}: {advice} layers= and heads=, or pass a larger budget="
            )


def _need(terms: Terms | None) -> Terms:
    assert terms is not None
    return terms


def _scores(call: AttentionCall) -> Tensor:
    if call.materialised_scores is not None:
        return call.materialised_scores
    if call.replay is not None:
        return call.replay.scores(call.q, call.k)
    if not call.told:
        raise SelectionError(f"{call.site.name} ({call.site.mechanism}) has no scores to keep: keep its pattern, or name other sites")
    return Terms.of(call).scores()


def _check_finite(call: AttentionCall) -> None:
    for name, tensor in (("q", call.q), ("k", call.k)):
        total = tensor.detach().sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        if bool(torch.isfinite(total)):  # one pass, no temporary; only a sum that is not finite is looked into
            continue
        bad = (~torch.isfinite(tensor)).nonzero()
        if len(bad):
            b, h, position, _ = (int(i) for i in bad[0])
            raise NonFiniteError(
                f"{name} of {call.site.name} is not finite, first at sample {b}, head {h}, position {position} (step {call.step}): "
                "the model, its input or an edit produced NaN or infinity before this layer"
            )
