"""`python -m bench [name …] [--quick]`: run benchmarks, print their tables, and record them in bench/results and docs/bench.md."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path

from bench import attribution, health, interception, kernels, saferope, tune

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "bench.md"
BENCHMARKS = {"interception": interception, "kernels": kernels, "attribution": attribution, "health": health, "saferope": saferope}


def main(argv: list[str] | None = None) -> int:
    """Run what was named, or everything; 0 also where a promise was missed, since times depend on the machine."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the overheads, next to other tools.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"one or more of {', '.join(BENCHMARKS)}; all of them if left out")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller measurements; nothing is recorded")
    parser.add_argument("--tune", action="store_true", help="first choose the kernels' blocks anew on this GPU, and record them")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}")
    warnings.simplefilter("ignore")  # the other libraries' own
    if options.tune:
        print(f"wrote {tune.record()}", file=sys.stderr)
    for name in options.names or BENCHMARKS:
        module = BENCHMARKS[name]
        report = module.run(module.QUICK if options.quick else module.FULL)
        text = report.to_markdown()
        print(text)
        if not options.quick:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
            (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    if not options.quick:
        write_page(PAGE, RESULTS)
    return 0


def write_page(page: Path, results: Path) -> None:
    """Collect the recorded tables, each as a section of one page."""
    sections = [results / f"{name}.md" for name in BENCHMARKS]
    lines = ["# Benchmarks", "", "Written by `make bench` from what was last recorded in `bench/results`.", ""]
    lines += [re.sub("^#", "##", section.read_text(encoding="utf-8"), flags=re.MULTILINE) for section in sections if section.exists()]
    page.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if not interception.RETAINING.keys() <= os.environ.keys():  # an allocator reads its settings when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "bench", *sys.argv[1:]], {**os.environ, **interception.RETAINING})
    sys.exit(main())
