"""Weights of heads, found by gradients, against what each architecture's own code says about its layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, NotIntercepted
from headscope.probe import Keep, Probe
from headscope.probe.atlas.weights import HeadWeights, head_weights
from tests.models import ENTRIES
from tests.models.entry import Inputs

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

H, D, E = 4, 8, 32


def built(name: str) -> tuple[nn.Module, Inputs]:
    entry = next(entry for entry in ENTRIES if entry.name == name)
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    return entry.build()


def at(model: nn.Module, path: str) -> Tensor:
    return model.get_parameter(path).detach()


def rows(weight: Tensor) -> Tensor:
    """[H·D, E] of nn.Linear -> [H, D, E]."""
    return weight.reshape(-1, D, weight.shape[-1])


def separate(q: str, k: str, v: str, o: str) -> Callable[[nn.Module], list[Tensor]]:
    """A map for each of q, k, v and o."""
    return lambda m: [*(rows(at(m, f"{name}.weight")) for name in (q, k, v)), rows(at(m, f"{o}.weight").mT)]


def gpt2(m: nn.Module) -> list[Tensor]:
    """Conv1D [E, 3E]: the blocks of q, k and v side by side."""
    parts = at(m, "transformer.h.0.attn.c_attn.weight").split(E, dim=1)
    return [*(rows(p.mT) for p in parts), rows(at(m, "transformer.h.0.attn.c_proj.weight"))]


def interleaved(qkv: str, dense: str) -> Callable[[nn.Module], list[Tensor]]:
    """Rows (head, q k v, D), as in GPT-NeoX and Bloom."""

    def read(m: nn.Module) -> list[Tensor]:
        whole = at(m, f"{qkv}.weight").reshape(H, 3, D, E)
        return [whole[:, 0], whole[:, 1], whole[:, 2], rows(at(m, f"{dense}.weight").mT)]

    return read


def falcon(m: nn.Module) -> list[Tensor]:
    """All query heads, then the one key and the one value."""
    q, k, v = rows(at(m, "transformer.h.0.self_attention.query_key_value.weight")).split([H, 1, 1])
    return [q, k, v, rows(at(m, "transformer.h.0.self_attention.dense.weight").mT)]


def phi3(m: nn.Module) -> list[Tensor]:
    q, k, v = rows(at(m, "model.layers.0.self_attn.qkv_proj.weight")).split([H, 2, 2])
    return [q, k, v, rows(at(m, "model.layers.0.self_attn.o_proj.weight").mT)]


def packed(prefix: str) -> Callable[[nn.Module], list[Tensor]]:
    """in_proj_weight of nn.MultiheadAttention."""

    def read(m: nn.Module) -> list[Tensor]:
        return [*(rows(p) for p in at(m, f"{prefix}in_proj_weight").chunk(3)), rows(at(m, f"{prefix}out_proj.weight").mT)]

    return read


def decoder(prefix: str, q: str = "q_proj", o: str = "o_proj") -> Callable[[nn.Module], list[Tensor]]:
    return separate(f"{prefix}.{q}", f"{prefix}.k_proj", f"{prefix}.v_proj", f"{prefix}.{o}")


BERT = "encoder.layer.0.attention"
LAYOUTS: dict[str, tuple[Callable[[nn.Module], list[Tensor]], float]] = {  # with the factor on q, where the model scales it before the call
    "Llama (GQA)": (decoder("model.layers.0.self_attn"), 1),
    "Llama (left padding)": (decoder("model.layers.0.self_attn"), 1),
    "Mistral (SWA)": (decoder("model.layers.0.self_attn"), 1),
    "GPT-2": (gpt2, 1),
    "GPT-NeoX": (interleaved("gpt_neox.layers.0.attention.query_key_value", "gpt_neox.layers.0.attention.dense"), 1),
    "GPT-J": (decoder("transformer.h.0.attn", o="out_proj"), 1),
    "Falcon (MQA)": (falcon, 1),
    "Bloom (ALiBi)": (interleaved("transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"), 1),
    "OPT": (decoder("model.decoder.layers.0.self_attn", o="out_proj"), D**-0.5),
    "Phi-3": (phi3, 1),
    "BERT (padding)": (separate(f"{BERT}.self.query", f"{BERT}.self.key", f"{BERT}.self.value", f"{BERT}.output.dense"), 1),
    "T5 (relative bias)": (separate(*(f"encoder.block.0.layer.0.SelfAttention.{name}" for name in "qkvo")), 1),
    "nn.TransformerEncoder (padding)": (packed("layers.0.self_attn."), 1),
    "einsum with groups (GQA)": (separate("layers.0.wq", "layers.0.wk", "layers.0.wv", "layers.0.wo"), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_rows_of_every_head_are_those_that_the_architecture_gives_it(name: str) -> None:
    model, inputs = built(name)
    read, factor = LAYOUTS[name]
    found = next(iter(head_weights(model, inputs).values()))
    assert found.reason is None
    q, k, v, o = read(model)
    for mine, expected in ((found.q, q * factor), (found.k, k), (found.v, v), (found.o, o)):
        assert mine is not None
        assert mine.shape == expected.shape
        torch.testing.assert_close(mine, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["Qwen3", "OLMo-2"])
def test_under_a_norm_of_queries_and_keys_the_rows_are_still_in_order(name: str) -> None:
    model, inputs = built(name)
    found = head_weights(model, inputs)["model.layers.1.self_attn#0"]
    assert found.through["q"] == found.through["k"] == "norm"
    for mine, path in ((found.q, "q_proj"), (found.k, "k_proj")):
        assert mine is not None
        assert torch.equal(mine, at(model, f"model.layers.1.self_attn.{path}.weight").reshape(mine.shape))


def test_latent_attention_reads_its_latents_and_the_rotated_part_reads_the_stream() -> None:
    model, inputs = built("DeepSeek-V3 (MLA)")
    found = head_weights(model, inputs)["model.layers.0.self_attn#0"]
    prefix = "model.layers.0.self_attn"
    assert found.reason is None
    assert dict(found.reads) == {"q": "latent", "k": "residual+latent", "v": "latent"}
    assert found.q is not None
    assert found.k is not None
    assert found.v is not None
    up = at(model, f"{prefix}.kv_b_proj.weight").reshape(H, 16 + 12, 16)  # 16 wide without rotation, 12 wide values
    torch.testing.assert_close(found.v, up[:, 16:])
    torch.testing.assert_close(found.k[:, :16, E:], up[:, :16])
    assert not found.k[:, :16, :E].any()
    assert not found.k[:, 16:, E:].any()
    rotated = at(model, f"{prefix}.kv_a_proj_with_mqa.weight")[16:]
    for head in found.k[:, 16:, :E]:
        torch.testing.assert_close(head.square().sum(), rotated.square().sum())  # their order is that of the rotated halves
    first, every = found.k[0, 16:, :E], rotated
    assert sorted(first[:, 0].tolist()) == pytest.approx(sorted(every[:, 0].tolist()))


def rebuilt(found: HeadWeights, x: Tensor, pattern: Tensor) -> Tensor:
    """Σ_h pattern_h (x W_V + b_V) W_O, in float64."""
    assert found.v is not None
    assert found.o is not None
    assert found.v_bias is not None
    total = torch.zeros((), dtype=torch.float64)
    for h in range(pattern.shape[1]):
        g = h // found.groups
        v = x.double() @ found.v[g].double().T + found.v_bias[g].double()
        total = total + pattern[:, h].double() @ v @ found.o[h].double()
    return total


PLAIN = {  # no rotation, no norm: the module that is given x and returns what its heads write
    "GPT-2": ("transformer.h.1.attn", "c_proj.bias"),
    "OPT": ("model.decoder.layers.1.self_attn", "out_proj.bias"),
    "einsum bqhd,bkhd->bhqk": ("layers.1", "wo.bias"),
    "matmul, softmax": ("layers.1", "wo.bias"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_scores_and_outputs_of_heads_follow_from_the_weights(name: str) -> None:
    model, inputs = built(name)
    path, bias = PLAIN[name]
    module = model.get_submodule(path)
    given: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: object) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        y = output[0] if isinstance(output, tuple) else output
        assert isinstance(y, Tensor)
        given.append((x, y))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    with Probe(model).capture(Keep(pattern=True)) as seen, torch.no_grad():
        model(**inputs)
    handle.remove()
    x, y = given[0]
    found = next(w for w in head_weights(model, inputs).values() if w.site.module == path)
    pattern = seen.pattern(site=found.site.name)
    made = rebuilt(found, x, pattern) + module.get_parameter(bias).double()
    torch.testing.assert_close(made, y.double(), rtol=1e-4, atol=1e-5)
    assert found.q is not None
    assert found.k is not None
    assert found.q_bias is not None
    assert found.k_bias is not None
    q = torch.einsum("bse,hde->bhsd", x.double(), found.q.double()) + found.q_bias[:, None].double()
    k = torch.einsum("bse,hde->bhsd", x.double(), found.k.double()) + found.k_bias[:, None].double()
    scores = q @ k.mT
    factor = 1 if name == "OPT" else D**-0.5
    ours = scores[:, :, -1] * factor - scores[:, :, -1, :1] * factor  # the last query sees all keys in these models
    theirs = pattern[:, :, -1].double().log() - pattern[:, :, -1, :1].double().log()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_nothing_is_left_changed_and_the_weights_are_copies() -> None:
    model, inputs = built("Llama (GQA)")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before = {name: (p.requires_grad, p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    found = next(iter(head_weights(model, inputs).values()))
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.grad is None
    assert found.o is not None
    assert not found.o.requires_grad
    found.o.zero_()
    assert torch.equal(at(model, "model.layers.0.self_attn.o_proj.weight"), before["model.layers.0.self_attn.o_proj.weight"][1])


def test_a_low_rank_adapter_is_part_of_the_weights() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = built("Llama (GQA)")
    names = ["q_proj", "v_proj", "o_proj"]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, target_modules=names, init_lora_weights=False)).eval()
    found = head_weights(adapted, inputs)["model.layers.0.self_attn#0"]
    assert found.reason is None
    attention = model.get_submodule("model.layers.0.self_attn")
    for name, mine in zip(names, (found.q, found.v, None if found.o is None else found.o.flatten(0, 1).T), strict=True):
        layer = attention.get_submodule(name)
        a, b = (layer.get_parameter(f"lora_{side}.default.weight") for side in "AB")
        whole = layer.get_parameter("base_layer.weight") + 7 / 3 * b @ a
        assert mine is not None
        torch.testing.assert_close(mine.reshape(whole.shape), whole, rtol=1e-4, atol=1e-5)


class Convolved(nn.Module):
    """Attention over places of a picture, its maps convolutions."""

    def __init__(self, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.q, self.k = nn.Conv2d(E, E, 1), nn.Conv2d(E, E, 1, groups=groups)
        self.v, self.out = nn.Conv2d(E, E, kernel, padding=kernel // 2), nn.Conv2d(E, E, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(1, (H, D)).flatten(3).mT for layer in (self.q, self.k, self.v))
        z = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(z.mT.reshape(x.shape))
        return out


def test_maps_that_are_convolutions_of_one_place_are_found() -> None:
    torch.manual_seed(0)
    model = Convolved().eval()
    found = next(iter(head_weights(model, torch.randn(2, E, 3, 3)).values()))
    assert found.reason is None
    assert found.v is not None
    assert found.o is not None
    torch.testing.assert_close(found.v, rows(model.v.weight.detach()[..., 0, 0]))
    torch.testing.assert_close(found.o, rows(model.out.weight.detach()[..., 0, 0].T))


def test_a_map_over_neighbours_has_a_reason_in_place_of_weights() -> None:
    torch.manual_seed(0)
    found = next(iter(head_weights(Convolved(3).eval(), torch.randn(1, E, 3, 3)).values()))
    assert found.v is None
    assert found.reason is not None
    assert "neighbouring places" in found.reason
    assert found.missing("q", "k") is None
    grouped = next(iter(head_weights(Convolved(groups=2).eval(), torch.randn(1, E, 3, 3)).values()))
    assert grouped.reasons == {"k": "a grouped or transposed convolution makes it"}
    assert found.missing("v", "o") == f"v: {found.reasons['v']}"


def test_a_value_behind_something_that_is_not_linear_has_no_weights() -> None:
    class Bent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
            z = nn.functional.scaled_dot_product_attention(q, k, v.tanh())
            out: Tensor = self.out(z.transpose(1, 2).flatten(-2))
            return out

    torch.manual_seed(0)
    found = next(iter(head_weights(Bent().eval(), torch.randn(1, 5, E)).values()))
    assert found.v is None
    assert "not linear" in found.reasons["v"]
    assert found.q is not None


def test_heads_that_own_scattered_columns_are_put_together() -> None:
    class Scattered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
            self.register_buffer("order", torch.randperm(E))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part[..., self.order].unflatten(-1, (D, H)).movedim(-1, 1) for part in self.qkv(x).chunk(3, -1))
            z = nn.functional.scaled_dot_product_attention(q, k, v)
            out: Tensor = self.out(z.permute(0, 2, 3, 1).flatten(-2))  # (D, H) in front of W_O
            return out

    torch.manual_seed(0)
    model, x = Scattered().eval(), torch.randn(1, 5, E)
    found = next(iter(head_weights(model, x).values()))
    assert found.reason is None
    expected = model.qkv.weight.detach()[:E][model.order].reshape(D, H, E).transpose(0, 1)
    assert found.q is not None
    assert found.o is not None
    torch.testing.assert_close(found.q, expected)
    torch.testing.assert_close(found.o, model.out.weight.detach().T.reshape(D, H, E).transpose(0, 1))


class Turned(nn.Module):
    """Queries rotated by their position and scaled by 1.3; keys of one map that all heads share; keys and values in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(E, E), nn.Linear(E, D), nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, v = (part(x).unflatten(-1, (H, D)).transpose(1, 2) for part in (self.q, self.v))
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.4, 0.2, 0.1])
        left, right = q.chunk(2, -1)
        q = 1.3 * torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)
        k = self.k(x)[:, None].expand(-1, H, -1, -1)
        z = nn.functional.scaled_dot_product_attention(q, k.flip(2), v.flip(2))
        out: Tensor = self.out(z.transpose(1, 2).flatten(-2))
        return out


