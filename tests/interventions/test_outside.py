"""Edits outside the door: what attention writes, what leaves a block, what leaves any module; and keys that nobody wrote."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from headscope.interventions import Edit, Plan, add, call, inject, mask, project, scale, select
from headscope.kernels.errors import EditError, SelectionError, ShapeError
from headscope.probe import Keep, Probe

LAYERS, HEADS, GROUPS, WIDTH = 3, 4, 2, 8
IDS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH, intermediate_size=40, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    for name, parameter in made.named_parameters():
        if "proj" in name:
            parameter.data *= 6
    return made


def logits(model: nn.Module, plan: Plan | None = None, **inputs: Any) -> Tensor:
    inputs = inputs or {"input_ids": IDS}
    with torch.no_grad():
        if plan is None:
            return model(**inputs).logits
        with plan.on(model):
            return model(**inputs).logits


@pytest.fixture(autouse=True)
def unchanged(model: LlamaForCausalLM) -> Iterator[None]:
    """After every test the model is as it was, to the bit."""
    before = logits(model)
    yield
    assert torch.equal(logits(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def hooked(model: nn.Module, paths: list[str], change: Any) -> Tensor:
    """The logits with forward hooks of torch alone."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    handles = [model.get_submodule(path).register_forward_hook(hook) for path in paths]
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("stage", "sites", "path"),
    [("resid", None, "model.layers.{}"), ("attn_out", None, "model.layers.{}.self_attn"), ("out", "*.mlp", "model.layers.{}.mlp")],
)
def test_an_edit_outside_the_door_is_what_a_hook_on_that_module_does(model: LlamaForCausalLM, stage: str, sites: str, path: str) -> None:
    direction = torch.randn(HEADS * WIDTH)
    unit = direction / direction.norm()
    wanted = hooked(model, [path.format(1), path.format(2)], lambda x: x - (x @ unit)[..., None] * unit)
    found = logits(model, Plan([Edit(stage, project(direction), select(sites, layers=[1, 2]))]))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - logits(model)).abs().max() > 1e-3


