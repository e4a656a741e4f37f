"""Watching a training run: it must not notice. And what is seen must reach the log, the boards and whoever asked for an alarm."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headscope.kernels.errors import HeadscopeError, InputError, NotIntercepted, SelectionError, StoreError
from headscope.probe.health import monitor as monitor_module
from headscope.probe.health import outlets
from headscope.probe.health.monitor import HealthMonitor
from headscope.probe.health.pace import Pace, round_above
from headscope.probe.health.undisturbed import bare_model, process_rank, undisturbed

WIDTH, HEADS, WORDS = 16, 2, 20


class Block(nn.Module):
    """Attention with everything that a measurement could disturb: dropout, batch norm, a counter, a buffer that is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().abs().mean()  # also in evaluation mode
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        z = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.drop(self.norm(self.out(z).transpose(1, 2)).transpose(1, 2)) + 1e-3 * self.seen


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if not self.training:
            torch.randn(3), random.random(), np.random.rand()  # a model that draws where it need not
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def made(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def probe() -> Tensor:
    return torch.randint(0, WORDS, (2, 12), generator=torch.Generator().manual_seed(9))


def next_token_loss(output: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), probe()[:, 1:].flatten())


def train(
    watch: Callable[[Model], HealthMonitor] | None, steps: int = 6, before_optimizer: bool = False
) -> tuple[Any, HealthMonitor | None]:
    """Everything that a run ends with."""
    random.seed(0)
    np.random.seed(0)
    model = made()
    model.layers[1].norm.eval()  # a frozen part must stay frozen
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    monitor = None if watch is None else watch(model)
    for step in range(steps):
        ids = torch.randint(0, WORDS, (4, 10)) + random.randrange(1) + int(np.random.randint(1))
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        if monitor is not None and before_optimizer:
            monitor.step(step)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if monitor is not None and not before_optimizer:
            monitor.step(step)
    modes = [module.training for module in model.modules()]
    end = (model.state_dict(), optimizer.state_dict()["state"], torch.get_rng_state(), random.getstate(), np.random.get_state(), modes)
    return end, monitor


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


@pytest.mark.parametrize("before_optimizer", [False, True])
@pytest.mark.parametrize("gradients", [None, next_token_loss])
def test_a_run_with_a_monitor_ends_with_the_same_bits_as_one_without(before_optimizer: bool, gradients: Any, tmp_path: Path) -> None:
    alone, _ = train(None)
    watched, monitor = train(
        lambda model: HealthMonitor(model, probe(), every=1, gradients=gradients, log=tmp_path / "log.jsonl"),
        before_optimizer=before_optimizer,
    )
    assert monitor is not None
    assert monitor.history.steps() == [0, 1, 2, 3, 4, 5]
    assert_same(watched, alone)
    assert monitor.report is not None
    assert bool(monitor.report.gradients) == (gradients is not None)


def test_the_test_above_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import nullcontext

    def careless(model: nn.Module) -> Any:
        model.eval()
        return nullcontext()

    alone, _ = train(None)
    monkeypatch.setattr(monitor_module, "undisturbed", careless)
    watched, _ = train(lambda model: HealthMonitor(model, probe(), every=1))
    with pytest.raises(AssertionError):
        assert_same(watched, alone)


