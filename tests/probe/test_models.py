"""Loading: what is loaded, what is refused, and that nothing of a folder is ever run."""

from __future__ import annotations

import importlib.util
import json
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from headscope.kernels.errors import InputError, ModelError
from headscope.probe.checkpoint import check_weights, read_json, refuse_code
from headscope.probe.hub import is_hub_name
from headscope.probe.models import context_window, digits_processor, embedded_folder, load, model_fingerprint, tokenize
from tests.models.torchvision_path import torchvision_missing

LM = Path(__file__).parents[2] / "probe" / "embedded" / "lm" / "model.safetensors"
needs_lm = pytest.mark.skipif(not LM.is_file(), reason="probe/embedded/lm has no weights yet: train it with make train")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=12,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it, without a tokenizer."""
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


class Payload:
    """Pickled, it creates a file on being read by anything but a reader of weights."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.mark), "w")


def plant_pickle(folder: Path, mark: Path, name: str = "pytorch_model.bin") -> None:
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    torch.save({"model.embed_tokens.weight": Payload(mark)}, folder / name)


# --- the embedded models


def test_embedded_vit_is_an_ordinary_folder_that_loads_in_under_a_second_and_reads_digits() -> None:
    load("embedded:vit")  # the first load also imports the model's class
    began = time.perf_counter()
    model, processor = load("embedded:vit")
    assert time.perf_counter() - began < 1
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    held_out = load_file(embedded_folder("vit") / "held_out.safetensors")
    with torch.no_grad():
        predicted = model(**processor(held_out["images"])).logits.argmax(-1)
    accuracy = (predicted == held_out["labels"]).float().mean().item()
    assert accuracy >= 0.96
    recorded = read_json(embedded_folder("embedded:vit") / "training.json")
    assert accuracy == pytest.approx(recorded["held_out_accuracy"], abs=0.003)


@needs_lm
def test_embedded_lm_has_six_layers_of_eight_heads_and_loads_in_under_a_second() -> None:
    load("embedded:lm")
    began = time.perf_counter()
    model, tokens = load("embedded:lm")
    assert time.perf_counter() - began < 1
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 8, 4)
    assert sum(file.stat().st_size for file in embedded_folder("lm").iterdir()) <= 12 * 10**6
    inputs = tokenize(tokens, "It was a dark and stormy night", model)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@needs_lm
def test_embedded_lm_has_an_induction_head() -> None:
    recorded = read_json(embedded_folder("lm") / "training.json")
    assert max(max(layer) for layer in recorded["induction"]) >= 0.5


def test_an_unknown_embedded_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"no embedded model 'gpt9': there are embedded:lm .*; embedded:vit "):
        load("embedded:gpt9")


@pytest.mark.parametrize("name", ["embedded:../..", "embedded:", "embedded:/etc", "embedded:lm/../vit"])
def test_an_embedded_name_is_never_a_path(name: str) -> None:
    with pytest.raises(ModelError, match="no embedded model"):
        load(name)


# --- folders


def test_a_folder_loads_as_the_class_it_was_saved_as(folder: Path) -> None:
    model, processor = load(folder)
    assert type(model) is LlamaForCausalLM
    assert processor is None
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


def test_a_folder_brings_its_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(folder)
    model, loaded = load(str(folder))
    assert tokenize(loaded, "a b", model)["input_ids"].tolist() == [[1, 2]]


