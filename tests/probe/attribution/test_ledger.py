"""The books close, and close for the right reasons: entries stand where a rule absorbs, biases hold ⟨b, ∂b⟩, the unknown is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from headscope.probe.attribution import rules
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.elementwise import settled
from headscope.probe.attribution.engine import RuleMode, classify
from headscope.probe.attribution.ledger import DECLARED, Books, Entry, Ledger
from headscope.probe.interception.intercept import intercept
from headscope.probe.interception.mode import beneath
from headscope.probe.interception.tape import base_name
from tests.models import ENTRIES

# -- the ledger itself -----------------------------------------------------------------------------------------------


def test_a_ledger_closes_when_and_only_when_its_sums_do() -> None:
    entries = (Entry("bias", "linear", "a", 0.5), Entry("softmax", "softmax", "b", -0.25), Entry("bias", "linear", "b", 0.25))
    closed = Ledger(2.0, 1.0, {"positions": 0.5}, entries, 1e-10)
    assert closed.closes
    assert closed.residual == 0
    assert closed.by_kind() == {"bias": 0.75, "softmax": -0.25}
    assert not Ledger(2.1, 1.0, {"positions": 0.5}, entries, 1e-10).closes
    assert Ledger(2.1, 1.0, {"positions": 0.5}, entries, 0.1).closes
    assert not Ledger(float("nan"), 1.0, {}, (), 1e-4).closes
    assert closed.to_dict()["closes"] is True


# -- functions that keep their own gradient --------------------------------------------------------------------------

I = torch.tensor([0, 2])  # noqa: E741


def C(x: Tensor) -> Tensor:
    return torch.complex(x, 2 * x)


CALLS: dict[str, Callable[[Tensor], Any] | None] = {
    "view": lambda x: x.view(6, 4),
    "view_as": lambda x: x.view_as(torch.zeros(6, 4)),
    "reshape": lambda x: x.reshape(6, 4),
    "reshape_as": lambda x: x.reshape_as(torch.zeros(6, 4)),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "ravel": lambda x: x.ravel(),
    "squeeze": lambda x: x[:1].squeeze(0),
    "squeeze_": lambda x: x[:1].clone().squeeze_(0),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "unsqueeze_": lambda x: x.clone().unsqueeze_(1),
    "transpose": lambda x: x.transpose(0, 1),
    "transpose_": lambda x: x.clone().transpose_(0, 1),
    "t_": lambda x: x[0].clone().t_(),
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(0, 2),
    "moveaxis": lambda x: x.moveaxis(0, 2),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "swapdims": lambda x: x.swapdims(0, 1),
    "expand": lambda x: x[:1].expand(5, 3, 4),
    "expand_as": lambda x: x[:1].expand_as(torch.zeros(5, 3, 4)),
    "broadcast_to": lambda x: x[:1].broadcast_to(5, 3, 4),
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x[:1], x),
    "repeat": lambda x: x.repeat(2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: x.tile(2),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float64, copy=True),
    "type": lambda x: x.type(torch.float64),
    "type_as": lambda x: x.type_as(x),
    "float": lambda x: x.float(),
    "double": lambda x: x.double(),
    "half": lambda x: x.half().double(),
    "bfloat16": lambda x: x.bfloat16().double(),
    "cpu": lambda x: x.cpu(),
    "cuda": None,
    "__getitem__": lambda x: x[:, [0, 2]],
    "narrow": lambda x: x.narrow(1, 0, 2),
    "select": lambda x: x.select(1, 0),
    "split": lambda x: x.split(2, 1),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 2], 1),
    "chunk": lambda x: x.chunk(2, 1),
    "tensor_split": lambda x: x.tensor_split(2, 1),
    "hsplit": lambda x: x.hsplit(3),
    "vsplit": lambda x: x.vsplit(2),
    "dsplit": lambda x: x.dsplit(2),
    "unbind": lambda x: x.unbind(1),
    "index_select": lambda x: x.index_select(1, I),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, 4, dtype=torch.long)),
    "take": lambda x: x.take(I),
    "take_along_dim": lambda x: x.take_along_dim(torch.zeros(2, 1, 4, dtype=torch.long), 1),
    "masked_select": lambda x: x.masked_select(torch.ones(2, 3, 4).tril().bool()),
    "roll": lambda x: x.roll(1, 0),
    "flip": lambda x: x.flip(0),
    "fliplr": lambda x: x.fliplr(),
    "flipud": lambda x: x.flipud(),
    "rot90": lambda x: x.rot90(),
    "tril": lambda x: x.tril(),
    "triu": lambda x: x.triu(),
    "tril_": lambda x: x.clone().tril_(),
    "triu_": lambda x: x.clone().triu_(),
    "diagonal": lambda x: x.diagonal(dim1=1, dim2=2),
    "diag_embed": lambda x: x.diag_embed(),
    "diag": lambda x: x[0].diag(),
    "diagflat": lambda x: x.diagflat(),
    "sum": lambda x: x.sum(1),
    "nansum": lambda x: x.nansum(1),
    "sum_to_size": lambda x: x.sum_to_size(1, 3, 4),
    "mean": lambda x: x.mean(1),
    "nanmean": lambda x: x.nanmean(1),
    "cumsum": lambda x: x.cumsum(1),
    "cumsum_": lambda x: x.clone().cumsum_(1),
    "neg": lambda x: x.neg(),
    "neg_": lambda x: x.clone().neg_(),
    "negative": lambda x: x.negative(),
    "positive": lambda x: x.positive(),
    "view_as_real": lambda x: torch.view_as_real(C(x)),
    "view_as_complex": lambda x: torch.view_as_complex(x.reshape(2, 3, 2, 2)),
    "real": lambda x: torch.real(C(x)),
    "imag": lambda x: torch.imag(C(x)),
    "unfold": lambda x: x.unfold(2, 2, 1),
    "fold": lambda x: F.fold(x.reshape(1, 4, 6), (3, 4), (2, 2)),
    "as_strided": lambda x: x.as_strided((3, 3), (1, 2)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
    "avg_pool1d": lambda x: F.avg_pool1d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool3d": lambda x: F.avg_pool3d(x[None], 2),
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x[None], 2),
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool3d": lambda x: F.max_pool3d(x[None], 2),
    "max_pool1d_with_indices": lambda x: F.max_pool1d(x, 2, return_indices=True)[0],
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max_pool3d_with_indices": lambda x: F.max_pool3d(x[None], 2, return_indices=True)[0],
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x, 2),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x, 2),
    "adaptive_max_pool3d": lambda x: F.adaptive_max_pool3d(x[None], 2),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
    "aminmax": lambda x: x.aminmax(dim=1),
    "sort": lambda x: x.sort(1)[0],
    "msort": lambda x: x.msort(),
    "topk": lambda x: x.topk(2, 1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "median": lambda x: x.median(1)[0],
    "nanmedian": lambda x: x.nanmedian(1)[0],
    "mode": lambda x: x.mode(1)[0],
    "quantile": lambda x: x.quantile(0.3, 1),
    "nanquantile": lambda x: x.nanquantile(0.3, 1),
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.cummin(1)[0],
    "relu": lambda x: x.relu(),
    "relu_": lambda x: x.clone().relu_(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu_": lambda x: F.leaky_relu_(x.clone(), 0.2),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3], dtype=x.dtype)),
    "rrelu": lambda x: F.rrelu(x),
    "abs": lambda x: x.abs(),
    "abs_": lambda x: x.clone().abs_(),
    "absolute": lambda x: x.absolute(),
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "dropout_": lambda x: torch.dropout_(x.clone(), 0.5, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.5, True),
    "dropout2d": lambda x: F.dropout2d(x[None], 0.5, True),
    "dropout3d": lambda x: F.dropout3d(x[None, None], 0.5, True),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 4, 2, 3), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.reshape(1, 1, 6, 4), 2),
    "channel_shuffle": lambda x: torch.channel_shuffle(x.reshape(1, 4, 2, 3), 2),
    **{
        f"fft_{n}": (lambda x, n=n: torch.view_as_real(getattr(torch.fft, n)(x))) for n in ("fft", "rfft", "fft2", "rfft2", "fftn", "rfftn")
    },
    **{f"fft_{n}": (lambda x, n=n: torch.view_as_real(getattr(torch.fft, n)(C(x)))) for n in ("ifft", "ifft2", "ifftn")},
    **{f"fft_{n}": (lambda x, n=n: getattr(torch.fft, n)(C(x))) for n in ("irfft", "hfft", "irfft2", "irfftn")},
    **{f"fft_{n}": (lambda x, n=n: getattr(torch.fft, n)(x)) for n in ("fftshift", "ifftshift")},
    "fft_ihfft": lambda x: torch.fft.ihfft(x),
    "stft": lambda x: torch.view_as_real(torch.stft(x.reshape(24), 8, window=torch.hann_window(8, dtype=x.dtype), return_complex=True)),
    "istft": lambda x: torch.istft(C(x.reshape(2, 12)[:, :].reshape(1, 3, 8)), 4, window=torch.ones(4, dtype=x.dtype)),
    "conj": lambda x: torch.view_as_real(C(x).conj().resolve_conj()),
    "conj_physical": lambda x: torch.view_as_real(torch.conj_physical(C(x))),
    "resolve_conj": lambda x: torch.view_as_real(C(x).conj().resolve_conj()),
    "resolve_neg": lambda x: C(x).conj().imag.resolve_neg(),
    "t": lambda x: x[0].t(),
    "T": lambda x: x[0].T,
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "H": lambda x: x[0].H,
    "adjoint": lambda x: x.adjoint(),
    "norm": lambda x: x.norm(dim=1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "linalg_norm": lambda x: torch.linalg.norm(x, dim=1),
    "linalg_matrix_norm": lambda x: torch.linalg.matrix_norm(x),
    "frobenius_norm": lambda x: torch.frobenius_norm(x, dim=1),
    "nuclear_norm": lambda x: torch.nuclear_norm(x[0]),
    "trace": lambda x: x[0].trace(),
    "nan_to_num": lambda x: x.nan_to_num(),
    "unsafe_chunk": lambda x: x.unsafe_chunk(2, 1),
    "unsafe_split": lambda x: x.unsafe_split(2, 1),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij"),
    "atleast_1d": lambda x: torch.atleast_1d(x),
    "atleast_2d": lambda x: torch.atleast_2d(x),
    "atleast_3d": lambda x: torch.atleast_3d(x),
    "affine_grid": lambda x: F.affine_grid(x[:, :2, :3], (2, 1, 2, 2), align_corners=False),
    "affine_grid_generator": lambda x: torch.affine_grid_generator(x[:, :2, :3], (2, 1, 2, 2), False),
    "pad_sequence": lambda x: torch.nn.utils.rnn.pad_sequence([x[0], x[1, :2]]),
    "nll_loss": lambda x: F.nll_loss(x[0], torch.tensor([1, 2, 0])),
    "nll_loss_nd": lambda x: torch._C._nn.nll_loss_nd(x[0], torch.tensor([1, 2, 0])),
    "deg2rad": lambda x: x.deg2rad(),
    "rad2deg": lambda x: x.rad2deg(),
    "lp_pool1d": lambda x: F.lp_pool1d(x.abs(), 2, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(x.abs(), 2, 2),
    "lp_pool3d": lambda x: F.lp_pool3d(x[None].abs(), 2, 2),
}


class Names(TorchFunctionMode):
    """Which functions were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(base_name(func))
        return func(*args, **(kwargs or {}))


