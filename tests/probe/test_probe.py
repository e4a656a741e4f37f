"""Probes on whole models: sites, generation with every kind of cache, strange inputs, and what is left when it goes wrong."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headscope.interventions import Edit, Plan, bias, call
from headscope.kernels.errors import ClosedError, NonFiniteError, NotIntercepted, SelectionError
from headscope.probe import Keep, Probe
from tests.probe.written import HEADS, LENGTH, WAYS, WIDTH, Attention, Net, Way, arguments, fused, inputs, net, products, twins

TIGHT = dict(atol=1e-10, rtol=0)
SIZES: dict[str, Any] = dict(
    vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def build(name: str, implementation: str = "sdpa", **changes: Any) -> Any:
    import transformers as t

    classes: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, dict(SIZES, num_key_value_heads=2)),
        "mistral": (t.MistralConfig, t.MistralForCausalLM, dict(SIZES, num_key_value_heads=2, sliding_window=4)),
        "gemma3": (
            t.Gemma3TextConfig, t.Gemma3ForCausalLM,
            dict(SIZES, num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        ),
        "gpt2": (t.GPT2Config, t.GPT2LMHeadModel, dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=None)),
        "bert": (t.BertConfig, t.BertModel, dict(SIZES)),
        "t5": (
            t.T5Config, t.T5ForConditionalGeneration,
            dict(vocab_size=50, d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=None),
        ),
    }  # fmt: skip
    config, model, options = classes[name]
    torch.manual_seed(0)
    return model(config(**{**options, **changes}, attn_implementation=implementation)).double().eval()


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randint(3, 50, (batch, length), generator=torch.Generator().manual_seed(2))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def clean(model: nn.Module) -> bool:
    from headscope.probe.interception.session import _sessions

    return hooks(model) == 0 and torch._C._len_torch_function_stack() == 0 and not _sessions


# -- sites ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_sites_describe_heads_groups_and_widths_whatever_the_code(way: str) -> None:
    model = net(way)
    sites = Probe(model).sites(*arguments(model))
    assert [s.name for s in sites] == ["layers.0#0", "layers.1#0"]
    assert [s.layer for s in sites] == [0, 1]
    for site in sites:
        assert (site.query_heads, site.kv_heads, site.key_dim, site.value_dim) == (HEADS, WAYS[way].groups, WIDTH // HEADS, WIDTH // HEADS)
        assert (site.kind, site.fold, site.normaliser, site.sinks) == ("self", 1, "softmax", WAYS[way].sink)
        assert site.output_projection == f"{site.module}.o_proj"
        assert (site.softcap is not None) == WAYS[way].cap


def test_looking_for_sites_leaves_random_state_gradients_and_outputs_alone() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net("fused")

        def forward(self, x: Tensor, *, strength: float) -> Tensor:
            out: Tensor = self.inner(F.dropout(x, 0.5, self.training) + strength * torch.randn_like(x))
            return out

    model, x = Noisy().train(), inputs().requires_grad_()
    state, python = torch.get_rng_state(), random.getstate()
    assert len(Probe(model).sites(x, strength=0.1)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert clean(model)


def test_sites_take_positional_and_named_inputs() -> None:
    model = build("bert")
    named = Probe(model).sites(input_ids=tokens(), attention_mask=torch.ones(2, 5))
    assert [s.name for s in Probe(model).sites(tokens())] == [s.name for s in named]


@pytest.mark.parametrize("way", ["fused grouped by expand", "fused with a bool mask", "eager causal", "sinks", "einsum"])
def test_sites_are_found_in_a_model_without_weights(way: str) -> None:
    model = net(way).to("meta")
    with torch.device("meta"):
        sites = Probe(model).sites(torch.empty(2, LENGTH, WIDTH, dtype=torch.float64))
    assert [s.to_dict() for s in sites] == [s.to_dict() for s in Probe(net(way)).sites(inputs())]


def test_an_encoder_decoder_tells_its_attentions_apart() -> None:
    model = build("t5")
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True)) as seen:
        model(input_ids=tokens(2, 7), decoder_input_ids=tokens(2, 4))
    kinds = [s.kind for s in seen.sites]
    assert kinds.count("cross") == 2
    assert kinds.count("self") == 4
    with pytest.raises(SelectionError, match=r"\d sites match: .*say which with site="):
        seen.pattern(0)
    assert seen.pattern(site="decoder.block.1.layer.1.EncDecAttention").shape == (2, 4, 4, 7)


def test_a_closed_probe_raises_and_names_the_way_out() -> None:
    probe = Probe(net("fused"))
    probe.close()
    for use in (lambda: probe.sites(inputs()), lambda: probe.capture().__enter__()):
        with pytest.raises(ClosedError, match=r"make a new Probe\(model\)"):
            use()


# -- attention by its model's own account ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma3", "mistral"])
def test_fused_and_eager_patterns_are_those_the_model_reports(name: str) -> None:
    own, other = build(name, "eager"), build(name, "sdpa")
    ids = tokens(2, 9)
    with torch.no_grad(), Probe(own).capture() as written, Probe(other).capture() as fused_seen:
        expected = own(ids, output_attentions=True).attentions
        other(ids)
    for layer, pattern in enumerate(expected):
        for seen in (written, fused_seen):  # the eager softmax runs in float32
            torch.testing.assert_close(seen.pattern(layer).double(), pattern.double(), atol=1e-6, rtol=0)
        torch.testing.assert_close(fused_seen.k(layer), written.k(layer), atol=1e-6, rtol=0)
        assert written.k(layer).shape[1] == written.sites[layer].kv_heads == fused_seen.sites[layer].kv_heads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_either_side_gets_no_attention_and_changes_no_other(side: str, implementation: str) -> None:
    model, ids, short = build("llama", implementation).float(), tokens(2, 8), 5
    mask = torch.ones(2, 8, dtype=torch.long)
    real = slice(8 - short, 8) if side == "left" else slice(0, short)
    hidden = slice(0, 8 - short) if side == "left" else slice(short, 8)
    mask[0, hidden] = 0
    with torch.no_grad(), Probe(model).capture() as seen, Probe(model).capture(Keep(statistics=True)) as numbers:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
    with torch.no_grad(), Probe(model).capture() as alone:
        model(ids[:1, real])
    for layer in (0, 1):
        pattern = seen.pattern(layer)[:1]
        torch.testing.assert_close(pattern[..., real, real], alone.pattern(layer), atol=1e-6, rtol=0)
        assert float(pattern[..., real, hidden].abs().max()) == 0
        entropy, expected = numbers.statistics(layer).entropy, alone.statistics(layer).entropy
        assert entropy is not None
        assert expected is not None
        torch.testing.assert_close(entropy[:1, :, real], expected, atol=1e-5, rtol=0)


def test_a_bfloat16_model_shows_nearly_the_pattern_of_the_exact_one() -> None:
    exact = build("llama")
    with torch.no_grad(), Probe(exact).capture() as seen:
        exact(tokens())
    for implementation in ("sdpa", "eager"):
        half = build("llama", implementation).bfloat16()
        with torch.no_grad(), Probe(half).capture() as low, Probe(half).capture(Keep(statistics=True)) as numbers:
            half(tokens())
        assert low.q(0).dtype == torch.bfloat16
        torch.testing.assert_close(low.pattern(1).double(), seen.pattern(1), atol=0.03, rtol=0)
        entropy, expected = numbers.statistics(1).entropy, seen.statistics(1).entropy
        assert entropy is not None
        assert entropy.dtype == torch.float32
        torch.testing.assert_close(entropy.double(), expected, atol=0.03, rtol=0)


# -- generate ---------------------------------------------------------------------------------------------------------------------------

GENERATORS = [
    ("llama", "sdpa", None), ("llama", "eager", None), ("llama", "sdpa", "static"), ("llama", "eager", "static"), ("gpt2", "sdpa", None),
    ("gpt2", "eager", None), ("gemma3", "sdpa", None), ("gemma3", "sdpa", "static"), ("gemma3", "eager", "static"),
    ("mistral", "sdpa", "static"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "implementation", "cache"), GENERATORS)
@pytest.mark.parametrize("keep", [Keep(), Keep(pattern=True)], ids=["q and k", "pattern"])
def test_every_decode_row_of_generate_is_the_row_of_one_forward(name: str, implementation: str, cache: str | None, keep: Keep) -> None:
    model, prompt, new = build(name, implementation), tokens(2, 6), 4
    options = {} if cache is None else dict(cache_implementation=cache, max_length=None)
    plain = model.generate(prompt, max_new_tokens=new, do_sample=False, **options)
    with Probe(model).capture(keep) as seen:
        made = model.generate(prompt, max_new_tokens=new, do_sample=False, **options)
    assert torch.equal(made, plain)
    with torch.no_grad(), Probe(model).capture() as whole:
        model(made[:, :-1])
    for layer in (0, 1):
        assert seen.steps(layer=layer) == list(range(new))
        for step in range(new):
            pattern = seen.pattern(layer, step=step)
            rows = list(range(6)) if step == 0 else [5 + step]
            expected = whole.pattern(layer, rows=rows)
            assert pattern.shape[2] == len(rows)
            for got, want in zip(pattern.unbind(2), expected.unbind(2), strict=True):
                # A cache may be longer than the text, or hold the last window only; what is seen is the same, in order.
                keys = [x[x > 0].reshape(2, 4, -1) for x in (got, want)]
                torch.testing.assert_close(keys[0], keys[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_keys_of_a_static_cache_are_not_overwritten_by_later_steps(implementation: str, mode: Callable[[], Any]) -> None:
    model, prompt = build("llama", implementation), tokens(2, 6)
    with mode(), Probe(model).capture(Keep(qk=True, v=True)) as seen:
        made = model.generate(prompt, max_new_tokens=4, do_sample=False, cache_implementation="static", max_length=None)
    with torch.no_grad(), Probe(model).capture(Keep(qk=True, v=True)) as whole:
        model(made[:, :-1])
    for layer in (0, 1):
        for step in range(4):
            for name in ("k", "v"):
                kept = getattr(seen, name)(layer, step=step)
                torch.testing.assert_close(kept[:, :, : 6 + step], getattr(whole, name)(layer)[:, :, : 6 + step], **TIGHT)
                assert float(kept[:, :, 6 + step :].abs().sum()) == 0, "a later step wrote into what was kept"


def test_a_cache_written_without_autograd_knowing_is_kept_as_it_was() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention(Way(fused)).double()
            self.register_buffer("keys", torch.zeros(1, HEADS, LENGTH, WIDTH // HEADS, dtype=torch.float64))

        def forward(self, x: Tensor, place: int) -> Tensor:
            q, k, v = self.attention.project(x)
            self.keys[:, :, place] = k[:, :, 0]
            return F.scaled_dot_product_attention(q, self.keys, v.expand(-1, -1, LENGTH, -1))

    model, x = Cached().eval(), inputs(1)
    with torch.no_grad(), Probe(model).capture() as seen:
        for place in range(LENGTH):
            model(x[:, place : place + 1], place)
    for step in range(LENGTH):
        filled = seen.k(site="*", step=step).abs().sum((0, 1, 3)) > 0
        assert filled.tolist() == [place <= step for place in range(LENGTH)]


def test_a_module_called_several_times_in_a_forward_shows_as_steps() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = net("eager grouped by expand", layers=1).layers[0]

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.layer(x)
            return x

    model, x = Shared(), inputs()
    with torch.no_grad(), Probe(model).capture() as seen:
        model(x)
    assert [s.name for s in seen.sites] == ["layer#0"]
    assert seen.steps(site="layer") == [0, 1, 2]
    for step in range(3):
        expected = twins(nn.ModuleDict({"layers": nn.ModuleList([model.layer])}), x)[0]  # type: ignore[arg-type]
        torch.testing.assert_close(seen.pattern(site="layer", step=step), expected.pattern, atol=1e-12, rtol=0)
        x = x + model.layer(x)


def test_rows_that_a_decode_step_does_not_have_are_refused_by_name() -> None:
    model = build("llama")
    with pytest.raises(SelectionError, match=r"no query position 3: this call has 1"), Probe(model).capture(Keep(rows=[3])):
        model.generate(tokens(), max_new_tokens=2, do_sample=False)
    with Probe(model).capture(Keep(rows=[-1])) as seen:
        model.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert [seen.pattern(0, step=s).shape[2] for s in seen.steps(layer=0)] == [1, 1, 1]


# -- strange inputs ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 1), (0, 4), (0, 1), (2, 0)])
@pytest.mark.parametrize("way", [name for name, way in WAYS.items() if not way.padded])
def test_one_token_no_tokens_and_an_empty_batch_are_captured(way: str, batch: int, length: int) -> None:
    model = net(way)
    x = inputs(batch, length)
    plain = model(x)
    keep = Keep(qk=True, pattern=True, statistics=True, scores=True, v=True, z=True, pooled=2)
    with torch.no_grad(), Probe(model).capture(keep) as seen, Probe(model).capture() as later:
        assert torch.equal(model(x), plain)
    for capture in (seen, later):
        assert capture.pattern(0).shape == (batch, HEADS, length, length)
        assert capture.pattern(1, heads=[2, 1]).shape == (batch, 2, length, length)
        assert capture.scores(0).shape == (batch, HEADS, length, length)
        found = capture.statistics(0)
        assert found.entropy is not None
        assert found.received is not None
        assert found.entropy.shape == found.received.shape == (batch, HEADS, length)
    if length == 1 and not WAYS[way].sink:
        assert torch.equal(seen.pattern(0), torch.ones(batch, HEADS, 1, 1, dtype=torch.float64))
    assert Probe(model).sites(x)[0].value_dim == WIDTH // HEADS


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.untyped_storage().nbytes() // max(1, one.element_size()))
        return result


@pytest.mark.parametrize("keep", [Keep(), Keep(statistics=True), Keep(pooled=64, rows=[-1])], ids=["q and k", "statistics", "pooled"])
def test_two_thousand_tokens_are_measured_without_a_map(keep: Keep) -> None:
    model, x = net("fused causal", layers=1).float(), inputs(1, 2048).float()
    with torch.no_grad(), Largest() as plain:
        model(x)
    with torch.no_grad(), Largest() as watched, Probe(model).capture(keep) as seen:
        model(x)
    assert plain.numbers < watched.numbers + 1 < 2048 * 2048 // 8, "a whole map was formed"
    with Largest() as reading:
        found = seen.pooled(0) if keep.pooled else seen.statistics(0).received
        last = None if keep.statistics else seen.pattern(0, rows=-1)
    assert reading.numbers < 2048 * 2048 // 8
    assert found is not None
    torch.testing.assert_close(found.sum(), torch.tensor(2048.0 * HEADS), atol=0.5, rtol=0)
    assert last is None or last.shape == (1, HEADS, 1, 2048)


class Noted(nn.Module):
    """Two layers of attention that let a test see which of their locals are still alive."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written, self.layers = written, net("eager").layers
        self.refs: list[weakref.ref[Tensor]] = []

    def layer(self, m: Attention, x: Tensor) -> Tensor:
        q, k, v = m.project(x)
        if self.written:
            scores = products(m, q, k)
            weights = scores.softmax(-1)
            z = weights @ v
            self.refs += [weakref.ref(scores), weakref.ref(weights)]
        else:
            z = F.scaled_dot_product_attention(q, k, v)
        own = v + 0
        self.refs += [weakref.ref(z), weakref.ref(own)]
        out: Tensor = m.o_proj(z.transpose(1, 2).reshape(x.shape)) + 0 * own.sum()
        return out

    def forward(self, x: Tensor) -> Tensor:
        for m in self.layers:
            x = x + self.layer(m, x)
        return x

    def alive(self) -> list[int]:
        gc.collect()
        return [i for i, ref in enumerate(self.refs) if ref() is not None]