def test_dtype_and_task_choose_type_and_head(folder: Path) -> None:
    model, _ = load(folder, dtype="bfloat16", task="base")
    assert type(model) is LlamaModel
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_half_precision_weights_become_float32_on_the_cpu(folder: Path) -> None:
    tiny_llama().half().save_pretrained(folder)
    model, _ = load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_head_that_would_be_random_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="lacks 1 weights of LlamaForSequenceClassification, such as 'score.weight'"):
        load(folder, task="text-classification")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "poetry"}, "no task 'poetry': choose one of base, causal-lm"),
        ({"dtype": "int8"}, "no floating-point type 'int8'"),
        ({"dtype": "float17"}, "no floating-point type 'float17'"),
        ({"device": "abacus"}, "no device 'abacus' here: usable are cpu"),
    ],
)
def test_bad_arguments_are_named(folder: Path, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(folder, **arguments)  # type: ignore[arg-type]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    with pytest.raises(ModelError, match="no such folder") as caught:
        load(missing)
    assert str(missing) in str(caught.value)


@pytest.mark.parametrize("name", ["", " ", "a\0b", "../x", "a/b/c", "file:///etc/passwd", "https://example.org/m", "C:\\x", "//host/share"])
def test_what_is_neither_folder_nor_hub_id_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="no model .* there is no such folder, and it is no hub id"):
        load(name)


def test_a_file_is_refused_with_what_to_give(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file: give the folder"):
        load(folder / "config.json")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"model_type": 3}'])
def test_a_malformed_config_is_a_model_error(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError):
        load(folder)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, b"\0" * 8, (2**62).to_bytes(8, "little") + b"{}"])
def test_damaged_weights_are_a_model_error(folder: Path, damage: bytes) -> None:
    (folder / "model.safetensors").write_bytes(damage)
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder)


def test_truncated_weights_are_a_model_error(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder)


def test_weights_of_another_shape_are_a_model_error(folder: Path) -> None:
    change_config(folder, hidden_size=32)
    with pytest.raises(ModelError):
        load(folder)


def test_an_adapter_is_refused_with_advice(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ModelError, match="is a PEFT adapter"):
        load(folder)


# --- nothing is run


def test_a_folder_of_pickles_is_refused_and_its_payload_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    plant_pickle(folder, mark)
    with pytest.raises(ModelError, match=r"only as a pickle \(pytorch_model\.bin\).*allow_pickle=True"):
        load(folder)
    assert not mark.exists()


def test_allow_pickle_still_reads_tensors_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    plant_pickle(folder, mark)
    with pytest.raises(ModelError, match="could not be loaded"):
        load(folder, allow_pickle=True)
    assert not mark.exists()
    with open(folder / "pytorch_model.bin", "rb") as file, pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    assert not mark.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)["model.embed_tokens.weight"].close()
    assert mark.exists()  # the payload is a real one


def test_allow_pickle_loads_an_honest_pickle(folder: Path) -> None:
    weights = tiny_llama().state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    model, _ = load(folder, allow_pickle=True)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_safetensors_win_over_a_pickle_beside_them(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save(Payload(mark), folder / "pytorch_model.bin")
    load(folder, allow_pickle=True)
    assert not mark.exists()


@pytest.mark.parametrize("model_type", ["evil", "llama"])
def test_code_beside_the_weights_is_never_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    change_config(
        folder,
        model_type=model_type,
        auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}, "tokenizer_class": "Evil"}')
    with pytest.raises(ModelError):
        load(folder)
    (folder / "tokenizer_config.json").unlink()
    if model_type == "llama":  # transformers' own class is there, so the code is ignored
        assert type(load(folder)[0]) is LlamaForCausalLM
    else:
        with pytest.raises(ModelError, match="brings its own code .*evil"):
            load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_cannot_ask_for_a_kernel_from_the_hub(folder: Path, key: str) -> None:
    change_config(folder, **{key: "someone/kernel"})
    with pytest.raises(ModelError, match=f"asks for a kernel from the hub .{key}"):
        load(folder)
    with pytest.raises(ModelError, match="asks for a kernel"):
        refuse_code({"model_type": "llava", "text_config": {"parts": [{key: {"": "someone/kernel"}}]}}, "nested")


def test_an_architecture_that_is_no_model_is_refused(folder: Path) -> None:
    change_config(folder, architectures=["RagRetriever"])
    with pytest.raises(ModelError, match="saved as 'RagRetriever', which is no model of transformers"):
        load(folder)