def test_every_function_said_to_be_linear_has_an_example() -> None:
    assert set(CALLS) == rules.LINEAR


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call is not None])
def test_a_function_that_keeps_its_own_gradient_conserves(name: str) -> None:
    """⟨x, Jᵀ w⟩ = ⟨f(x), w⟩ for random w: true of linear and of positively homogeneous functions, and of no others."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    call = CALLS[name]
    assert call is not None
    with Names() as mode:
        result = call(x)
    assert name in mode.seen
    outputs = [
        torch.view_as_real(o.resolve_conj()) if o.is_complex() else o for o in (result if isinstance(result, list | tuple) else [result])
    ]
    value = sum((o * torch.randn_like(o)).sum() for o in outputs if o.requires_grad)
    assert isinstance(value, Tensor)
    (g,) = torch.autograd.grad(value, x)
    limit = {"half": 1e-2, "bfloat16": 1e-1, "float": 1e-5}.get(name, 1e-10)
    assert abs(float((g * x).sum() - value)) < limit * max(1.0, float(value.detach().abs()))


def test_no_function_stands_in_two_lists() -> None:
    lists = {name: set(value) for name, value in vars(rules).items() if name.isupper() and isinstance(value, frozenset | dict)}
    del lists["RULE_SETS"]
    names = list(lists)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not lists[one] & lists[other], (one, other)


def test_an_operator_of_somebodys_own_is_not_known_by_its_last_name() -> None:
    library = torch.library.Library("headscope_test", "DEF")
    try:
        library.define("mul(Tensor a, Tensor b) -> Tensor")
        assert classify(torch.ops.headscope_test.mul) == ("unruled", "headscope_test::mul")
        assert classify(torch.ops.headscope_test.mul.default) == ("unruled", "headscope_test::mul")
        assert classify(torch.ops.aten.mul.Tensor) == ("product", "mul")
        assert classify(torch.ops.aten.sigmoid) == ("gate", "sigmoid")
    finally:
        library._destroy()


# -- audits of whole models ------------------------------------------------------------------------------------------


def audited(model: nn.Module, inputs: dict[str, Any], target: Callable[[Any], Tensor]) -> tuple[Ledger, Books]:
    """The books with every operation in them, in float64."""
    books = Books()
    floats = {k: v.clone().requires_grad_() for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    integers = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and not v.is_floating_point() and v.dtype != torch.bool}

    class Idle:
        changes = False

        def stages(self, site: Any) -> frozenset[str]:
            return frozenset()

        reads = stages

        def change(self, call: Any, stage: str, value: Tensor) -> Tensor:
            return value

        def see(self, call: Any) -> None:
            pass

    with intercept(model, Idle(), strict=False) as session:
        mode = RuleMode(rules.rule_set("attnlrp"), books, session, integers, exact=True, audit=True)
        with beneath(mode), settled(model):
            value = target(model(**{**inputs, **floats}))
    leaves = [(leaf.tensor, leaf.constant, leaf.name) for leaf in mode.leaves] + [(t, False, name) for name, t in floats.items()]
    gradients = torch.autograd.grad(value, [t for t, _, _ in leaves], allow_unused=True)
    sums = [0.0 if g is None else float((t * g).sum()) for (t, _, _), g in zip(leaves, gradients, strict=True)]
    constants = {f"{i} {name}": s for i, ((_, constant, name), s) in enumerate(zip(leaves, sums, strict=True)) if constant}
    inner = sum(s for (_, constant, _), s in zip(leaves, sums, strict=True) if not constant)
    return Ledger(float(value.detach()), inner, constants, books.entries(), 1e-10), books


SAMPLE = [
    "Llama (GQA)", "GPT-2", "Mixtral", "Gemma2 (softcap)", "GPT-OSS (sinks)", "Bloom (ALiBi)", "BERT (padding)", "T5 (relative bias)",
    "BART", "ViT", "Swin (windows)", "CLIP (two towers)", "nn.TransformerEncoder (padding)",
    "einsum with groups (GQA)", "sink column by cat",
]  # fmt: skip


def built(name: str, dtype: torch.dtype) -> tuple[Any, Any, dict[str, Any], Callable[[Any], Tensor]]:
    """A zoo model in some precision, with a random functional of its output as the target."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    reason = entry.missing()
    if reason is not None:
        pytest.skip(reason)
    model, inputs = entry.build()
    config = getattr(model, "config", None)
    if config is not None:
        config._experts_implementation = "eager"  # grouped products have no float64
    model = model.to(dtype)
    inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        shape = entry.output(model(**inputs)).shape
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    return entry, model, inputs, lambda out: (entry.output(out) * w).sum()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_in_an_audit_only_declared_absorbers_absorb(name: str) -> None:
    _, model, inputs, target = built(name, torch.float64)
    ledger, books = audited(model, inputs, target)
    assert ledger.closes, ledger.residual / ledger.scale
    assert books.unruled == {}
    kinds = ledger.by_kind()
    assert set(kinds) <= {*DECLARED, "linear"}
    assert all(abs(entry.amount) < 1e-10 * ledger.scale for entry in ledger.entries if entry.kind == "linear")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAMPLE)