@pytest.mark.parametrize("keep", [Keep(qk=False), Keep(), Keep(statistics=True), Keep(rows=[0])], ids=["nothing", "qk", "numbers", "rows"])
@pytest.mark.parametrize("written", [False, True], ids=["fused", "written"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_capture_keeps_nothing_alive_that_it_was_not_asked_for(keep: Keep, written: bool, grad: bool) -> None:
    model = Noted(written)
    with torch.set_grad_enabled(grad), Probe(model).capture(keep) as seen:
        for _ in range(2):
            model(inputs())
            assert model.alive() == [], "kept alive while the scope is open"
    assert len(seen.records) == 4


@pytest.mark.parametrize("edit", ["q", "k", "v", "bias", "scores", "pattern", "z", "o"])
@pytest.mark.parametrize("written", [False, True], ids=["fused", "written"])
def test_an_edit_keeps_nothing_alive(edit: str, written: bool) -> None:
    model = Noted(written)
    change = bias(1.0) if edit == "bias" else call(lambda x, _: x * 1.5)
    with torch.no_grad(), Plan([Edit(edit, change)]).on(model):
        model(inputs())
        assert model.alive() == []


def test_a_default_capture_of_a_training_step_holds_no_graph() -> None:
    class Sentinel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.note = Note()
            notes.append(weakref.ref(ctx.note))
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Note:
        pass

    notes: list[weakref.ref[Note]] = []
    for way in ("fused with a float mask", "eager with a bias", "softcap", "baddbmm"):
        model = net(way)
        with Probe(model).capture() as seen:
            model(Sentinel.apply(inputs().requires_grad_()))
        gc.collect()
        assert notes.pop()() is None, f"{way}: the graph of the forward is still there"
        assert not seen.pattern(1).requires_grad


# -- what is not caught, and what goes wrong ----------------------------------------------------------------------------------------------


class Half(nn.Module):
    """One attention that is caught and one whose scores are copied about until nobody can follow them."""

    def __init__(self) -> None:
        super().__init__()
        self.good = net("eager", layers=1).layers[0]

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        copied = torch.zeros(x.shape[0], t, 2 * t, dtype=x.dtype)
        copied[:, :, :t] = x @ x.transpose(1, 2)
        out: Tensor = copied.softmax(-1)[:, :, :t] @ self.good(x)
        return out


def test_without_strict_the_rest_is_captured_and_what_is_missing_is_listed() -> None:
    model, x = Half(), inputs()
    with pytest.raises(NotIntercepted, match="pass strict=False"), Probe(model).capture():
        model(x)
    assert clean(model)
    probe = Probe(model, strict=False)
    with probe.capture() as seen:
        model(x)
    assert [s.module for s in seen.sites] == ["good"]
    assert len(probe.unclaimed) == 1
    assert "softmax over a product of activations" in probe.unclaimed[0]
    probe = Probe(model, strict=False)
    assert [s.module for s in probe.sites(x)] == ["good"]
    assert probe.unclaimed
    with Probe(nn.Linear(WIDTH, WIDTH).double(), strict=False).capture() as nothing:
        pass
    with pytest.raises(SelectionError, match="nothing was captured"):
        nothing.pattern(0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, GeneratorExit])
@pytest.mark.parametrize("where", ["inside a module", "inside an attention", "after the forward"])
def test_an_interrupt_leaves_no_hook_no_mode_and_the_same_output(error: type[BaseException], where: str) -> None:
    def stop(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = products(m, q, k).softmax(-1)
        if armed and where == "inside an attention":
            raise error
        return weights @ v

    def raising(*_: object) -> None:
        if where == "inside a module":
            raise error

    armed: list[bool] = []
    model, x = net(Way(stop)), inputs()
    before = model(x)
    armed.append(True)
    handle = model.layers[1].register_forward_pre_hook(raising)
    with pytest.raises(error), Probe(model).capture(Keep(pattern=True), layers=9):  # noqa: PT012
        model(x)
        raise error
    handle.remove()
    armed.clear()
    assert clean(model)
    assert torch.equal(model(x), before)
    with Probe(model).capture() as seen:
        model(x)
    assert seen.steps(layer=0) == [0]


@pytest.mark.parametrize("way", ["fused", "eager"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_named_and_only_where_it_is_looked_at(way: str, value: float) -> None:
    model, x = net(way), inputs()
    with torch.no_grad():
        model.layers[1].k_proj.bias[6] = value
    with pytest.raises(NonFiniteError, match=r"k of layers.1#0 is not finite, first at sample 0, head 1, position 0 \(step 0\)"):  # noqa: SIM117
        with Probe(model).capture(Keep(statistics=True)):
            model(x)
    assert clean(model)
    with Probe(model).capture(Keep(statistics=True), layers=0) as seen:
        model(x)
    assert seen.statistics(0).entropy is not None
    assert len(Probe(model).sites(x)) == 2


def test_one_sample_that_is_not_a_number_is_found_among_many() -> None:
    model, x = net("fused"), inputs(3)
    x[2, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"q of layers.0#0 .* sample 2, head 0, position 4"), Probe(model).capture():
        model(x)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_in_training_shows_the_pattern_before_dropout(implementation: str) -> None:
    model = build("llama", implementation, attention_dropout=0.5)
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True)) as quiet:
        model(tokens())
    model.train()
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True)) as kept, Probe(model).capture() as later:
        model(tokens())
    torch.testing.assert_close(kept.pattern(0), quiet.pattern(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(later.pattern(0), quiet.pattern(0), atol=1e-6, rtol=0)
    assert not torch.allclose(kept.pattern(1), quiet.pattern(1)), "dropout in the first layer did not reach the second"


def test_a_capture_changes_no_bit_of_a_training_step() -> None:
    results = []
    for watched in (False, True):
        model = build("gpt2", "sdpa").train()
        torch.manual_seed(7)
        if watched:
            with Probe(model).capture(Keep(statistics=True, z=True)):
                loss = model(tokens(), labels=tokens()).loss
        else:
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_captures_side_by_side_keep_each_their_own() -> None:
    model, x = net("fused grouped", layers=3), inputs()
    first, second = Probe(model), Probe(model)
    with torch.no_grad(), first.capture(Keep(pattern=True), layers=0) as one:
        model(x)
        with second.capture(layers=[1, 2], heads=3) as two:
            model(x)
    assert one.steps(layer=0) == [0, 1]
    assert two.steps(layer=1) == [0], "the steps of a capture count from when it began"
    assert two.pattern(2).shape == (2, 1, LENGTH, LENGTH)
    with pytest.raises(SelectionError):
        one.pattern(1, step=0)


def test_two_models_whose_runs_are_interleaved_keep_their_calls_apart() -> None:
    models, x = [net("fused"), net("eager causal")], inputs()
    with torch.no_grad(), Probe(models[0]).capture() as one, Probe(models[1]).capture() as two:
        for _ in range(2):
            for model in models:
                model(x)
    for model, seen in zip(models, (one, two), strict=True):
        assert seen.steps(layer=1) == [0, 1]
        torch.testing.assert_close(seen.pattern(1, step=1), twins(model, x)[1].pattern, atol=1e-12, rtol=0)


def test_graph_attention_shows_its_own_map_by_default() -> None:
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    convolution = geometric.GATConv(8, 4, heads=3).double()

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = convolution

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            out: Tensor = self.convolution(x, edges)
            return out

    x, edges = torch.randn(5, 8, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
    _, (pairs, weights) = convolution(x, edges, return_attention_weights=True)
    model = Graph().eval()
    with torch.no_grad(), Probe(model).capture() as seen:
        model(x, edges)
    pattern = seen.pattern(site="convolution")
    for (source, target), weight in zip(pairs.T.tolist(), weights, strict=True):
        torch.testing.assert_close(pattern[0, :, target, source], weight.detach())
    with pytest.raises(SelectionError, match="has no scores to keep"), Probe(model).capture(Keep(scores=True)):
        model(x, edges)


def test_hooks_of_other_people_still_run_in_their_order() -> None:
    model, x, order = net("fused"), inputs(), []
    handles = [
        model.register_forward_hook(lambda *_: order.append("after")),
        model.register_forward_pre_hook(lambda *_: order.append("before")),
    ]
    with Probe(model).capture():
        model(x)
    assert order == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert clean(model)


def test_a_reading_inside_the_scope_is_no_call_of_the_model() -> None:
    for way in ("fused causal", "eager with a bias", "sinks"):
        model: Net = net(way)
        with torch.no_grad(), Probe(model).capture() as seen:
            model(*arguments(model))
            first = seen.pattern(0)
            seen.statistics(1, pooled=2)
        assert seen.steps(layer=0) == [0]
        torch.testing.assert_close(first, twins(model, *arguments(model))[0].pattern, atol=1e-12, rtol=0)
