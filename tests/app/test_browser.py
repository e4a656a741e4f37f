"""The workbench in Debian's Chromium: what a person does, and what they then see.

Pages run under a policy without eval, so waiting is on attributes: body[data-…] is set when something has been painted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headscope.interventions import Edit, Plan, scale, select
from headscope.probe import Keep, Probe
from headscope.probe.models import tokenize
from tests.app.conftest import Live
from tests.app.tiny import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: pip install playwright")

CHROMIUM = Path("/usr/bin/chromium")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PAINTED = "body[data-grid=painted][data-pattern][data-shaded]"
TEXT = "the cat sat on the mat, the cat"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}: apt-get install chromium"),
]


class Tab:
    """One page of the workbench, with everything that it said and asked for."""

    def __init__(self, page: Any, live: Live) -> None:
        self.page, self.live = page, live
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: None if self._own(request.url) else self.foreign.append(request.url))
        page.goto(live.workbench.address)
        page.wait_for_selector(PAINTED)

    def _own(self, address: str) -> bool:
        return address.startswith((f"http://127.0.0.1:{self.live.port}/", f"ws://127.0.0.1:{self.live.port}/", "data:", "blob:"))

    def data(self, name: str) -> str | None:
        found: str | None = self.page.locator("body").get_attribute(f"data-{name}")
        return found

    def settle(self) -> None:
        """Wait until every command is answered and what it changed is painted."""
        self.page.wait_for_selector("body:not([data-pending=true])")
        shown = f"{self.data('run')}/{self.data('head').replace('.', '/')}"  # type: ignore[union-attr]
        self.page.wait_for_selector(f"body[data-grid=painted][data-pattern^='{shown}'][data-shaded^='{shown}']")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)
        self.settle()

    def run(self, text: str) -> None:
        before = self.data("run")
        self.page.fill("#text", text)
        self.page.click("#go")
        self.page.wait_for_selector(f"body[data-run]:not([data-run='{before}'])")
        self.page.locator("h1").click()
        self.settle()

    def choose(self, row: int, head: int) -> None:
        box = self.page.locator("#grid").bounding_box()
        self.page.mouse.click(box["x"] + (head + 0.5) * box["width"] / 8, box["y"] + (row + 0.5) * box["height"] / 6)
        self.page.wait_for_selector(f"body[data-head='{row}.{head}']")
        self.settle()

    def table(self) -> dict[int, tuple[float, float]]:
        rows = self.page.locator("#outcome tbody tr").all()
        return {
            int(row.get_attribute("data-token-id")): (float(row.get_attribute("data-before")), float(row.get_attribute("data-after")))
            for row in rows
        }

    def divergence(self) -> float:
        return float(self.page.locator("[data-divergence]").get_attribute("data-divergence"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=SWITCHES)
        yield running
        running.close()


@pytest.fixture(scope="module")
def context(browser: Any) -> Iterator[Any]:
    opened = browser.new_context(viewport={"width": 1440, "height": 960})
    opened.set_default_timeout(15_000)
    yield opened
    opened.close()


@pytest.fixture
def tab(context: Any, live: Live, tmp_path: Path) -> Iterator[Tab]:
    """A fresh page; at its end it must have had nothing to complain of and have asked nobody else for anything."""
    opened = Tab(context.new_page(), live)
    yield opened
    opened.page.screenshot(path=str(tmp_path / "end.png"))
    opened.page.close()
    assert opened.complaints == []
    assert opened.foreign == []


def both_ways(live: Live, text: str, *edits: Edit) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token probabilities without and with edits, by the Python interface."""
    engine = live.workbench.engine
    inputs = tokenize(engine.tokenizer, text, engine.model)
    with torch.no_grad():
        before = engine.model(**inputs).logits[0, -1].double().softmax(-1)
        with Plan(list(edits)).on(engine.model):
            after = engine.model(**inputs).logits[0, -1].double().softmax(-1)
    return before, after


def test_choose_a_head_scale_it_to_zero_and_the_table_changes(tab: Tab, live: Live) -> None:
    tab.run(TEXT)
    assert all(before == after for before, after in tab.table().values())
    assert tab.divergence() == 0
    tab.choose(3, 5)
    assert tab.page.locator("#pattern-name").inner_text() == "L3 H5"
    tab.page.get_by_label("Scale of the chosen head, as a number").fill("0")
    tab.page.wait_for_selector("#edits li")
    tab.settle()
    before, after = both_ways(live, TEXT, Edit("z", scale(0.0), select(layer=3, head=5)))
    found = tab.table()
    assert len(found) == 10
    for id, (shown_before, shown_after) in found.items():
        assert abs(shown_before - float(before[id])) < 1e-5
        assert abs(shown_after - float(after[id])) < 1e-5
    assert any(before != after for before, after in found.values())
    assert tab.divergence() == pytest.approx(float((before * (before / after).log()).sum()), abs=1e-5)
    assert "L3 H5" in tab.page.locator("#edits").inner_text()
    assert "ablated" in tab.page.locator("#edits").inner_text()


