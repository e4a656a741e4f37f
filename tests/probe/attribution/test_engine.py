"""Attribution changes nothing: not the forward pass, not the model, not its neighbours, whatever happens in the middle."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from headscope.interventions import Edit, Plan, scale, select
from headscope.kernels.errors import AttributionError
from headscope.probe import Keep, Probe
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.rules import RULE_SETS
from tests.models import ENTRIES

METHODS = list(RULE_SETS)


def llama(dtype: torch.dtype = torch.float32, implementation: str = "sdpa", **options: Any) -> Any:
    """A tiny Llama with uneven patterns."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, attn_implementation=implementation, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    return model.to(dtype)


def ids(batch: int = 1, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Plain gradients of the parameters."""
    value = model(input_ids=tokens).logits[:, -1].logsumexp(-1).sum()
    return list(torch.autograd.grad(value, list(model.parameters())))


def hooks(model: nn.Module) -> int:
    """All hooks on all modules."""
    return sum(
        len(found)
        for module in model.modules()
        for name, found in vars(module).items()
        if name.endswith("_hooks") and hasattr(found, "__len__")
    )


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    return set(a.inputs) == set(b.inputs) and all(float((a.inputs[n] - b.inputs[n]).abs().max()) <= tolerance for n in a.inputs)


# -- the forward pass ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["Llama (GQA)", "Llama (eager)", "GPT-2", "Mixtral", "ViT", "Bloom (ALiBi)", "einsum with groups (GQA)", "talking heads"]
)
def test_the_forward_pass_is_the_models_to_the_bit(name: str, method: str) -> None:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model, inputs = entry.build()
    seen: list[Tensor] = []

    def target(output: Any) -> Tensor:
        seen.append(entry.output(output).detach().clone())
        return entry.output(output).sum()

    with torch.no_grad():
        plain = entry.output(model(**inputs))
    attribute(model, inputs, target, method)
    assert torch.equal(seen[0], plain)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "attnlrp-gamma"])
def test_eager_and_fused_attention_agree(method: str) -> None:
    found = []
    for implementation in ("eager", "sdpa"):
        found.append(attribute(llama(torch.float64, implementation), {"input_ids": ids()}, 5, method))
    rounding = 1e-5 if method == "gradient-x-input" else 1e-9  # rules that conserve stay in float64 where the model's code rounds
    assert same(*found, tolerance=rounding * float(found[0].inputs["input_ids"].abs().max()))


class Attend(nn.Module):
    """Fused or written attention with a mask."""

    def __init__(self, width: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, mask)
        return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2, 4]), st.integers(0, 10**6), st.sampled_from(["attnlrp", "cp-lrp", "gim"])
)
def test_fused_and_written_attention_agree_for_any_shape_and_mask(batch: int, length: int, heads: int, seed: int, method: str) -> None:
    torch.manual_seed(seed)
    x, mask = torch.randn(batch, length, 8, dtype=torch.float64), torch.rand(batch, 1, length, length) > 0.5
    mask |= torch.eye(length, dtype=torch.bool)
    fused, written = (Attend(8, heads, flag).double().eval() for flag in (True, False))
    written.load_state_dict(fused.state_dict())
    w = torch.randn(batch, heads, length, 8 // heads, dtype=torch.float64)
    one, two = (attribute(m, {"x": x, "mask": mask}, lambda out: (out * w).sum(), method) for m in (fused, written))
    assert same(one, two, 1e-9 * max(1.0, float(one.inputs["x"].abs().max())))
    assert one.passed
    assert two.passed


# -- nothing is left -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_plain_gradients_hooks_and_classes_are_as_before(method: str) -> None:
    model, neighbour, tokens = llama(), llama(), ids()
    before, classes = gradients(model, tokens), {type(m): dict(vars(type(m))) for m in model.modules()}
    functional, count = dict(vars(F)), hooks(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    attribute(model, {"input_ids": tokens}, 5, method)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model, tokens), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(neighbour, tokens), strict=True))
    assert all(dict(vars(kind)) == kept for kind, kept in classes.items())
    assert dict(vars(F)) == functional
    assert hooks(model) == count
    assert all(parameter.requires_grad and bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("where", ["model", "target", "interrupt"])
def test_an_exception_in_the_middle_leaves_nothing_behind(where: str) -> None:
    model, tokens = llama(), ids()
    before, count = gradients(model, tokens), hooks(model)
    error = KeyboardInterrupt if where == "interrupt" else ZeroDivisionError

    def fail(*_: Any) -> Any:
        raise error

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail) if where != "target" else None
    with pytest.raises(error):
        attribute(model, {"input_ids": tokens}, fail if where == "target" else 5)
    if handle is not None:
        handle.remove()
    assert hooks(model) == count
    assert torch._C._len_torch_function_stack() == 0
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(model, tokens), strict=True))


def test_another_model_that_runs_in_the_middle_keeps_its_own_gradient() -> None:
    """A model called from a hook inside the attribution computes what it always does."""
    model, other, tokens = llama(), llama(), ids()
    with torch.no_grad():
        expected = other(input_ids=tokens).logits
    seen: list[Tensor] = []

    def call_other(*_: Any) -> None:
        with torch.no_grad():
            seen.append(other(input_ids=tokens).logits)

    handle = model.model.layers[0].register_forward_pre_hook(call_other)
    plain = attribute(llama(), {"input_ids": tokens}, 5)
    found = attribute(model, {"input_ids": tokens}, 5)
    handle.remove()
    assert torch.equal(seen[0], expected)
    assert same(plain, found)


def test_two_threads_do_not_meet() -> None:
    model, tokens = llama(torch.float64), [ids(seed=s) for s in range(2)]
    expected = [attribute(model, {"input_ids": t}, 5) for t in tokens]
    found: list[Any] = [None, None]
    errors: list[BaseException] = []

    def work(place: int) -> None:
        try:
            for _ in range(3):
                found[place] = attribute(model, {"input_ids": tokens[place]}, 5)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


# -- among other scopes ----------------------------------------------------------------------------------------------


def test_an_edited_model_attributes_the_edited_computation() -> None:
    model, tokens = llama(torch.float64), ids()
    plain = attribute(model, {"input_ids": tokens}, 5)
    cut = copy.deepcopy(model)
    with torch.no_grad():
        cut.model.layers[0].self_attn.o_proj.weight[:, 4:8] = 0
    expected = attribute(cut, {"input_ids": tokens}, 5)
    with Plan([Edit("z", scale(0.0), select(layer=0, head=1))]).on(model):
        found = attribute(model, {"input_ids": tokens}, 5)
    assert found.passed
    assert abs(found.value - expected.value) < 1e-9
    assert same(found, expected, 1e-9)
    assert not same(found, plain, 1e-3)
    assert same(attribute(model, {"input_ids": tokens}, 5), plain)


def test_attribution_under_a_capture_is_the_same_and_the_capture_sees_it() -> None:
    model, tokens = llama(torch.float64), ids()
    plain = attribute(model, {"input_ids": tokens}, 5)
    with Probe(model).capture(Keep(pattern=True)) as seen:
        found = attribute(model, {"input_ids": tokens}, 5)
    assert same(plain, found, 1e-12)
    assert found.passed
    assert seen.pattern(layer=0).shape == (1, 4, 7, 7)


# -- models as people have them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_gives_the_same(method: str) -> None:
    model, tokens = llama(), ids()
    trained = attribute(model, {"input_ids": tokens}, 5, method)
    frozen = attribute(model.requires_grad_(False), {"input_ids": tokens}, 5, method)
    assert same(trained, frozen)


def test_samples_of_a_batch_do_not_mix() -> None:
    model, tokens = llama(torch.float64), ids(3)
    whole = attribute(model, {"input_ids": tokens}, 5)
    for row in range(3):
        alone = attribute(model, {"input_ids": tokens[row : row + 1]}, 5)
        assert float((whole.inputs["input_ids"][row] - alone.inputs["input_ids"][0]).abs().max()) < 1e-9


def test_left_padding_changes_nothing_and_gets_nothing() -> None:
    model, tokens = llama(torch.float64), ids()
    alone = attribute(model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(tokens)], 1)
    found = attribute(model, {"input_ids": padded, "attention_mask": mask}, 5)
    assert found.passed
    assert not found.inputs["input_ids"][0, :3].any()
    assert float((found.inputs["input_ids"][:, 3:] - alone.inputs["input_ids"]).abs().max()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_token_is_enough(method: str) -> None:
    result = attribute(llama(), {"input_ids": ids(1, 1)}, 5, method)
    assert result.inputs["input_ids"].shape == (1, 1)
    assert result.passed is not False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["attnlrp", "cp-lrp", "gim", "attnlrp-gamma"])
def test_half_precision_is_finite_and_near(dtype: torch.dtype, method: str) -> None:
    exact = attribute(llama(), {"input_ids": ids()}, 5, method).inputs["input_ids"]
    found = attribute(llama(dtype), {"input_ids": ids()}, 5, method)
    assert torch.isfinite(found.inputs["input_ids"]).all()
    assert float((found.inputs["input_ids"].float() - exact).abs().max()) < 0.2 * float(exact.abs().max())


@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.tanh, F.hardswish, F.mish])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zeros_before_an_activation_are_finite(activation: Any, dtype: torch.dtype) -> None:
    class Zeros(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return activation(x * torch.tensor([0.0, 1.0], dtype=x.dtype)).softmax(-1)

    result = attribute(Zeros().eval(), {"x": torch.tensor([[3.0, -2.0], [0.0, 0.0]], dtype=dtype)}, lambda out: out[:, 1].sum())
    assert torch.isfinite(result.inputs["x"]).all()


def test_writing_over_a_result_afterwards_does_not_change_the_books() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h *= 1.5
            gate, p, shift = torch.cos(h), h.clamp(-0.5, 0.7), torch.ones(4, dtype=x.dtype)
            gate.mul_(0.5).add_(0.25)
            p /= 2.0
            y = F.silu(h + shift)
            shift.zero_()
            y += gate
            y *= p
            found: Tensor = self.b(F.relu(y, inplace=True))
            return found

    class Careful(Careless):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x) * 1.5
            gate, p = torch.cos(h) * 0.5 + 0.25, h.clamp(-0.5, 0.7) / 2.0
            return self.b(F.relu((F.silu(h + 1.0) + gate) * p))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    one, two = Careless().double().eval(), Careful().double().eval()
    two.load_state_dict(one.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    found, expected = (attribute(m, {"x": x}, lambda out: out[:, 0].sum()) for m in (one, two))
    assert same(found, expected, 1e-12)
    assert found.passed
    assert expected.passed
    assert found.ledger is not None
    assert expected.ledger is not None
    assert found.ledger.by_kind() == pytest.approx(expected.ledger.by_kind(), abs=1e-10)


def test_gradient_checkpointing_is_refused_by_name_in_training_and_ignored_in_eval() -> None:
    model, tokens = llama(), ids()
    plain = attribute(model, {"input_ids": tokens}, 5)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert same(attribute(model, {"input_ids": tokens}, 5), plain)
    model.train()
    for method in METHODS:
        with pytest.raises(AttributionError, match=r"model\.layers\.0.* runs under gradient checkpointing.*disable"):
            attribute(model, {"input_ids": tokens}, 5, method, training=True)
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    assert same(attribute(model, {"input_ids": tokens}, 5, training=True), plain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_a_models_own_code_is_refused(reentrant: bool) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.a(x))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.inner, x, use_reentrant=reentrant)
            return found

    with pytest.raises(AttributionError, match="runs under gradient checkpointing"):
        attribute(Outer().eval(), {"x": torch.randn(2, 4)}, lambda out: out.sum())


def test_a_compiled_model_is_never_attributed_silently() -> None:
    model, tokens = llama(), ids()
    plain = attribute(model, {"input_ids": tokens}, 5)
    compiled = torch.compile(model, backend="eager")
    try:
        found = attribute(compiled, {"input_ids": tokens}, 5)
    except AttributionError:
        return
    assert same(found, plain, 1e-5) or found.passed is False


def test_tokens_made_under_inference_mode_are_as_good_as_others() -> None:
    model = llama()
    plain = attribute(model, {"input_ids": ids()}, 5)
    with torch.inference_mode():
        tokens = ids()
        inside = attribute(model, {"input_ids": tokens}, 5)
    with torch.no_grad():
        quiet = attribute(model, {"input_ids": tokens}, 5)
    assert same(plain, inside)
    assert same(plain, quiet)


def test_multihead_attention_is_seen_inside_and_out() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self, weights: bool) -> None:
            super().__init__()
            self.attention, self.weights = nn.MultiheadAttention(8, 2, batch_first=True), weights

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.attention(x, x, x, need_weights=self.weights)[0]
            return found

    one, two = (Net(weights).double().eval() for weights in (True, False))
    two.load_state_dict(one.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = [attribute(m, {"x": x}, lambda out: out[:, 0].sum()) for m in (one, two)]
    assert same(*found, tolerance=1e-10)
    assert all(result.passed and not result.unruled for result in found)


class Scriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x).relu()
        return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_modules_in_a_list_and_below_it_take_no_hooks_and_are_named_as_unruled() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.scripted = nn.Linear(6, 6), torch.jit.script(Scriptable())

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.scripted(self.part(x))
            return found

    model = nn.Sequential(torch.jit.script(Scriptable()), Block()).double().eval()
    found = attribute(model, {"input": torch.randn(2, 6, dtype=torch.float64)}, lambda out: out[:, 0].sum(), layers=True)
    assert {module for operation, module, _ in found.unruled if operation == "torch.jit.script"} >= {"0", "1.scripted"}
    assert bool(torch.isfinite(found.inputs["input"]).all())
    assert hooks(model[1]) == 0