def test_a_scaled_rotation_a_shared_key_and_tokens_in_another_order_are_seen_through() -> None:
    torch.manual_seed(0)
    model = Turned().eval()
    found = next(iter(head_weights(model, torch.randn(2, 21, E)).values()))
    assert found.reason is None
    assert dict(found.through) == {"q": "rotation", "k": "nothing", "v": "nothing"}
    assert found.q is not None
    assert found.q_bias is not None
    assert found.k is not None
    assert found.v is not None
    torch.testing.assert_close(found.q, 1.3 * rows(model.q.weight.detach()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.q_bias, 1.3 * model.q.bias.detach().reshape(H, D), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.v, rows(model.v.weight.detach()))
    for key in found.k:
        torch.testing.assert_close(key, model.k.weight.detach())


def test_a_second_way_through_a_narrow_map_is_added_with_its_scale() -> None:
    class Adapted(Turned):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(E, 2), nn.Linear(2, E)
            self.base, self.v = self.v, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            q, k = self.q(x), self.k(x)
            v = self.base(x) + 3 * self.up(0.5 * self.down(x))
            q, v = (part.unflatten(-1, (H, D)).transpose(1, 2) for part in (q, v))
            z = nn.functional.scaled_dot_product_attention(q, k[:, None].expand(-1, H, -1, -1), v)
            out: Tensor = self.out(z.transpose(1, 2).flatten(-2))
            return out

    torch.manual_seed(0)
    model = Adapted().eval()
    found = next(iter(head_weights(model, torch.randn(1, 6, E)).values()))
    assert found.v is not None
    assert found.v_bias is not None
    whole = model.base.weight + 1.5 * model.up.weight @ model.down.weight
    torch.testing.assert_close(found.v, rows(whole.detach()), rtol=1e-4, atol=1e-5)
    bias = model.base.bias + 3 * (0.5 * model.up.weight @ model.down.bias + model.up.bias)
    torch.testing.assert_close(found.v_bias, bias.detach().reshape(H, D), rtol=1e-4, atol=1e-5)


def test_an_input_that_makes_nan_has_a_reason() -> None:
    torch.manual_seed(0)
    found = next(iter(head_weights(Turned().eval(), torch.full((1, 4, E), torch.nan)).values()))
    assert found.q is None
    assert found.reasons["q"] == "it holds NaN or infinity on these inputs"


def test_two_streams_in_one_attention_have_a_reason() -> None:
    model, inputs = built("SD3 (joint)")
    found = next(iter(head_weights(model, inputs).values()))
    assert found.q is None
    assert "only some of its tokens come through" in found.reasons["q"]


def test_training_mode_and_models_without_attention_are_refused() -> None:
    with pytest.raises(InputError, match=r"call model.eval\(\) first"):
        head_weights(nn.Linear(2, 2).train(), torch.randn(1, 2))
    with pytest.raises(NotIntercepted, match="no attention was caught in Linear"):
        head_weights(nn.Linear(2, 2).eval(), torch.randn(1, 2))


def test_the_scale_of_the_norm_in_front_is_told() -> None:
    model, inputs = built("GPT-2")
    found = next(iter(head_weights(model, inputs).values()))
    assert found.q_gain is not None
    assert torch.equal(found.q_gain, at(model, "transformer.h.0.ln_1.weight"))
    model, inputs = built("Llama (GQA)")
    found = next(iter(head_weights(model, inputs).values()))
    assert found.v_gain is not None
    assert torch.equal(found.v_gain, at(model, "model.layers.0.input_layernorm.weight"))