def test_the_books_close_in_float32(name: str) -> None:
    _, model, inputs, target = built(name, torch.float32)
    result = attribute(model, inputs, target)
    assert result.ledger is not None
    assert abs(result.ledger.residual) <= 1e-4 * result.ledger.scale
    assert result.passed


class Net(nn.Module):
    """A small network with every kind of bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.norm, self.query, self.key, self.value = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(1, 6, 8))
        self.out = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.table
        x = x + F.gelu(self.conv(x.mT).mT)
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.query(h)[:, None], self.key(h)[:, None], self.value(h)[:, None])[:, 0]
        found: Tensor = self.out(x.mean(1))
        return found


def test_bias_entries_are_their_gradients_under_the_same_rules_by_plain_autograd() -> None:
    """The same rules written with detach, on a model whose biases require gradients: Σ b · b.grad for each."""
    torch.manual_seed(0)
    model = Net().double().eval()
    nn.init.normal_(model.norm.bias)
    ids = torch.randint(0, 9, (2, 6))
    result = attribute(model, {"input_ids": ids}, lambda out: out[:, 1].sum(), heads=False, layers=False)
    assert result.ledger is not None

    def halved(x: Tensor, by: float) -> Tensor:
        return x / by + (x - x / by).detach()

    parameters = dict(model.named_parameters())
    x = model.embed.weight[ids] + model.table
    c = F.conv1d(x.mT, model.conv.weight, model.conv.bias, padding=1).mT
    x = x + c * (F.gelu(c) / c).detach()
    centred = x - x.mean(-1, keepdim=True)
    h = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt().detach() * model.norm.weight + model.norm.bias
    q, k, v = halved(model.query(h), 4), halved(model.key(h), 4), halved(model.value(h), 2)
    x = x + (q @ k.mT / 8**0.5).softmax(-1) @ v
    names = [name for name in parameters if name.endswith("bias") or name == "table"]
    gradients = torch.autograd.grad(model.out(x.mean(1))[:, 1].sum(), [parameters[name] for name in names])
    expected = {name: float((parameters[name] * g).sum()) for name, g in zip(names, gradients, strict=True)}
    found = {(entry.kind, entry.module): entry.amount for entry in result.ledger.entries}
    for name, amount in expected.items():
        module = name.rpartition(".")[0]
        kind = "norm shift" if module == "norm" else "constant" if name == "table" else "bias"
        assert abs(found[kind, module] - amount) < 1e-12, name
    assert {kind for kind, _ in found} == {"norm shift", "constant", "bias", "softmax"}


# -- what nobody knows -----------------------------------------------------------------------------------------------


class Planted(nn.Module):
    """A linear map, something, a linear map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.inner(self.first(x)))
        return found


