"""The door itself: what is caught, what is refused, and that nothing stays behind."""

from __future__ import annotations

import math
import threading
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headscope.interventions import Edit, Plan, call, scale, select
from headscope.kernels.errors import EditError, NonFiniteError, NotIntercepted, SelectionError, ShapeError
from headscope.probe import Keep, Probe

WIDTH, HEADS = 16, 4


class Attention(nn.Module):
    """Multi-head self-attention, fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.num_heads = fused, HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.fused:
            z = F.scaled_dot_product_attention(q, k, v)
        else:
            z = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        out: Tensor = self.o_proj(z.transpose(1, 2).reshape(b, s, WIDTH))
        return out


class Net(nn.Module):
    def __init__(self, fused: bool = True, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention(fused) for _ in range(2))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


def net(fused: bool = True, reentrant: bool | None = None) -> Net:
    torch.manual_seed(0)
    return Net(fused, reentrant).double().eval()


def inputs(batch: int = 2, tokens: int = 5) -> Tensor:
    return torch.randn(batch, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


ZERO = Edit("z", scale(0.0), select(layer=0, head=1))
HALVE = Edit("pattern", call(lambda pattern, _: pattern * 0.5), select(layer=1, head=2))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def gradient(model: Net, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("fused", [True, False])
def test_both_ways_to_write_attention_show_the_same_sites_and_pattern(fused: bool) -> None:
    model, x = net(fused), inputs()
    with Probe(model).capture(Keep(pattern=True, z=True, v=True)) as seen:
        model(x)
    assert [s.name for s in seen.sites] == ["layers.0#0", "layers.1#0"]
    assert [s.output_projection for s in seen.sites] == ["layers.0.o_proj", "layers.1.o_proj"]
    layer = model.layers[0]
    q, k = (p(x).view(2, 5, HEADS, -1).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    dense = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1)
    torch.testing.assert_close(seen.pattern(0), dense, atol=1e-12, rtol=0)
    torch.testing.assert_close(seen.z(0), dense @ seen.v(0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("where", ["forward", "edit", "enter"])
def test_an_exception_leaves_no_hook_and_no_changed_output(fused: bool, where: str) -> None:
    model, x = net(fused), inputs()
    before = model(x)

    def fail(*_: object) -> Tensor:
        raise RuntimeError("planned")

    with pytest.raises((RuntimeError, SelectionError)):  # noqa: PT012
        if where == "edit":
            with Plan([Edit("z", call(fail))]).on(model):
                model(x)
        elif where == "forward":
            handle = model.layers[1].register_forward_hook(fail)
            try:
                with Plan([ZERO]).on(model), Probe(model).capture():
                    model(x)
            finally:
                handle.remove()
        else:
            with Plan([Edit("z", scale(0.0), select(head=99))]).on(model):
                model(x)
    assert hooks(model) == 0
    assert torch.equal(model(x), before)
    assert torch._C._len_torch_function_stack() == 0


def test_scopes_may_be_left_in_any_order() -> None:
    model, other, x = net(), net(False), inputs()
    before, before_other = model(x), other(x)
    first, second, third = ExitStack(), ExitStack(), ExitStack()
    first.enter_context(Plan([ZERO]).on(model))
    second.enter_context(Plan([HALVE]).on(other))
    seen = third.enter_context(Probe(model).capture())
    edited, edited_other = model(x), other(x)
    first.close()
    assert torch.equal(other(x), edited_other)
    assert torch.equal(model(x), before)
    second.close()
    assert torch.equal(other(x), before_other)
    third.close()
    assert len(seen.steps(layer=0)) == 2
    assert not torch.equal(edited, before)
    assert hooks(model) == hooks(other) == torch._C._len_torch_function_stack() == 0


def test_two_models_at_once_keep_their_calls_apart() -> None:
    model, other, x = net(), net(False), inputs()
    with Probe(model).capture(Keep(z=True)) as one, Probe(other).capture(Keep(z=True)) as two:
        model(x)
        other(x * 2)
    assert len(one.records) == len(two.records) == 2
    assert one.sites[0].mechanism == "sdpa"
    assert two.sites[0].mechanism == "dataflow"


def test_another_model_in_the_process_is_left_alone() -> None:
    model, bystander, x = net(), net(), inputs()
    before = bystander(x)
    with Plan([ZERO]).on(model):
        model(x)
        assert torch.equal(bystander(x), before)


def test_a_call_from_another_thread_is_refused() -> None:
    model, x = net(), inputs()
    caught: list[BaseException] = []

    def other() -> None:
        try:
            model(x)
        except NotIntercepted as error:
            caught.append(error)

    with Plan([ZERO]).on(model):
        model(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in str(caught[0])


def test_another_thread_with_its_own_scope_sees_only_its_own_edit() -> None:
    model, x = net(), inputs()
    plain, results = model(x), {}
    with Plan([ZERO]).on(model):
        mine = model(x)

        def other() -> None:
            with Plan([HALVE]).on(model):
                results["theirs"] = model(x)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert torch.equal(model(x), mine)
    with Plan([HALVE]).on(model):
        assert torch.equal(model(x), results["theirs"])
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("edit", [ZERO, HALVE, Edit("q", scale(1.7)), Edit("k", scale(1.7), select(layer=0))])
def test_gradients_through_an_edit_equal_finite_differences(fused: bool, edit: Edit) -> None:
    model, x = net(fused), inputs(1, 3)
    with Plan([edit]).on(model):
        assert torch.autograd.gradcheck(model, (x.requires_grad_(),))


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpointed_model_has_the_gradient_of_the_edited_model(fused: bool) -> None:
    plain, checkpointed, x = net(fused), net(fused, reentrant=False), inputs()
    with Plan([ZERO, HALVE]).on(plain):
        expected = gradient(plain, x)
    with Plan([ZERO, HALVE]).on(checkpointed), Probe(checkpointed).capture() as seen:
        found = gradient(checkpointed, x)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert seen.steps(layer=0) == [0], "the checkpoint's second forward was counted as a step"


def test_a_checkpointed_backward_after_the_scope_is_refused() -> None:
    model, x = net(reentrant=False), inputs()
    with Plan([ZERO]).on(model):
        loss = model(x).sum()
    with pytest.raises(NotIntercepted, match="Call backward"):
        loss.backward()


def test_a_checkpointed_backward_in_another_thread_is_still_edited() -> None:
    plain, model, x = net(), net(reentrant=False), inputs()
    with Plan([ZERO]).on(plain):
        expected = gradient(plain, x)
    with Plan([ZERO]).on(model):
        loss = model(x).square().sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    for a, b in zip(expected, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_an_edit_inside_a_reentrant_checkpoint_is_refused() -> None:
    model, x = net(reentrant=True), inputs().requires_grad_()
    with pytest.raises(EditError, match="use_reentrant"), Plan([ZERO]).on(model):
        model(x)


def test_capture_works_inside_inference_mode_and_autocast() -> None:
    model, x = net().float(), inputs().float()
    with torch.inference_mode(), Probe(model).capture() as seen:
        model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), Probe(model).capture() as low:
        model(x)
    assert low.q(0).dtype == torch.bfloat16
    torch.testing.assert_close(low.pattern(0).float(), seen.pattern(0), atol=0.02, rtol=0)


def test_edits_work_under_vmap_and_jacrev_and_captures_refuse() -> None:
    model, x = net(False), inputs(3, 4)
    with Plan([ZERO]).on(model):
        together = model(x)
        mapped = torch.vmap(lambda one: model(one[None])[0])(x)
        jacobian = torch.func.jacrev(lambda one: model(one[None])[0, 0, 0])(x[0])
        alone = x[0].clone().requires_grad_()
        model(alone[None])[0, 0, 0].backward()
    torch.testing.assert_close(mapped, together, atol=1e-12, rtol=0)
    torch.testing.assert_close(jacobian, alone.grad, atol=1e-12, rtol=0)
    with pytest.raises(NotIntercepted, match="vmap"), Probe(model).capture():
        torch.vmap(lambda one: model(one[None])[0])(x)


def test_a_compiled_model_is_run_eagerly_inside_the_scope() -> None:
    model, x = net(), inputs()
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    with Plan([ZERO]).on(compiled):
        edited = compiled(x)
    with Plan([ZERO]).on(model):
        torch.testing.assert_close(edited, model(x))
    assert [s.name for s in Probe(compiled).sites(x)] == ["layers.0#0", "layers.1#0"]
    assert torch.equal(compiled(x), plain)


def test_an_exported_model_shows_its_sites_and_a_scripted_one_is_refused() -> None:
    model, x = net().float(), inputs().float()
    exported = torch.export.export(model, (x,)).module()
    assert len(Probe(exported).sites(x)) == 2
    scripted = torch.jit.trace(model, x)
    with pytest.raises(NotIntercepted, match="TorchScript"):
        Probe(scripted).sites(x)


def test_a_model_without_attention_is_refused_rather_than_shown_empty() -> None:
    with pytest.raises(NotIntercepted, match="0 attention sites"):
        Probe(nn.Sequential(nn.Linear(4, 4), nn.ReLU())).sites(torch.randn(2, 4))
    with pytest.raises(NotIntercepted, match="was not run"), Probe(net()).capture():
        pass
    with pytest.raises(NotIntercepted, match="expected a torch.nn.Module"):
        Probe("model")  # type: ignore[arg-type]


class Lost(nn.Module):
    """Attention whose scores are copied about so that their axes are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention(False)

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(1, 2)
        copied = torch.zeros(x.shape[0], x.shape[1], 2 * x.shape[1], dtype=x.dtype)
        copied[:, :, : x.shape[1]] = scores
        out: Tensor = copied.softmax(-1)[:, :, : x.shape[1]] @ self.inner(x)
        return out


