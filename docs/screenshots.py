"""Write docs/images: heads.png, all heads of a model over a long text, then the workbench on it, light and dark, in Chromium.

python docs/screenshots.py [--model embedded:lm] [--out docs/images]
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, sync_playwright

from headscope.app import cli
from headscope.app.engine import Engine
from headscope.app.server import build, configuration, listen

CHROMIUM = "/usr/bin/chromium"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PAINTED = "body[data-grid=painted][data-pattern][data-shaded]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:lm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    long_text = ["--model", options.model, "--tokens", "4096", "--keep", "statistics", "--tile", "32"]
    if cli.main(["capture", *long_text, "--png", str(options.out / "heads.png")]):
        return 1
    listener = listen(0)
    workbench = build(lambda: Engine(options.model), port=int(listener.getsockname()[1]))
    server = uvicorn.Server(configuration(workbench))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        for scheme, name in (("light", "workbench.png"), ("dark", "workbench-dark.png")):
            page = browser.new_page(viewport={"width": 1440, "height": 900}, device_scale_factor=1.5, color_scheme=scheme)
            page.goto(workbench.address)
            page.wait_for_selector(PAINTED)
            take(page, options.out / name, len(workbench.engine.sites))
            print(options.out / name, file=sys.stderr)
        browser.close()
    server.should_exit = True
    thread.join(timeout=10)
    workbench.close()
    return 0


def take(page: Page, file: Path, layers: int) -> None:
    """Ablate the head that is chosen at first, scale its neighbour up, point at a cell, and photograph the page."""
    body = page.locator("body")
    chosen = str(body.get_attribute("data-head"))
    layer = int(chosen.split(".")[0])
    page.keyboard.press("0")
    page.wait_for_selector("#edits li")
    page.keyboard.press("ArrowUp" if layer == layers - 1 else "ArrowDown")
    for _ in range(4):
        page.keyboard.press("]")
    page.wait_for_selector("#edits li:nth-child(2)")
    page.keyboard.press("ArrowDown" if layer == layers - 1 else "ArrowUp")
    page.wait_for_selector(f"body[data-head='{chosen}']:not([data-pending=true])")
    page.wait_for_selector(PAINTED)
    page.wait_for_timeout(800)
    box = page.locator("#pattern").bounding_box()
    if box is not None:
        page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.7 * box["height"])
    page.wait_for_selector("#readout[data-value]")
    page.wait_for_timeout(300)
    page.screenshot(path=str(file), full_page=True)


if __name__ == "__main__":
    sys.exit(main())