class Calls(nn.Module):
    """Holds a buffer, so that it is not probed as an element-wise activation."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call
        self.register_buffer("nothing", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


class Shifted(torch.autograd.Function):
    """A function of somebody's own that no torch call shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.exp()


def test_an_unknown_operation_is_listed_with_its_module_and_its_amount() -> None:
    torch.manual_seed(0)
    model = Planted(Calls(lambda x: torch.special.i0(x))).double().eval()
    result = attribute(model, {"x": torch.randn(3, 4, dtype=torch.float64)}, lambda out: out.sum())
    assert result.unruled == (("special_i0", "inner", 1),)
    assert result.ledger is not None
    (entry,) = [entry for entry in result.ledger.entries if entry.kind == "unruled"]
    assert (entry.operation, entry.module) == ("special_i0", "inner")
    assert abs(entry.amount) > 1e-3
    assert result.ledger.closes
    assert any("no rule for special_i0" in text for text in result.warnings)


@pytest.mark.parametrize("chain", [1, 2])
def test_a_foreign_autograd_function_is_listed_and_the_ledger_fails(chain: int) -> None:
    torch.manual_seed(0)

    def call(x: Tensor) -> Tensor:
        for _ in range(chain):
            x = Shifted.apply(x)  # type: ignore[no-untyped-call]
        return x

    result = attribute(Planted(Calls(call)).eval(), {"x": torch.randn(3, 4)}, lambda out: out.sum())
    assert {name for name, _, _ in result.unruled} == {"Shifted"}
    assert sum(count for _, _, count in result.unruled) == chain
    assert result.passed is False
    assert any("do not close" in text for text in result.warnings)