def test_hover_shows_the_exact_value(tab: Tab, live: Live) -> None:
    tab.run(TEXT)
    tab.choose(2, 1)
    engine = live.workbench.engine
    with torch.no_grad(), Probe(engine.model).capture(Keep()) as seen:
        engine.model(**tokenize(engine.tokenizer, TEXT, engine.model))
    pattern = seen.pattern(layer=2, heads=[1])[0, 0]
    box = tab.page.locator("#pattern").bounding_box()
    for right, down in ((0.3, 0.5), (0.15, 0.75), (0.5, 0.6)):
        tab.page.mouse.move(box["x"] + right * box["width"], box["y"] + down * box["height"])
        tab.page.wait_for_selector("#readout[data-value]")
        tab.page.wait_for_timeout(150)
        readout = tab.page.locator("#readout")
        query, key = int(readout.get_attribute("data-query")), int(readout.get_attribute("data-key"))
        assert float(readout.get_attribute("data-value")) == pytest.approx(float(pattern[query, key]), abs=1e-7)
    tab.page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 0.05 * box["height"])
    tab.page.wait_for_selector("#readout[data-value=NaN]")
    assert "masked" in tab.page.locator("#readout").inner_text()


def test_everything_has_a_key_and_undo_goes_back_to_the_bit(tab: Tab) -> None:
    tab.run(TEXT)
    start = tab.data("run")
    tab.choose(1, 1)
    tab.press("ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown")
    assert tab.data("head") == "2.2"
    tab.press("0")
    ablated = tab.data("run")
    assert ablated != start
    tab.press("ArrowDown", "]")
    assert tab.page.locator("#edits li").count() == 2
    assert "z × 1.1" in tab.page.locator("#edits").inner_text()
    tab.press("u")
    assert tab.data("run") == ablated
    tab.press("u")
    assert tab.data("run") == start
    assert tab.divergence() == 0
    tab.press("r")
    assert tab.data("run") == ablated
    tab.press("k", "k")
    assert tab.data("query") == str(len(TEXT) - 3)
    tab.press("j")
    assert tab.data("query") == str(len(TEXT) - 2)
    tab.page.keyboard.press("?")
    assert tab.page.locator("#keys").is_visible()
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("#keys").is_visible()


def test_keys_are_off_while_typing(tab: Tab) -> None:
    tab.run(TEXT)
    run, head = tab.data("run"), tab.data("head")
    tab.page.click("#text")
    tab.page.keyboard.type("0[]ud")
    tab.page.keyboard.press("ArrowLeft")
    assert (tab.data("run"), tab.data("head")) == (run, head)


def test_scaling_back_to_one_removes_the_edit_and_a_drag_is_one_entry(tab: Tab) -> None:
    tab.run(TEXT)
    start = tab.data("run")
    thumb = tab.page.get_by_role("slider", name="Scale of the chosen head")
    box = tab.page.locator("#scale-slider").bounding_box()
    middle = thumb.bounding_box()
    tab.page.mouse.move(middle["x"] + middle["width"] / 2, middle["y"] + middle["height"] / 2)
    tab.page.mouse.down()
    for step in range(1, 13):
        tab.page.mouse.move(box["x"] + box["width"] * (0.5 - step / 24), middle["y"] + 5)
    tab.page.mouse.up()
    tab.settle()
    assert tab.page.get_by_label("Scale of the chosen head, as a number").input_value() == "× 0"
    assert "ablated" in tab.page.locator("#edits").inner_text()
    tab.page.get_by_role("button", name="Undo").click()
    tab.settle()
    assert tab.data("run") == start
    assert tab.page.get_by_label("Scale of the chosen head, as a number").input_value() == "× 1"


def test_edits_can_be_removed_one_by_one(tab: Tab) -> None:
    tab.run(TEXT)
    tab.choose(0, 0)
    tab.press("0")
    tab.choose(5, 7)
    tab.press("0")
    tab.page.get_by_role("button", name="remove the edit of L0 head 0").click()
    tab.page.wait_for_selector("#edits li:only-child")
    tab.settle()
    assert tab.page.locator("#edits").inner_text().startswith("L5 H7")
    assert tab.page.locator("#grid-marks .edited").count() == 1


def test_errors_are_shown_in_place_and_the_state_is_kept(tab: Tab) -> None:
    tab.run(TEXT)
    run = tab.data("run")
    for text, reason in (("", "the text is empty"), ("x" * 400, "400 tokens")):
        tab.page.fill("#text", text)
        tab.page.click("#go")
        tab.page.locator("#problem", has_text=reason).wait_for()
        tab.settle()
        assert tab.data("run") == run
    tab.run("shorter")
    assert tab.page.locator("#problem").inner_text() == ""