def test_a_softmax_over_a_product_that_no_site_claims_raises_with_its_module() -> None:
    model, x = Lost().double(), inputs()
    with pytest.raises(NotIntercepted, match="softmax over a product of activations"):
        Probe(model).sites(x)
    probe = Probe(model, strict=False)
    assert [s.module for s in probe.sites(x)] == ["inner"]
    assert "Lost" in probe.unclaimed[0] or "softmax" in probe.unclaimed[0]


class Opaque(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0][:, 0]
        return out


def test_an_opaque_attention_kernel_is_reported_by_name() -> None:
    with pytest.raises(NotIntercepted, match="_scaled_dot_product_flash_attention_for_cpu"):
        Probe(Opaque()).sites(inputs())


def test_a_product_that_is_no_attention_is_not_taken_for_it() -> None:
    class Gram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.router = Attention(True), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = (x @ x.transpose(1, 2)) @ x  # linear attention: no normaliser
            routed = self.router(mixed).softmax(-1)
            return self.attention(mixed * routed.sum(-1, keepdim=True))  # type: ignore[no-any-return]

    assert [s.module for s in Probe(Gram().double()).sites(inputs())] == ["attention"]


def test_aten_and_private_names_of_fused_attention_are_caught() -> None:
    class Names(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x[:, None]
            a = torch._C._nn.scaled_dot_product_attention(q, q, q)
            b = torch.ops.aten.scaled_dot_product_attention(q, q, q)
            c = torch.ops.aten.scaled_dot_product_attention.default(q, q, q)
            return (a + b + c)[:, 0]

    assert [s.ordinal for s in Probe(Names()).sites(inputs())] == [0, 1, 2]


def test_not_a_number_in_an_activation_is_named_by_layer_head_and_position() -> None:
    model, x = net(), inputs()
    with torch.no_grad():
        model.layers[1].q_proj.bias[9] = float("nan")
    with pytest.raises(NonFiniteError, match=r"q of layers.1#0 .* head 2"), Probe(model).capture():
        model(x)


def test_an_edit_that_changes_the_shape_is_refused() -> None:
    model = net()
    with pytest.raises((ShapeError, EditError), match="shape"), Plan([Edit("z", call(lambda z, _: z[..., :1]))]).on(model):
        model(inputs())


def test_edits_before_rotation_need_a_projection_of_their_own() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.num_heads = nn.Linear(WIDTH, 3 * WIDTH), HEADS

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    with pytest.raises(EditError, match="qkv"), Plan([Edit("q.pre", scale(2.0))]).on(model := Fused().double()):
        model(inputs())


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_of_a_call_is_held_after_its_forward(fused: bool) -> None:
    model, x = net(fused), inputs()
    with torch.no_grad(), Probe(model).capture(Keep(qk=False)):
        model(x)
        from headscope.probe.interception.mode import current_tracker

        tracker = current_tracker()
        assert tracker is not None
        assert not tracker.nodes, "tracked tensors outlive the forward: every step would add to memory"


def test_memory_and_tracking_end_with_the_scope() -> None:
    model, x = net(False), inputs()
    with Probe(model).capture(Keep(qk=False)):
        model(x)
    from headscope.probe.interception.mode import _local
    from headscope.probe.interception.session import _sessions

    assert getattr(_local, "watch", None) is None
    assert not _sessions


class LearnedQueries(nn.Module):
    """A pooling by queries that are parameters, written with `@`; and a router over parameters beside it."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        self.queries, self.experts = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.randn(WIDTH, 2))
        self.expanded = expanded

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(x.shape[0], 3, WIDTH) if self.expanded else self.queries
        pooled = (queries @ x.transpose(1, 2)).softmax(-1) @ x
        routed = (x @ self.experts).softmax(-1)  # no attention: its keys are a parameter
        out: Tensor = pooled * (routed.transpose(1, 2) @ x).sum(1, keepdim=True)
        return out


@pytest.mark.parametrize("expanded", [True, False])
def test_queries_that_are_parameters_are_caught_and_routers_are_not(expanded: bool) -> None:
    torch.manual_seed(0)
    model, x = LearnedQueries(expanded).double(), inputs()
    with Probe(model).capture(Keep(pattern=True)) as seen:
        plain = model(x)
    assert [(s.query_heads, s.kind) for s in seen.sites] == [(1, "self")]
    torch.testing.assert_close(seen.pattern(site=seen.sites[0].name)[:, 0], (model.queries @ x.mT).softmax(-1))
    with Plan([Edit("pattern", call(lambda pattern, _: pattern * 0))]).on(model):
        assert not model(x).any()
    assert torch.equal(model(x), plain)


def test_heads_of_width_one_and_a_single_key_are_attention_too() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = k = x[..., :1]
            wide = (q @ k.transpose(1, 2)).softmax(-1) @ x
            out: Tensor = wide + (x @ x[:, :1].transpose(1, 2)).softmax(-1) @ x[:, :1]
            return out

    sites = Probe(Narrow()).sites(inputs())
    assert [(s.ordinal, s.key_dim) for s in sites] == [(0, 1), (1, WIDTH)]


def test_a_softmax_written_as_exp_of_a_log_softmax_is_normalised_already() -> None:
    class Logarithmic(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.transpose(1, 2)
            out: Tensor = (scores - scores.logsumexp(-1, keepdim=True)).exp() @ x
            return out

    model, x = Logarithmic(), inputs()
    with Plan([Edit("pattern", call(lambda pattern, _: pattern * 1.0))]).on(model), Probe(model).capture(Keep(pattern=True)) as seen:
        model(x)
    torch.testing.assert_close(seen.pattern(site="*")[:, 0], (x @ x.mT).softmax(-1))


def test_a_linear_map_called_by_keyword_is_still_the_output_projection() -> None:
    class Keyword(Attention):
        def forward(self, x: Tensor) -> Tensor:
            z = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
            return F.linear(input=z, weight=self.o_proj.weight)

    assert Probe(Keyword(True).double()).sites(inputs())[0].output_projection == "o_proj"


def test_a_submodule_run_by_a_thread_of_the_forward_itself_is_refused() -> None:
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Attention(True), Attention(True)

        def forward(self, x: Tensor) -> Tensor:
            caught: list[BaseException] = []

            def run() -> None:
                try:
                    self.second(x)
                except NotIntercepted as error:
                    caught.append(error)

            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            if caught:
                raise caught[0]
            out: Tensor = self.first(x)
            return out

    with pytest.raises(NotIntercepted, match="another thread"):
        Probe(Threaded().double()).sites(inputs())


def test_a_scripted_module_with_attention_beside_a_caught_one_is_reported() -> None:
    model, x = net().float(), inputs().float()
    model.layers[1] = torch.jit.trace(model.layers[1], x)
    with pytest.raises(NotIntercepted, match=r"layers\.1: a TorchScript module"):
        Probe(model).sites(x)
    assert [s.module for s in Probe(model, strict=False).sites(x)] == ["layers.0"]