@pytest.mark.parametrize("shard", ["../../other.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.py", ""])
def test_a_shard_index_cannot_point_outside_its_folder(folder: Path, shard: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ModelError, match="points at .*expected the names of weight files in the same folder"):
        check_weights(folder, "model", allow_pickle=False)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"'model-00002-of-00002\.safetensors', which is missing"):
        load(folder)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_no_text_is_both_a_path_and_a_hub_id(text: str) -> None:
    if is_hub_name(text):
        assert text.count("/") <= 1
        assert not {"\\", "\0", ":", " ", "~"} & set(text)
        assert ".." not in text


# --- diffusers


def test_a_diffusers_transformer_loads_from_its_own_folder(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    saved = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4, patch_size=2, num_embeds_ada_norm=10
    )
    saved.save_pretrained(tmp_path)
    model, processor = load(tmp_path)
    assert type(model) is type(saved)
    assert processor is None
    assert model_fingerprint(model) == model_fingerprint(saved)
    change_config(tmp_path, _class_name="DiffusionPipeline")
    with pytest.raises(ModelError, match="saved as 'DiffusionPipeline', which is no model of diffusers"):
        load(tmp_path)


@pytest.fixture
def pipeline_folder(tmp_path: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=4, patch_size=2, num_embeds_ada_norm=10
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_a_pipeline_gives_its_denoiser_and_itself(pipeline_folder: Path) -> None:
    model, pipeline = load(pipeline_folder, dtype="float64")
    assert model is pipeline.transformer
    assert {p.dtype for p in pipeline.vae.parameters()} == {torch.float64}


def test_a_pipeline_cannot_bring_code(pipeline_folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    index = json.loads((pipeline_folder / "model_index.json").read_text())
    for change in (
        {"vae": ["evil", "Model"]},
        {"_class_name": ["evil", "Pipeline"]},
        {"vae": ["os", "system"]},
        {"../x": ["diffusers", "UNet2DModel"]},
    ):
        (pipeline_folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
        (pipeline_folder / "vae" / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
        (pipeline_folder / "model_index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(ModelError, match="only classes of diffusers and transformers are loaded|code in the folder is never run"):
            load(pipeline_folder)
        assert not mark.exists()


def test_a_pipeline_of_pickles_is_refused(pipeline_folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    plant_pickle(pipeline_folder / "vae", mark, "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="only as a pickle"):
        load(pipeline_folder)
    with pytest.raises(ModelError, match="could not be loaded"):
        load(pipeline_folder, allow_pickle=True)
    assert not mark.exists()


# --- timm


@pytest.mark.slow
def test_a_timm_model_loads_from_the_safetensors_of_its_hub_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := torchvision_missing():
        pytest.skip(missing)
    timm = pytest.importorskip("timm")
    saved = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    asked: list[str] = []

    def fetch(name: str, revision: str | None, **_: object) -> Path:
        asked.append(name)
        return tmp_path

    monkeypatch.setattr("headscope.probe.models.fetch", fetch)
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only as a pickle"):
        load("timm:vit_tiny_patch16_224")
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    model, transform = load("timm:vit_tiny_patch16_224")
    assert model_fingerprint(model) == model_fingerprint(saved)
    assert callable(transform)
    assert asked[-1].startswith("timm/vit_tiny_patch16_224")
    with pytest.raises(ModelError, match="timm has no model 'vit_tinyy': did you mean"):
        load("timm:vit_tinyy")
    with pytest.raises(ModelError, match="timm:resnet50.poetry could not be loaded .*Invalid pretrained tag"):
        load("timm:resnet50.poetry")


# --- text


def test_empty_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="the text is empty"):
        tokenize(tokenizer, "", tiny_llama())
    with pytest.raises(InputError, match="makes no token of '   '"):
        tokenize(tokenizer, "   ", tiny_llama())


def test_too_long_text_is_refused_with_both_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    assert tokenize(tokenizer, "a " * 12, model)["input_ids"].shape == (1, 12)
    with pytest.raises(InputError, match="the text has 13 tokens, the context window of this model 12: shorten it by 1 tokens"):
        tokenize(tokenizer, "a " * 13, model)


def test_what_is_no_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="expected one text as str, got list"):
        tokenize(tokenizer, ["a"], tiny_llama())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cannot be written as UTF-8"):
        tokenize(tokenizer, "\ud800", tiny_llama())


def test_a_model_without_a_config_has_no_context_window() -> None:
    assert context_window(nn.Linear(2, 2)) is None
    assert context_window(tiny_llama()) == 12


# --- digits


def test_digits_become_pixels_between_minus_one_and_one() -> None:
    ink = np.arange(64).reshape(8, 8) % 17
    pixels = digits_processor(ink)["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    assert torch.equal(digits_processor(torch.tensor(ink)[None])["pixel_values"], pixels)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((28, 28)), r"expected images \[8, 8\] or \[B, 8, 8\], got \[28, 28\]"),
        (np.zeros((0, 8, 8)), "expected images"),
        (np.full((8, 8), 255), "expected ink between 0 and 16, got 255 to 255"),
        (np.full((8, 8), np.nan), "expected ink between 0 and 16, got nan"),
        ("digits", "expected images as numbers"),
    ],
)
def test_what_is_no_digit_is_refused(images: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        digits_processor(images)  # type: ignore[arg-type]


# --- fingerprints


def test_a_fingerprint_is_equal_across_loads_and_changes_with_one_weight(folder: Path) -> None:
    first, second = load(folder)[0], load(folder)[0]
    name = model_fingerprint(first)
    assert name.startswith("sha256:")
    assert len(name) == 71
    assert model_fingerprint(second) == name
    with torch.no_grad():
        second.lm_head.weight[3, 5] = torch.nextafter(second.lm_head.weight[3, 5], torch.tensor(9.0))
    assert model_fingerprint(second) != name


def test_a_fingerprint_tells_classes_and_types_apart() -> None:
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    torch.manual_seed(0)
    model = BertForMaskedLM(config)
    names = {model_fingerprint(model), model_fingerprint(model.bert), model_fingerprint(model.half())}
    assert len(names) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_sampled_fingerprint_still_sees_every_single_weight(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("headscope.probe.models.WHOLE_BYTES", 0)
    model = nn.Module()
    weight = torch.linspace(-3, 3, 5000).to(dtype)
    model.register_buffer("weight", weight)
    name = model_fingerprint(model)
    for place in (0, 1777, 4999):
        before = weight[place].clone()
        weight[place] = 4.0
        assert model_fingerprint(model) != name
        weight[place] = before
        assert model_fingerprint(model) == name


def test_a_fingerprint_of_meta_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="the weight weight is on the meta device"):
        model_fingerprint(nn.Linear(2, 2, device="meta", bias=False))


def test_a_fingerprint_of_five_million_weights_takes_under_half_a_second() -> None:
    model = nn.Linear(2500, 2000)
    model_fingerprint(model)
    began = time.perf_counter()
    model_fingerprint(model)
    assert time.perf_counter() - began < 0.5


def test_extra_safetensors_do_not_disturb_a_folder(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    assert torch.equal(load(folder)[0].lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize("name", ["vit", pytest.param("lm", marks=needs_lm)])
def test_a_model_card_says_what_its_training_log_says(name: str) -> None:
    place = Path(__file__).parents[2] / "probe" / "embedded"
    spec = importlib.util.spec_from_file_location("model_card", place / "model_card.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    card = (place / name / "README.md").read_text(encoding="utf-8")
    assert card == module.filled(card, read_json(place / name / "training.json")), f"run {place.name}/model_card.py on {name}"