def test_hostile_tokens_are_shown_verbatim_and_do_nothing(tab: Tab) -> None:
    tab.run("a" + "b".join(HOSTILE) + "c")
    shown = tab.page.locator("#strip button").all_text_contents()
    for text in (
        "<script>document.body.dataset.hacked='yes'</script>",
        "</s>",
        "<b>",
        "\\u202egnp.exe",
        "⏎⏎",
        "⇥",
        "\\u001b[31m",
        "\\u200b",
    ):
        assert text in shown
    for place in range(0, len(shown), 5):
        tab.page.locator("#strip button").nth(place).click()
    tab.settle()
    assert tab.data("hacked") is None
    assert tab.page.locator("#strip script, #strip img, #strip b, #outcome img, #query-line img").count() == 0


def test_one_token_is_in_the_tab_order_and_arrows_move_along_the_strip(tab: Tab) -> None:
    tab.run(TEXT)
    assert tab.page.locator("#strip button[tabindex='0']").count() == 1
    tab.page.locator("#strip button").nth(4).click()
    tab.press("ArrowRight", "ArrowRight", "ArrowLeft")
    assert tab.data("query") == "5"
    assert tab.page.locator("#strip button:focus").get_attribute("data-token") == "5"
    assert tab.page.locator("#strip button[tabindex='0']").get_attribute("data-token") == "5"
    smallest = min(
        min(button.bounding_box()["width"], button.bounding_box()["height"]) for button in tab.page.locator("#strip button").all()
    )
    assert smallest >= 24


def test_the_pattern_before_the_edits_can_be_compared(tab: Tab) -> None:
    tab.run(TEXT)
    start = tab.data("run")
    tab.choose(0, 0)
    tab.press("0")
    tab.choose(5, 0)
    assert not str(tab.data("pattern")).startswith(str(start))
    tab.page.keyboard.press("d")
    tab.page.wait_for_selector(f"body[data-pattern^='{start}/5/0'][data-grid-run='{start}']")
    tab.page.get_by_text("log", exact=True).click()
    tab.page.wait_for_selector(f"body[data-pattern='{start}/5/0-log']")


def test_a_slow_run_says_how_far_it_is_and_keeps_the_old_picture(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    tab.run(TEXT)
    engine, run = tab.live.workbench.engine, tab.data("run")
    quick = engine.run

    def slow(text: str, recipe: Any, report: Any = None) -> Any:
        for layer in range(6 if recipe else 0):
            report(f"layer {layer + 1} of 6")
            time.sleep(0.2)
        return quick(text, recipe, report)

    monkeypatch.setattr(engine, "run", slow)
    tab.page.keyboard.press("0")
    tab.page.wait_for_selector("body[data-busy=true]")
    tab.page.locator("#progress", has_text="of 6").wait_for()
    assert tab.page.locator("#working").is_visible()
    assert tab.data("run") == run
    assert tab.page.locator("#pattern").is_visible()
    tab.settle()
    assert not tab.page.locator("#working").is_visible()
    assert tab.data("run") != run


def test_twenty_quick_moves_end_at_the_last_with_at_most_two_runs_at_a_time(tab: Tab, monkeypatch: pytest.MonkeyPatch) -> None:
    tab.run(TEXT)
    engine = tab.live.workbench.engine
    asked: list[float] = []
    quick = engine.run

    def counted(text: str, recipe: Any, report: Any = None) -> Any:
        asked.extend(edit.value for edit in recipe)
        time.sleep(0.05)
        return quick(text, recipe, report)

    monkeypatch.setattr(engine, "run", counted)
    number = tab.page.get_by_label("Scale of the chosen head, as a number")
    for step in range(1, 21):
        number.fill(str(step / 20 * 1.9))
    tab.settle()
    assert asked[-1] == 1.9
    assert len(asked) < 20
    assert "z × 1.9" in tab.page.locator("#edits").inner_text()


def test_dark_mode_is_one_click(tab: Tab) -> None:
    before = tab.page.locator("html").get_attribute("data-mantine-color-scheme")
    tab.page.get_by_role("button", name="Switch between light and dark").click()
    other = "light" if before == "dark" else "dark"
    tab.page.wait_for_selector(f"html[data-mantine-color-scheme={other}]")


def test_the_address_holds_no_token_and_a_second_page_has_its_own_edits(tab: Tab) -> None:
    assert tab.page.url == f"http://127.0.0.1:{tab.live.port}/heads"
    tab.press("0")
    other = tab.page.context.new_page()
    other.goto(f"http://127.0.0.1:{tab.live.port}/heads?r=%3Cscript%3E&x=1")
    other.wait_for_selector(PAINTED)
    assert other.locator("#edits li").count() == 0
    other.close()


def test_without_the_cookie_there_is_a_plain_refusal(browser: Any, live: Live) -> None:
    context = browser.new_context()
    page = context.new_page()
    assert page.goto(f"http://127.0.0.1:{live.port}/heads").status == 401
    assert re.search("headscope app", page.locator("body").inner_text())
    context.close()


def test_javascript_stays_below_three_megabytes(browser: Any, live: Live) -> None:
    context = browser.new_context()
    page, sizes = context.new_page(), []
    page.on("response", lambda reply: sizes.append(len(reply.body())) if reply.request.resource_type == "script" else None)
    page.goto(live.workbench.address)
    page.wait_for_selector(PAINTED)
    context.close()
    assert 0 < sum(sizes) < 3_000_000