def test_inside_everything_evaluates_and_afterwards_all_is_as_it_was_also_after_an_error() -> None:
    model = made()
    model.layers[0].drop.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model(probe()).sum().backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    copies = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seen = model.layers[0].seen
    state = torch.get_rng_state()

    def disturb() -> None:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            model(probe()).sum().backward()
            torch.rand(3)
            model.layers[0].seen = torch.ones(1)
            model.layers[1].register_buffer("late", torch.ones(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        disturb()
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(weight.grad is gradients[name] for name, weight in model.named_parameters())
    assert all(torch.equal(gradients[name], copy) for name, copy in copies.items())
    assert {name: True for name, _ in model.named_buffers()} == dict.fromkeys(buffers, True)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert model.layers[0].seen is seen
    assert torch.equal(torch.get_rng_state(), state)


# -- when --------------------------------------------------------------------------------------------------------------


def run_pace(pace: Pace, steps: int, step_seconds: float, cost: Callable[[int], float]) -> list[int]:
    """The steps at which a run is measured whose every step and measurement takes known time."""
    now, found = 100.0, []
    for step in range(steps):
        now += step_seconds
        if pace.due(step, now):
            seconds = cost(len(found))
            now += seconds
            pace.paid(step, seconds)
            found.append(step)
            if pace.trained > cost(0) / pace.share:
                assert pace.overhead <= pace.share * (1 + 1e-9)
    return found


@pytest.mark.parametrize(("step_seconds", "cost"), [(0.1, 0.05), (0.01, 0.3), (2.0, 0.01), (0.003, 0.0001)])
def test_measuring_takes_no_more_than_its_share_and_happens_at_round_steps(step_seconds: float, cost: float) -> None:
    pace = Pace(None, 0.02)
    steps = 20000 if step_seconds < 1 else 500
    found = run_pace(pace, steps, step_seconds, lambda n: cost)
    assert found[0] == 0
    assert len(found) > 3
    assert pace.overhead <= 0.02
    gaps = {b - a for a, b in zip(found[2:], found[3:], strict=False)}
    assert len(gaps) <= 2
    assert all(round_above(gap) == gap for gap in gaps)
    assert pace.overhead > 0.002 or pace.interval == 1  # and no less often than need be


def test_a_slow_first_measurement_is_paid_off_before_the_next() -> None:
    pace = Pace(None, 0.02)
    found = run_pace(pace, 5000, 0.1, lambda n: 3.0 if n == 0 else 0.05)
    assert found[1] >= 150 / 0.1
    assert found[2] - found[1] <= 50


def test_a_fixed_interval_is_kept_and_counts_what_it_costs() -> None:
    pace = Pace(7, 0.02)
    assert run_pace(pace, 30, 1e6, lambda n: 0.0) == [0, 7, 14, 21, 28]
    pace = Pace(1, 1.0)
    run_pace(pace, 11, 1.0, lambda n: 0.5)
    assert pace.overhead == pytest.approx(11 * 0.5 / 10)


@pytest.mark.parametrize("number", [0.2, 1, 1.01, 2, 4.9, 5.1, 49, 51, 1234])
def test_round_numbers_are_rounded_up(number: float) -> None:
    found = round_above(number)
    assert found >= number
    assert str(found)[0] in "125"
    assert set(str(found)[1:]) <= {"0"}
    assert not any(int(f"{d}{'0' * z}") >= number for d in (1, 2, 5) for z in range(5) if int(f"{d}{'0' * z}") < found)


def test_the_monitor_reports_what_it_cost() -> None:
    _, monitor = train(lambda model: HealthMonitor(model, probe(), every=2))
    assert monitor is not None
    assert monitor.history.steps() == [0, 2, 4]
    spent = sum(moment.seconds for moment in monitor.history.moments)
    assert 0 < monitor.overhead < math.inf
    assert spent > 0


# -- where -------------------------------------------------------------------------------------------------------------


def test_only_rank_zero_measures_and_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monitor = HealthMonitor(made(), probe(), every=1, log=tmp_path / "log.jsonl")
    assert monitor.step(0) is None
    assert not (tmp_path / "log.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    assert monitor.step(1) is not None
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(InputError, match="RANK is 'first'"):
        process_rank()


def test_wrapped_models_are_measured_inside(tmp_path: Path) -> None:
    model = made()
    assert bare_model(nn.DataParallel(model)) is model
    assert bare_model(torch.compile(model, backend="eager")) is model
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        report = HealthMonitor(wrapped, probe(), every=1, on_alarm="stop").step(0)
    finally:
        torch.distributed.destroy_process_group()
    assert report is not None
    assert [one.site.name for one in report.heads] == ["layers.0#0", "layers.1#0"]


def test_a_compiled_model_trains_on_as_it_did() -> None:
    ends = []
    for watch in (False, True):
        model = made()
        compiled = torch.compile(model, backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = HealthMonitor(compiled, probe(), every=1)
        torch.manual_seed(1)
        for step in range(2):
            compiled(probe()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if watch:
                assert monitor.step(step) is not None
        ends.append(model.state_dict())
    assert_same(ends[0], ends[1])


def test_weights_spread_over_processes_are_refused_with_what_to_do() -> None:
    class FSDPModule(nn.Linear):
        pass

    with pytest.raises(InputError, match=r"sharded by FSDP.*Gather a full copy"):
        HealthMonitor(nn.Sequential(FSDPModule(2, 2)), probe())
    model = made()
    model.head.weight.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"head.weight is partitioned by DeepSpeed"):
        HealthMonitor(model, probe())


# -- what is told ------------------------------------------------------------------------------------------------------


def sick(model: Model) -> Model:
    with torch.no_grad():
        model.layers[1].qkv.weight[: 2 * WIDTH] *= 3000
    return model


def test_a_new_finding_is_logged_once_and_again_when_it_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    monitor = HealthMonitor(model, probe(), every=1)
    with caplog.at_level(logging.WARNING, "headscope.health"):
        monitor.step(0)
        healthy = model.layers[1].qkv.weight.detach().clone()
        assert not [r for r in caplog.records if r.levelno == logging.ERROR]
        sick(model)
        monitor.step(1)
        first = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert first
        assert all(text.startswith("step 1, logit-growth at ") for text in first)
        monitor.step(2)
        assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == len(first)
        with torch.no_grad():
            model.layers[1].qkv.weight.copy_(healthy)
        monitor.step(3)
        sick(model)
        monitor.step(4)
        assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 2 * len(first)
    assert [moment.worst for moment in monitor.history.moments][1] == "alarm"


def test_what_a_run_starts_with_is_a_remark_until_it_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    with torch.no_grad():
        model.layers[0].qkv.weight.zero_()  # uniform attention
    monitor = HealthMonitor(model, probe(), every=1)
    told = []
    with caplog.at_level(logging.INFO, "headscope.health"):
        for step in range(3):
            caplog.clear()
            monitor.step(step)
            told.append([r.levelname for r in caplog.records if "uniform-attention at layer 0" in r.getMessage()])
    assert told == [["INFO"], ["WARNING"], []]


def test_an_alarm_stops_the_training_or_calls_back_where_that_was_asked_for() -> None:
    model = made()
    calls: list[str] = []
    stops, tells, looks = (
        HealthMonitor(model, probe(), every=1, on_alarm=what) for what in ("stop", lambda report: calls.append(report.worst), None)
    )
    for one in (stops, tells, looks):
        one.step(0)
    assert not stops.stopping
    assert not calls
    sick(model)
    for one in (stops, tells, looks):
        one.step(1)
    assert stops.stopping
    assert calls == ["alarm"]
    assert not looks.stopping
    with pytest.raises(InputError, match="on_alarm='halt'"):
        HealthMonitor(model, probe(), on_alarm="halt")


def test_entropy_that_falls_and_scores_that_grow_are_found_in_the_course_of_the_run() -> None:
    model = made()
    monitor = HealthMonitor(model, probe(), every=1)
    for step, size in enumerate((1, 1, 8, 8)):
        with torch.no_grad():
            model.layers[0].qkv.weight[: 2 * WIDTH] *= size
        monitor.step(step)
    rules = [{one.rule for one in moment.findings if one.site == "layers.0#0"} for moment in monitor.history.moments]
    assert not rules[0] & {"entropy-fall", "score-growth"}
    assert not rules[1] & {"entropy-fall", "score-growth"}
    assert "score-growth" in rules[2]


def test_every_line_of_the_log_is_a_document_with_every_head(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "health.jsonl"
    _, monitor = train(lambda model: HealthMonitor(model, probe(), every=3, log=path))
    documents = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [one["step"] for one in documents] == [0, 3]
    assert monitor is not None
    assert monitor.report is not None
    assert documents[-1]["heads"]["layers.1#0"]["routing"] == monitor.report.heads[1].routing.tolist()
    HealthMonitor(made(), probe(), log=path).measure(9)  # a run that goes on
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    with pytest.raises(StoreError, match="cannot be written"):
        HealthMonitor(made(), probe(), log=tmp_path)


def test_the_history_is_a_table_and_curves() -> None:
    _, monitor = train(lambda model: HealthMonitor(model, probe(), every=2))
    assert monitor is not None
    history = monitor.history
    frame = history.to_frame()
    assert frame["step"].tolist() == [0, 2, 4]
    assert "routing/1" in frame
    assert "residual/input" in frame
    assert history.curve("routing/0") == frame["routing/0"].tolist()
    assert len(history.plot("routing").data) == 2
    assert json.dumps(history.to_dict(), allow_nan=False)
    with pytest.raises(SelectionError, match="no curve 'x'"):
        history.curve("x")
    with pytest.raises(SelectionError, match="no curves of 'x'"):
        history.plot("x")


def test_a_model_whose_weights_became_nan_is_measured_without_a_word_on_its_health() -> None:
    model = made()
    monitor = HealthMonitor(model, probe(), every=1, gradients=next_token_loss)
    monitor.step(0)
    with torch.no_grad():
        model.layers[0].qkv.weight.fill_(torch.nan)
    report = monitor.step(1)
    assert report is not None
    assert report.heads[0].entropy.isnan().all()
    assert not [one for one in monitor.history.moments[-1].findings if one.site in ("layers.0#0", "layers.0")]


def test_a_model_without_attention_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train()
    with pytest.raises(NotIntercepted):
        HealthMonitor(model, torch.zeros(1, 4, 4), every=1).step(0)
    assert model.training


class Written:
    """Stands in for a SummaryWriter and for a run."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.logged: list[dict[str, float]] = []
        self.defined: list[str] = []

    def add_scalar(self, name: str, value: float, global_step: int) -> None:
        self.scalars.append((name, value, global_step))

    def add_text(self, name: str, text: str, global_step: int) -> None: ...

    def flush(self) -> None: ...

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined.append(name)

    def log(self, numbers: dict[str, float]) -> None:
        self.logged.append(numbers)


def test_boards_get_every_number_over_the_steps() -> None:
    board, run = Written(), Written()
    _, monitor = train(lambda model: HealthMonitor(model, probe(), every=4, tensorboard=board, wandb=run))
    assert monitor is not None
    assert {step for _, _, step in board.scalars} == {0, 4}
    assert {name for name, _, _ in board.scalars} >= {"health/routing/0", "health/residual/1", "health/findings/alarm"}
    assert [one["health/step"] for one in run.logged] == [0, 4]
    assert run.defined == ["health/step", "health/*"]


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    HealthMonitor(made(), probe(), tensorboard=tmp_path).step(0)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_boards_that_are_not_there_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(outlets.importlib, "import_module", absent)
    for arguments, advice in (({"tensorboard": "runs"}, "pip install tensorboard"), ({"wandb": True}, "pip install wandb")):
        with pytest.raises(HeadscopeError, match=advice):
            HealthMonitor(made(), probe(), **arguments)


# -- trainers ----------------------------------------------------------------------------------------------------------


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        ids = torch.randint(0, WORDS, (8,), generator=torch.Generator().manual_seed(place))
        return {"input_ids": ids, "labels": ids}


def trained(folder: Path, watch: bool, **options: Any) -> tuple[dict[str, Tensor], HealthMonitor | None]:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, attention_dropout=0.1,
    ))  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[], use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=3, dataloader_pin_memory=False,
    )  # fmt: skip
    monitor = HealthMonitor(model, {"input_ids": probe()}, **{"every": 1, **options}) if watch else None
    callbacks = [] if monitor is None else [monitor.for_trainer()]
    Trainer(model=model, args=arguments, train_dataset=Texts(), callbacks=callbacks).train()
    return model.state_dict(), monitor


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_the_trainer_of_transformers_measures_and_trains_the_same(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    alone, _ = trained(tmp_path, False)
    watched, monitor = trained(tmp_path, True)
    assert monitor is not None
    assert monitor.history.steps() == [0, 1, 2, 3, 4]
    assert_same(watched, alone)


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_transformers_stops_at_an_alarm(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate, which the Trainer needs, is not installed")
    _, monitor = trained(tmp_path, True, on_alarm="stop", thresholds={"logit-warn": 0.0, "logit-alarm": 0.0})
    assert monitor is not None
    assert monitor.stopping
    assert monitor.history.steps()[-1] < 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_measures_logs_and_trains_the_same(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip(library, reason=f"{library} is not installed")
    from headscope.probe.health import lightning_callback

    monkeypatch.setattr(lightning_callback, "NAMES", (library,))
    csv = __import__(f"{library}.loggers", fromlist=["CSVLogger"]).CSVLogger

    class Trained(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = made()

        def training_step(self, batch: dict[str, Tensor], place: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def fitted(watch: bool) -> tuple[dict[str, Tensor], HealthMonitor]:
        module = Trained()
        torch.manual_seed(1)
        monitor = HealthMonitor(module.model, probe(), every=1)
        logger = csv(str(tmp_path), name="watched" if watch else "alone", version=0)
        trainer = lightning.Trainer(
            max_steps=3, accumulate_grad_batches=2, accelerator="cpu", logger=logger, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[monitor.for_lightning()] if watch else [], default_root_dir=str(tmp_path),
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(Texts(), batch_size=2))
        return module.state_dict(), monitor

    alone, _ = fitted(False)
    watched, monitor = fitted(True)
    assert monitor.history.steps() == [0, 1, 2, 3]
    assert_same(watched, alone)
    assert "health/routing/0" in (tmp_path / "watched" / "version_0" / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_active_run_of_weights_and_biases_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    with pytest.raises(HeadscopeError, match=r"wandb.init\(\)"):
        HealthMonitor(made(), probe(), wandb=True)
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test", settings=wandb.Settings(silent=True))
    try:
        HealthMonitor(made(), probe()).step(0)
        assert run.summary["health/step"] == 0
        assert "health/routing/0" in dict(run.summary)
    finally:
        run.finish()
