"""Figures over examples, against twins written from their definitions."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest

from headscope.app.report.build import Report
from headscope.app.report.summary import agreement, holm, relative_residual, sign_flips, summarise
from tests.app.report.conftest import QUICK


def test_holm_equals_the_step_down_procedure_at_every_level() -> None:
    chances = np.random.default_rng(0).random(12).tolist() + [0.001, 0.001, 0.0]
    adjusted = holm(chances)
    for level in np.linspace(0.01, 0.99, 50):
        rejected = set()
        for rank, place in enumerate(sorted(range(len(chances)), key=lambda p: chances[p])):  # reject while p(k) <= level / (m - k)
            if chances[place] > level / (len(chances) - rank):
                break
            rejected.add(place)
        assert {place for place, value in enumerate(adjusted) if value <= level} == rejected


def test_sign_flips_equals_counting_every_pattern_of_signs() -> None:
    effects = np.random.default_rng(1).normal(0.5, 1, size=(7, 4))
    for head in range(4):
        observed = abs(effects[:, head].mean())
        patterns = list(itertools.product((1, -1), repeat=7))
        reached = sum(abs(np.mean(effects[:, head] * pattern)) >= observed - 1e-12 for pattern in patterns)
        assert sign_flips(effects, 0)[head] == pytest.approx(reached / len(patterns))


def test_sign_flips_of_many_examples_is_near_the_exact_value_and_never_zero() -> None:
    effects = np.random.default_rng(2).normal(0.2, 1, size=(13, 2))
    patterns = np.asarray(list(itertools.product((1.0, -1.0), repeat=13)))
    exact = (abs(patterns @ effects) >= abs(effects.sum(0)) - 1e-12).mean(0)
    assert sign_flips(effects, 0) == pytest.approx(exact, abs=0.03)
    assert min(sign_flips(np.ones((30, 1)), 0)) > 0


def test_under_no_effect_p_values_are_uniform_enough_not_to_reject_too_often() -> None:
    effects = np.random.default_rng(3).normal(size=(8, 400))
    assert np.mean(np.asarray(sign_flips(effects, 0)) <= 0.05) < 0.09


def test_agreement_is_spearmans() -> None:
    assert agreement([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0]) == pytest.approx(1.0)
    assert agreement([1.0, 1.0], [1.0, 2.0]) is None


def test_a_method_no_better_than_chance_fails_the_check_of_faithfulness(report: Report) -> None:
    document = report.document
    names = [(site, layer, head) for site, layer, levels in document["heads"]["map"] for head in range(len(levels))]
    for ahead, passed in ((1.0, True), (0.0, False), (-1.0, False)):
        records = copy.deepcopy(document["examples"])
        for place, record in enumerate(records):
            record["curves"]["attnlrp"]["delta_area"] = float(np.mean(record["random"]["delta_area"])) + ahead + 0.01 * (place - 1)
        settings = replace(QUICK, compared=tuple(document["settings"]["compared"]))
        found = summarise(records, settings, names, [0.0] * len(records))
        check = next(check for check in found["checks"] if check["name"] == "faithfulness")
        assert check["passed"] is passed
        assert found["verdict"]["passed"] is (passed and all(one["passed"] is not False for one in found["checks"]))
        assert found["counter"]["not_above_random"] == sum(ahead + 0.01 * (place - 1) <= 1e-12 for place in range(len(records)))


def test_a_residual_is_relative_to_the_scale_of_its_ledger() -> None:
    assert relative_residual({"residual": -0.5, "scale": 10.0}) == 0.05
    assert relative_residual({"residual": 0.0, "scale": 0.0}) == 0.0