def test_positions_and_samples_are_selected_outside_too(model: LlamaForCausalLM) -> None:
    amount = torch.randn(HEADS * WIDTH)

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[1, 3] += amount
        return x

    wanted = hooked(model, ["model.layers.1"], change)
    found = logits(model, Plan([Edit("resid", add(amount), select(layer=1, queries=3, samples=[1]))]))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_position_means_the_same_token_in_every_decode_step(model: LlamaForCausalLM) -> None:
    """Steered at positions 9 and later, generation is that of a plan on the whole text at the same positions."""
    amount = 3 * torch.randn(HEADS * WIDTH)
    plan = Plan([Edit("z", scale(0.5), select(layer=1)), Edit("resid", add(amount), select(layer=1, phase="decode"))])
    with plan.on(model):
        written = model.generate(IDS[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    whole = Plan([Edit("z", scale(0.5), select(layer=1)), Edit("resid", add(amount), select(layer=1, queries=slice(9, None)))])
    with torch.no_grad(), whole.on(model):
        again = model(written[:, :-1]).logits.argmax(-1)[:, 8:]
    assert torch.equal(again, written[:, 9:])


@pytest.mark.parametrize("kind", ["bert", "gpt2", "mha"])
def test_attn_out_is_what_the_output_projection_writes_in_other_layouts(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "bert":
        model: nn.Module = BertModel(
            BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=50)
        )
        inputs: dict[str, Any] = {"input_ids": IDS}
        path = "encoder.layer.1.attention.output.dense"
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32))
        inputs, path = {"input_ids": IDS}, "transformer.h.1.attn.c_proj"
    else:
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40, batch_first=True), 2, enable_nested_tensor=False)
        inputs, path = {"src": torch.randn(2, 9, 32)}, ""
    model.eval()
    zeroed = Plan([Edit("attn_out", scale(0.0), select(layer=1))])
    with torch.no_grad():
        with zeroed.on(model):
            found = _first(model(**inputs))
        if path:
            handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
        else:  # its projection is no module that is called
            handle = model.get_submodule("layers.1.self_attn").register_forward_hook(
                lambda m, i, output: (torch.zeros_like(output[0]), None)
            )
        wanted = _first(model(**inputs))
        handle.remove()
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert (found - _first(model(**inputs))).abs().max() > 1e-3


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        (lambda: Edit("resid", scale(0.0), select(head=1)), EditError, "there all heads are summed"),
        (lambda: Edit("out", scale(0.0)), EditError, "name those that are meant"),
        (lambda: Edit("kv", scale(0.0)), EditError, "scale.0.0. cannot be done at kv"),
        (lambda: Edit("z", inject(torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))), EditError, "cannot be done at z: it works at kv"),
    ],
)
def test_what_cannot_be_outside_is_refused_when_it_is_written(edit: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        edit()


def test_a_module_that_is_not_there_is_said(model: LlamaForCausalLM) -> None:
    with pytest.raises(SelectionError, match="no site matches"):
        logits(model, Plan([Edit("out", scale(0.0), select("*.nothing"))]))


# -- injected keys -----------------------------------------------------------------------------------------------------


def prefix_of(model: LlamaForCausalLM, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad(), Probe(model).capture(Keep(qk=True, v=True)) as seen:
        model(ids)
    return [(seen.k(layer=layer), seen.v(layer=layer)) for layer in range(LAYERS)]


def injected(parts: list[tuple[Tensor, Tensor]], **more: Any) -> Plan:
    return Plan([Edit("kv", inject(k, v, **more), select(layer=layer)) for layer, (k, v) in enumerate(parts)])


def test_injecting_a_real_prefix_is_putting_its_text_before(model: LlamaForCausalLM) -> None:
    wanted = logits(model)[:, 4:]
    plan = injected(prefix_of(model, IDS[:, :4]))
    rest = {"input_ids": IDS[:, 4:], "position_ids": torch.arange(4, 9)[None], "use_cache": False}
    torch.testing.assert_close(logits(model, plan, **rest), wanted, atol=1e-5, rtol=1e-5)


def test_prefixes_of_different_length_take_no_share_with_what_is_not_there(model: LlamaForCausalLM) -> None:
    parts = prefix_of(model, IDS[:, :4])
    ragged = [(k.clone(), v.clone()) for k, v in parts]
    for k, v in ragged:
        k[1, :, 2:] = 0  # a key of zeros scores 0, which is no mask
        v[1, :, 2:] = 99
    rest = {"input_ids": IDS[:, 4:], "position_ids": torch.arange(4, 9)[None], "use_cache": False}
    found = logits(model, injected(ragged, lengths=[4, 2]), **rest)
    torch.testing.assert_close(found[0], logits(model)[0, 4:], atol=1e-5, rtol=1e-5)
    short = injected([(k[1:, :, :2], v[1:, :, :2]) for k, v in parts])
    alone = {**rest, "input_ids": IDS[1:, 4:]}
    torch.testing.assert_close(found[1], logits(model, short, **alone)[0], atol=1e-5, rtol=1e-5)


def test_key_positions_go_on_to_mean_the_tokens_of_the_text(model: LlamaForCausalLM) -> None:
    """Hiding token 2 behind an injected prefix is hiding token 2 + 4 of the whole text."""
    parts = prefix_of(model, IDS[:, :4])
    plan = Plan([*injected(parts), Edit("scores", mask(), select(keys=2))])
    rest = {"input_ids": IDS[:, 4:], "position_ids": torch.arange(4, 9)[None], "use_cache": False}
    wanted = logits(model, Plan([Edit("scores", mask(), select(keys=6, queries=slice(4, None)))]))[:, 4:]
    torch.testing.assert_close(logits(model, plan, **rest), wanted, atol=1e-5, rtol=1e-5)


def test_a_capture_sees_the_injected_keys(model: LlamaForCausalLM) -> None:
    plan = injected(prefix_of(model, IDS[:, :4]))
    with torch.no_grad(), plan.on(model), Probe(model).capture(Keep(pattern=True)) as seen:
        model(IDS[:, 4:], position_ids=torch.arange(4, 9)[None], use_cache=False)
    pattern = seen.pattern(layer=1)
    assert pattern.shape[-1] == 9
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, HEADS, 5))


