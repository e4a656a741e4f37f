"""Findings: what is broken on purpose is found and named, and what is well is not."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

from headscope.app.case import held_out_digit
from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe import load
from headscope.probe.health.baselines import Baselines, uniform_baseline
from headscope.probe.health.findings import Finding, find, notes_of, severity_named, worst
from headscope.probe.health.measure import measure_health
from headscope.probe.health.measures import GradientMeasures, HeadMeasures, StreamMeasures
from headscope.probe.health.report import HealthReport
from headscope.probe.health.rules import RULES
from headscope.probe.health.thresholds import Thresholds, thresholds_of
from headscope.probe.models import digits_processor, embedded_folder
from tests.probe.health.made import head_measures, site, stream_measures

TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in liberty, and dedicated to "
    "the proposition that all men are created equal. Now we are engaged in a great civil war."
)
NAN = math.nan


def found(
    *heads: HeadMeasures, streams: tuple[StreamMeasures, ...] = (), gradients: tuple[GradientMeasures, ...] = (), **thresholds: float
) -> tuple[Finding, ...]:
    uniform = {one.site.name: uniform_baseline(one) for one in heads if one.keys >= 2}
    limits = thresholds_of({name.replace("_", "-"): value for name, value in thresholds.items()})
    return find(heads, streams, gradients, Baselines(uniform), limits)


def told(findings: tuple[Finding, ...]) -> list[tuple[str, str, str]]:
    return [(one.severity, one.rule, one.place) for one in findings]


# -- single rules, on made-up numbers -----------------------------------------------------------------------------------


def test_usual_heads_and_states_give_no_finding() -> None:
    assert found(head_measures(), head_measures(1), streams=(stream_measures(0, "input"), stream_measures(0))) == ()


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_every_rule_needs_its_number_so_undefined_ones_find_nothing(place: int) -> None:
    fields = ("entropy_share", "routing", "hub", "sink", "max_score", "own", "previous", "contrast_low", "column_deviation")
    one = head_measures(**{name: [NAN if head == place else 0.0 for head in range(4)] for name in fields})
    every = found(one) + notes_of((one,), (), Thresholds())
    assert all(finding.head != place and place not in finding.heads for finding in every)
    nothing = head_measures(**dict.fromkeys(fields, NAN))
    states = (stream_measures(0, "input"), stream_measures(0, residual=NAN, cosine=NAN, effective_rank_centred=NAN))
    gradient = torch.full((4,), NAN, dtype=torch.float64)
    assert found(nothing, streams=states, gradients=(GradientMeasures(site(), *[gradient] * 4),)) == ()


def test_few_tokens_give_no_finding() -> None:
    assert found(head_measures(queries=7, keys=7.0, max_score=1e6)) == ()
    assert told(found(head_measures(queries=8, keys=8.0, max_score=1e6))) == [("alarm", "logit-growth", "layer 0")]
    assert found(head_measures(queries=64, keys=1.0, max_score=1e6)) == ()


def test_scores_are_watched_from_100_and_an_alarm_from_10000() -> None:
    found_one = found(head_measures(max_score=[99.0, 101.0, 10_001.0, 8.0]))
    assert told(found_one) == [("alarm", "logit-growth", "0.2"), ("warn", "logit-growth", "0.1")]
    assert found_one[1].evidence == (("max_score", 101.0, 100),)
    assert "101" in found_one[1].why
    assert any("QK-norm" in text for text in found_one[1].remedies)
    assert told(found(head_measures(max_score=101.0), logit_warn=200)) == []


def test_what_most_heads_share_is_said_of_the_layer() -> None:
    three = found(head_measures(max_score=[101.0, 102.0, 103.0, 8.0]))
    assert told(three) == [("warn", "logit-growth", "layer 0")]
    assert three[0].heads == (0, 1, 2)
    assert three[0].evidence[0][1] == 103.0
    assert "3 of 4 heads" in three[0].why
    assert len(found(head_measures(max_score=[101.0, 102.0, 8.0, 8.0]))) == 2


def test_a_uniform_head_is_found_and_causal_ones_are_judged_by_causal_uniform_attention() -> None:
    flat = dict(entropy_share=[0.999, 0.6, 0.6, 0.6], routing=[0.001, 0.3, 0.3, 0.3])
    assert told(found(head_measures(**flat))) == [("warn", "uniform-attention", "0.0")]
    keys = 32.5  # of 64 tokens under a causal mask; uniform attention itself routes there
    routing = uniform_baseline(head_measures(causal=True, keys=keys))["routing"]
    assert routing > 0.05
    causal = head_measures(causal=True, keys=keys, entropy_share=[1.0, 0.6, 0.6, 0.6], routing=[routing, 0.3, 0.3, 0.3])
    assert told(found(causal)) == [("warn", "uniform-attention", "0.0")]
    other = head_measures(keys=64.0, entropy_share=[1.0, 0.6, 0.6, 0.6], routing=[routing, 0.3, 0.3, 0.3])
    assert found(other) == ()


def test_a_layer_whose_rows_are_all_alike_has_collapsed_patterns() -> None:
    one = head_measures(routing=0.005, entropy_share=0.7, hub=0.3, sink=0.2)
    assert told(found(one)) == [("warn", "pattern-rank-collapse", "layer 0")]
    assert found(head_measures(routing=[0.005, 0.005, 0.005, 0.3], entropy_share=0.7, hub=0.3)) == ()
    flat = head_measures(routing=0.005, entropy_share=0.999)
    assert told(found(flat)) == [("warn", "uniform-attention", "layer 0")], "uniform attention has its own name"


def test_a_sink_is_an_observation_and_a_layer_of_nothing_else_a_warning() -> None:
    some = head_measures(sink=[0.6, 0.1, 0.1, 0.1], hub=[0.5, 0.1, 0.1, 0.1], sink_key=[7, 0, 0, 0])
    (one,) = found(some)
    assert (one.severity, one.rule, one.head) == ("info", "sink", 0)
    assert "position 7" in one.why
    most = head_measures(sink=0.95, hub=0.9, routing=0.005, entropy_share=0.2)
    assert told(found(most)) == [("warn", "sink-dominated", "layer 0")]
    assert told(found(head_measures(sink=0.6, hub=0.5))) == [("info", "sink", "layer 0")]


def test_a_key_that_few_queries_favour_is_no_sink() -> None:
    assert found(head_measures(sink=0.9, hub=0.05)) == ()
    short = head_measures(causal=True, keys=4.5, queries=8, sink=0.4, hub=0.3)  # 8 tokens: uniform attention gives the first 0.34
    assert found(short) == ()


def test_saturated_heads_of_a_layer_are_entropy_collapse() -> None:
    one = head_measures(entropy_share=[0.02, 0.03, 0.01, 0.6], routing=[0.9, 0.9, 0.9, 0.3], max_score=90.0)
    (collapse,) = found(one)
    assert (collapse.rule, collapse.place, collapse.heads) == ("entropy-collapse", "layer 0", (0, 1, 2))
    assert any("σReparam" in text for text in collapse.remedies)
    assert {note.head for note in notes_of((one,), (collapse,), Thresholds())} == set(), "a suspect is not called healthy"


@pytest.mark.parametrize("kind", ["previous", "own"])
def test_sharp_heads_that_look_at_a_neighbour_are_no_collapse(kind: str) -> None:
    one = head_measures(entropy_share=0.02, routing=0.95, **{kind: 0.97})
    assert found(one) == ()
    notes = notes_of((one,), (), Thresholds())
    assert {note.rule for note in notes} == {f"healthy-{kind}-token"}
    assert {note.severity for note in notes} == {"ok"}


def test_a_sharp_minority_is_healthy() -> None:
    one = head_measures(entropy_share=[0.02, 0.03, 0.6, 0.6], routing=[0.95, 0.9, 0.3, 0.3])
    assert found(one) == ()
    assert [(note.rule, note.head) for note in notes_of((one,), (), Thresholds())] == [("healthy-sharp", 0), ("healthy-sharp", 1)]


def test_notes_on_uncommon_patterns_leave_causal_heads_alone() -> None:
    fields = dict(contrast_low=[1.5, 0.5, 0.5, 0.5], column_deviation=[0.5, 0.01, 0.5, 0.5])
    assert [(one.rule, one.head) for one in notes_of((head_measures(**fields),), (), Thresholds())] == [
        ("amplifying", 0),
        ("doubly-stochastic", 1),
    ]
    assert notes_of((head_measures(causal=True, **fields),), (), Thresholds()) == ()


@pytest.mark.parametrize(("residual", "expected"), [(0.11, []), (0.09, ["warn"]), (0.009, ["alarm"])], ids=["above", "warning", "alarm"])
def test_tokens_that_become_one_are_found(residual: float, expected: list[str]) -> None:
    every = found(streams=(stream_measures(0, "input"), stream_measures(0), stream_measures(1, residual=residual)))
    assert [one.severity for one in every] == expected
    assert all((one.rule, one.layer) == ("token-collapse", 1) for one in every)


def test_a_residual_at_the_floor_of_the_type_is_an_alarm_whatever_it_is() -> None:
    every = found(streams=(stream_measures(0, "input"), stream_measures(1, residual=0.08, floored=True, dtype="bfloat16")))
    assert told(every) == [("alarm", "token-collapse", "layer 1")]


def test_flat_patterns_behind_collapsed_tokens_are_called_a_consequence() -> None:
    flat = dict(entropy_share=0.999, routing=0.001)
    states = (stream_measures(0, "input"), stream_measures(0), stream_measures(1, residual=0.05), stream_measures(2, residual=0.02))
    every = [one for one in found(head_measures(1, **flat), head_measures(2, **flat), streams=states) if one.rule == "uniform-attention"]
    assert [one.layer for one in every] == [1, 2]
    assert "cannot do otherwise" not in every[0].why
    assert "cannot do otherwise" in every[1].why
    assert every[1].remedies == ("mend the token-collapse in the layers before it",)


def test_inputs_that_are_alike_say_nothing_about_the_model() -> None:
    states = (stream_measures(0, "input", residual=0.01), stream_measures(0, residual=1e-4), stream_measures(1, residual=1e-7))
    every = found(head_measures(entropy_share=1.0, routing=0.0), streams=states)
    assert told(every) == [("info", "alike-inputs", "layer 0")]


def test_inputs_without_a_residual_stop_every_word_about_tokens() -> None:
    states = (stream_measures(0, "input", residual=NAN, undefined={"residual": "the states are 0"}), stream_measures(0, residual=1e-6))
    (one,) = found(head_measures(entropy_share=1.0, routing=0.0), streams=states)
    assert (one.severity, one.rule) == ("info", "undefined-inputs")
    assert "the states are 0" in one.why


def test_tokens_that_point_one_way_are_an_observation() -> None:
    every = found(streams=(stream_measures(0, "input"), stream_measures(1, cosine=0.95, residual=0.3)))
    assert told(every) == [("info", "alike-tokens", "layer 1")]


def test_few_directions_are_found_by_themselves_and_beside_fresh_weights() -> None:
    states = (stream_measures(0, "input"), stream_measures(1, effective_rank_centred=3.0))
    assert told(found(streams=states)) == [("warn", "rank-collapse", "layer 1")]
    states = (stream_measures(0, "input"), stream_measures(1, effective_rank_centred=6.0))
    assert found(streams=states) == ()
    fresh = Baselines(streams=(stream_measures(1, effective_rank_centred=40.0),))
    (one,) = find((), states, (), fresh, Thresholds())
    assert (one.severity, one.rule, one.layer) == ("warn", "rank-collapse", 1)
    assert one.evidence[0][2] == pytest.approx(0.2 * 40 / 63)


def test_gradients_that_do_not_reach_queries_and_keys_are_found() -> None:
    ratio = torch.tensor([0.5, 5e-4, 1e-7, 0.5], dtype=torch.float64)
    every = found(gradients=(GradientMeasures(site(2), ratio, ratio, ratio, ratio),))
    assert told(every) == [("alarm", "gradient-vanishing", "2.2"), ("warn", "gradient-vanishing", "2.1")]


def test_every_rule_that_can_fire_has_words_remedies_for_warnings_and_a_source() -> None:
    for name, rule in RULES.items():
        assert rule.layer, name
        assert rule.source or name in ("untrained", "alike-inputs", "undefined-inputs"), name
        assert rule.remedies or name in ("sink", "amplifying", "doubly-stochastic"), name


def test_a_finding_is_read_back_as_it_was() -> None:
    for one in found(
        head_measures(max_score=[101.0, 8.0, 8.0, 8.0]), streams=(stream_measures(0, "input"), stream_measures(1, residual=0.001))
    ):
        assert Finding.from_dict(one.to_dict()) == one


def test_the_worst_comes_first_and_severities_are_checked() -> None:
    every = found(head_measures(max_score=[101.0, 1e5, 8.0, 8.0], sink=[0.1, 0.1, 0.5, 0.1], hub=0.3))
    assert [one.severity for one in every] == ["alarm", "warn", "info"]
    assert worst(every) == "alarm"
    assert worst(()) == "ok"
    assert severity_named("warn") == "warn"
    with pytest.raises(InputError, match="no severity 'ok': there are info, warn, alarm"):
        severity_named("ok")


# -- real models, as they are and broken on purpose ---------------------------------------------------------------------


def embedded(name: str) -> tuple[nn.Module, Any]:
    try:
        embedded_folder(name)
    except HeadscopeError as error:
        pytest.skip(str(error))
    return load(f"embedded:{name}")


def health(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> HealthReport:
    return measure_health(model, inputs, **options)


def text() -> tuple[nn.Module, dict[str, Tensor]]:
    model, tokenizer = embedded("lm")
    return model, dict(tokenizer(TEXT, return_tensors="pt"))


def digit() -> tuple[nn.Module, dict[str, Tensor]]:
    return embedded("vit")[0], digits_processor(held_out_digit(3))


def queries_times(model: nn.Module, factor: float, layers: range | None = None) -> nn.Module:
    changed = copy.deepcopy(model)
    for name, module in changed.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "query")):
            if layers is not None and not any(f".{layer}." in name for layer in layers):
                continue
            for parameter in module.parameters():
                parameter.data.mul_(factor)
    return changed


KNOWN = {"previous-token": {(3, 6), (2, 4), (3, 7)}, "induction": {(5, 2), (5, 3), (5, 6)}}


def blamed(report: HealthReport) -> set[tuple[int | None, int]]:
    """Every head that a warning or an alarm names or includes."""
    every = report.at_least("warn")
    return {(one.layer, head) for one in every for head in ((one.head,) if one.head is not None else one.heads)}


def test_the_embedded_language_model_is_healthy_on_text_and_on_what_repeats() -> None:
    model, inputs = text()
    report = health(model, inputs)
    assert report.at_least("warn") == ()
    named = {(note.layer, note.head) for note in report.notes if note.rule == "healthy-previous-token"}
    assert named >= KNOWN["previous-token"]
    ids = torch.randint(10, 2000, (1, 64), generator=torch.Generator().manual_seed(0))
    report = health(model, {"input_ids": torch.cat([inputs["input_ids"][:, :1], ids, ids], dim=1)})
    assert report.at_least("warn") == ()
    healthy = {(note.layer, note.head) for note in report.notes if note.rule.startswith("healthy-")}
    assert healthy >= KNOWN["previous-token"] | KNOWN["induction"]


def test_the_embedded_vision_model_is_healthy() -> None:
    assert health(*digit()).findings == ()


def rules(report: HealthReport, severity: str = "warn") -> set[str]:
    return {one.rule for one in report.at_least(severity)}


def test_scores_times_fifty_are_found_as_growth_and_entropy_collapse() -> None:
    for model, inputs in (text(), digit()):
        report = health(queries_times(model, 50), inputs, baselines=False)
        assert rules(report) == {"logit-growth", "entropy-collapse"}
        assert len({one.layer for one in report.at_least("warn") if one.rule == "logit-growth"}) == len(report.heads)


def test_queries_of_zero_are_found_as_uniform_attention_in_every_layer() -> None:
    for model, inputs in (text(), digit()):
        report = health(queries_times(model, 0), inputs)
        uniform = [one for one in report.at_least("warn") if one.rule == "uniform-attention"]
        assert {one.layer for one in uniform} == {one.site.layer for one in report.heads}
        assert all(one.head is None for one in uniform)


def test_one_layer_without_queries_is_found_alone() -> None:
    model, inputs = text()
    report = health(queries_times(model, 0, range(2, 3)), inputs, baselines=("uniform",))
    assert [(one.rule, one.layer) for one in report.at_least("warn")] == [("uniform-attention", 2)]


def without_skips(model: nn.Module) -> nn.Module:
    """Every block of embedded:vit gives on what attention and MLP say, and not what came in."""
    changed = copy.deepcopy(model)

    def forward(self: Any, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        mixed = self.attention(self.layernorm_before(hidden_states))
        mixed = mixed[0] if isinstance(mixed, tuple) else mixed
        further: Tensor = self.mlp(self.layernorm_after(mixed)) if hasattr(self, "mlp") else self.intermediate(self.layernorm_after(mixed))
        return further if hasattr(self, "mlp") else self.output.dense(further)

    for module in changed.modules():
        if hasattr(module, "layernorm_before"):
            module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return changed


def test_a_trained_model_without_its_skips_is_found_and_named() -> None:
    model, inputs = digit()
    report = health(without_skips(model), inputs)
    collapse = [one for one in report.findings if one.rule == "token-collapse"]
    assert collapse[0].severity == "alarm"
    assert collapse[0].layer == len(report.heads) - 1
    assert "skip connections" in collapse[0].remedies[0]
    assert rules(report) & {"uniform-attention", "pattern-rank-collapse"}, "and the patterns that follow from it"


SMALL = dict(vocab_size=90, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)


def fresh(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = {"input_ids": torch.randint(5, 90, (1, 64), generator=torch.Generator().manual_seed(1))}
    torch.manual_seed(7)
    if kind == "vit":
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        config = ViTConfig(**{**SMALL, "image_size": 32, "patch_size": 4})
        return ViTModel(config).eval(), {"pixel_values": image}
    made: dict[str, Any] = {
        "bert": lambda: BertModel(BertConfig(**SMALL)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=90, n_embd=64, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    }
    return made[kind]().eval(), ids


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_an_untrained_network_is_called_untrained_and_not_sick(kind: str) -> None:
    report = health(*fresh(kind))
    assert report.at_least("warn") == ()
    assert report.findings[0].rule == "untrained" or "untrained" in rules(report, "info")


@pytest.mark.parametrize("value", [0.0, 1.0, NAN, math.inf], ids=["zeros", "ones", "nan", "inf"])
def test_inputs_that_hold_nothing_give_no_warning(value: float) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2, enable_nested_tensor=False).eval()
    report = health(model, torch.full((1, 20, 16), value))  # type: ignore[arg-type]
    assert report.at_least("warn") == ()
    assert {one.rule for one in report.findings} & {"alike-inputs", "undefined-inputs"}


def test_one_token_and_equal_tokens_give_no_warning() -> None:
    model, inputs = text()
    one = inputs["input_ids"][:, 1:2]
    assert health(model, {"input_ids": one}).findings == ()
    report = health(model, {"input_ids": one.expand(1, 40)})
    assert report.at_least("warn") == ()
