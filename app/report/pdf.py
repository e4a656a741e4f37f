"""A report on paper: the page, printed by a Chromium that is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from headscope.kernels.errors import InputError, StoreError
from headscope.probe.whole_file import write_whole

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
SECONDS = 120


def find_browser() -> str:
    """The Chromium to print with.

    Raises:
        InputError: none is installed.
    """
    for name in BROWSERS:
        found = shutil.which(name)
        if found is not None:
            return found
    raise InputError(
        f"--pdf prints with Chromium, and none of {', '.join(BROWSERS)} is on the PATH: install one, or print the page by hand"
    )


def check_pdf(path: Path) -> None:
    """Ask before the work whether it can be printed after it.

    Raises:
        InputError: there is no Chromium, or no such folder.
    """
    find_browser()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: {'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'}")


def print_pdf(page: Path, path: Path) -> None:
    """Print a page; the file appears whole or not at all.

    Raises:
        InputError: there is no Chromium, it fails or takes too long, or the file cannot be written.
    """
    browser = find_browser()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "report.pdf"
        as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        command = [
            browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={folder}/profile", "--no-pdf-header-footer", "--virtual-time-budget=10000", f"--print-to-pdf={made}",
            *as_root, page.resolve().as_uri(),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise InputError(f"{browser} could not print {page}: {error}") from error
        if done.returncode or not made.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise InputError(f"{browser} could not print {page}: {reason}")
        try:
            write_whole(path, made.read_bytes())
        except StoreError as error:
            raise InputError(str(error)) from error
