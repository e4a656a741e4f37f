"""The report in Debian's Chromium: it asks nobody for anything, complains of nothing, and shows text as text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headscope.app.escape import visible
from headscope.app.report.build import Report
from headscope.app.report.pdf import print_pdf
from tests.app.test_browser import CHROMIUM, SWITCHES
from tests.app.tiny import HOSTILE

playwright = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright: pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}: apt-get install chromium"),
]

# Contrast of every piece of text with what is painted behind it, by WCAG's formula; half-transparent colours are laid over one another.
CONTRAST = """() => {
  const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim()) continue;
    const chain = []; for (let e = node; e; e = e.parentElement) chain.push(e);
    let back = [255, 255, 255, 1];
    for (const e of chain.reverse()) back = over(parse(getComputedStyle(e).backgroundColor), back);
    const style = getComputedStyle(node), ink = over(parse(node.namespaceURI.includes("svg") ? style.fill : style.color), back);
    const [a, b] = [light(ink.slice(0, 3)), light(back.slice(0, 3))], ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([walk.currentNode.data.trim(), ratio]);
  }
  return bad;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=SWITCHES)
        yield running
        running.close()


@pytest.fixture(scope="module")
def saved(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.save(tmp_path_factory.mktemp("page") / "report.html")


class Opened:
    """A page, with everything that it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light", width: int = 1200) -> None:
        self.context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(path.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_asks_for_nothing_complains_of_nothing_and_text_is_literal(browser: Any, saved: Path, scheme: str) -> None:
    opened = Opened(browser, saved, scheme)
    text = opened.page.locator("#tokens .tokens").first.inner_text()
    for token in HOSTILE:
        assert visible(token).strip() in text
    assert opened.page.evaluate("document.body.dataset.hacked === undefined && document.scripts.length === 0")
    opened.page.screenshot(path=str(saved.parent / f"{scheme}.png"), full_page=True)
    assert opened.asked == [saved.as_uri()]
    assert opened.complaints == []
    opened.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser: Any, saved: Path, scheme: str) -> None:
    opened = Opened(browser, saved, scheme)
    assert opened.page.evaluate(CONTRAST) == []
    opened.context.close()


def test_the_style_sheet_is_in_force_and_links_lead_to_their_tokens(browser: Any, saved: Path) -> None:
    opened = Opened(browser, saved)
    assert opened.page.evaluate("getComputedStyle(document.querySelector('.card')).borderLeftStyle") == "solid"
    link = opened.page.locator("#evidence td a[href*='t']").first
    name = link.get_attribute("href")[1:]
    link.click()
    assert opened.page.evaluate("document.querySelector(':target').id") == name
    opened.context.close()


def test_a_narrow_window_does_not_scroll_sideways(browser: Any, saved: Path) -> None:
    opened = Opened(browser, saved, width=360)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
    opened.context.close()


def test_the_interactive_page_draws_its_charts_without_the_network(browser: Any, report: Report, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = report.save(tmp_path / "i.html", interactive=True)
    opened = Opened(browser, page)
    opened.page.wait_for_selector("body[data-curves=drawn][data-grid=drawn]", timeout=30_000)
    assert opened.page.locator("#curves .trace").count() > 4
    assert opened.page.evaluate("document.body.dataset.hacked === undefined")
    assert "unsafe-eval" not in page.read_text(encoding="utf-8")[:2000]
    assert [url for url in opened.asked if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    assert opened.complaints == []
    opened.context.close()


def test_it_prints_to_paper(saved: Path, tmp_path: Path) -> None:
    print_pdf(saved, tmp_path / "r.pdf")
    content = (tmp_path / "r.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(content) < 2_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["r.pdf"]