def test_keys_that_do_not_fit_are_refused_with_both_shapes(model: LlamaForCausalLM) -> None:
    with pytest.raises(ShapeError, match=r"k is \[1, 3, 4, 8\], this call needs \[2, 2, 4, 8\]"):
        logits(model, Plan([Edit("kv", inject(torch.zeros(3, 4, 8), torch.zeros(3, 4, 8)), select(layer=0))]))
    with pytest.raises(EditError, match="each is from 0 to the 4 tokens"):
        inject(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), lengths=[5])


def test_a_plan_that_changes_keys_before_rotation_cannot_begin_in_the_middle_of_a_cache(model: LlamaForCausalLM) -> None:
    plan = Plan([Edit("k.pre", scale(2.0), select(layer=1))])
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        with pytest.raises(EditError, match="in the middle of a cached generation.*5 keys that were made without it"), plan.on(model):
            model(IDS[:, 5:6], past_key_values=cache, use_cache=True)
        with plan.on(model):  # begun anew it is the plan on the whole text
            cache = model(IDS[:, :5], use_cache=True).past_key_values
            last = model(IDS[:, 5:6], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last, logits(model, plan, input_ids=IDS[:, :6])[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_what_attention_writes_through_an_adapter_beside_the_output_map_is_refused_or_right(model: LlamaForCausalLM) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)).eval()
    paths = [f"base_model.model.model.layers.{layer}.self_attn.o_proj" for layer in range(LAYERS)]
    before = logits(adapted)
    wide = torch.randn(HEADS * WIDTH)
    refused = [("attn_out", add(1.0)), ("attn_out", project(wide)), ("attn_out", call(lambda x, _: x * x.tanh())), ("o", add(0.1))]
    for stage, op in refused:
        with pytest.raises(EditError, match=r"layers.0.self_attn#0 has several output maps side by side.*sites='\*o_proj'"):
            logits(adapted, Plan([Edit(stage, op)]))
    halved = logits(adapted, Plan([Edit("attn_out", scale(0.5))]))
    torch.testing.assert_close(halved, hooked(adapted, paths, lambda x: 0.5 * x))
    steered = logits(adapted, Plan([Edit("out", add(wide), select("*o_proj"))]))  # what the message advises
    torch.testing.assert_close(steered, hooked(adapted, paths, lambda x: x + wide))
    assert torch.equal(logits(adapted), before)
    merged = adapted.merge_and_unload()
    found = logits(merged, Plan([Edit("attn_out", add(wide))]))
    torch.testing.assert_close(found, steered, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_the_second_forward_of_a_checkpoint_is_edited_but_not_counted(model: LlamaForCausalLM) -> None:
    edits = [
        Edit("resid", scale(0.5), select(steps=0)),
        Edit("attn_out", call(lambda x, _: x * x.tanh()), select(steps=0)),
        Edit("out", call(lambda x, _: x * x.tanh()), select("*.mlp", steps=0)),
        Edit("z", scale(0.5), select(steps=0)),
        Edit("q.pre", scale(0.5), select(steps=0)),
    ]
    gradients = []
    for checkpointed in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointed:
            trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with Plan(edits).on(trained) as on:
            trained(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        assert dict(on.hits) == dict.fromkeys(range(len(edits)), LAYERS)
        gradients.append([parameter.grad for parameter in trained.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