def test_a_foreign_function_at_the_very_end_is_seen_too() -> None:
    torch.manual_seed(0)
    model = Calls(lambda x: x * 2.0).eval()
    result = attribute(model, {"x": torch.randn(3, 4)}, lambda out: Shifted.apply(out.sum()))  # type: ignore[no-untyped-call]
    assert [name for name, _, _ in result.unruled] == ["Shifted"]
    assert result.passed is False


def test_a_foreign_activation_that_is_recognised_by_what_it_does_is_ruled() -> None:
    class Curve(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * (1 - x.tanh() ** 2)

    class Activation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Curve.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    torch.manual_seed(0)
    ours, plain = Planted(Activation()).double().eval(), Planted(nn.Tanh()).double().eval()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(3, 4, dtype=torch.float64)
    one, two = (attribute(m, {"x": x}, lambda out: out.sum()) for m in (ours, plain))
    assert one.unruled == ()
    assert (one.inputs["x"] - two.inputs["x"]).abs().max() < 1e-12


def test_a_scripted_module_is_listed_because_no_rule_sees_into_it() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()))
    result = attribute(Planted(inner).eval(), {"x": torch.randn(3, 4)}, lambda out: out.sum(), layers=False)
    assert ("torch.jit.script", "inner", 1) in result.unruled
    assert result.passed is False


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_recurrent_network_is_named_and_booked(kind: str) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.cell(x)[0]
            return found

    torch.manual_seed(0)
    result = attribute(Recurrent().double().eval(), {"x": torch.randn(2, 3, 4, dtype=torch.float64)}, lambda out: out[:, -1].sum())
    assert [(name, module) for name, module, _ in result.unruled] == [(kind.lower(), "cell")]
    assert result.ledger is not None
    assert result.ledger.closes
