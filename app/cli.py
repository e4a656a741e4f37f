"""The command line: `headscope sites | capture | attribute | health | atlas | edit | report | app | doctor`.

Results go to standard output, progress to standard error. Exit codes: 0 done, 1 `doctor` found something broken, `health --fail-on`
found something as bad, the books of `attribute --strict` do not close, `report verify` found a change, an assertion of `edit run` fails
or `edit diff` found a difference; 2 bad input, with one line `error: …`; 130 interrupted. Nothing heavy is imported before a command
needs it, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from headscope.app.edit_options import add_edit
from headscope.app.options import Commands, Parser, add_command, add_input, add_model
from headscope.kernels.errors import HeadscopeError

KEEPS = ("qk", "pattern", "statistics", "pooled", "v", "scores", "z")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        arguments = _parser().parse_args(argv)
        module = importlib.import_module(f"headscope.app.{arguments.module}")
        code = getattr(module, arguments.function)(arguments)
        sys.stdout.flush()
        return int(code)
    except HeadscopeError as error:
        from headscope.app.escape import visible

        print(f"error: {' '.join(visible(part) for part in str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as finished:  # --help and --version
        return finished.code if isinstance(finished.code, int) else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="headscope",
        description="See, measure and edit the attention heads of any PyTorch model.",
        epilog='example: headscope edit --model embedded:lm --text "The cat sat on the" --scale 3.5=0',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    purpose = "list the places where a model computes attention"
    sites = add_command(commands, "sites", "model_commands", purpose, "headscope sites --model embedded:lm")
    add_model(sites)
    add_input(sites)

    capture = add_command(
        commands,
        "capture",
        "capture_command",
        "run a model and sum up its heads, draw them or keep them in a folder, or read a head back from one",
        "headscope capture --model embedded:lm --tokens 4096 --keep statistics --png heads.png\n"
        '         headscope capture --model embedded:lm --text "The cat sat" --out run\n'
        "         headscope capture --show run --layer 3 --head 5",
    )
    add_model(capture)
    add_input(capture)
    capture.add_argument("--tokens", type=int, metavar="N", help="repeat or cut the text to exactly N tokens")
    capture.add_argument("--out", metavar="DIR", help="folder to write; it is whole or absent")
    capture.add_argument(
        "--keep",
        action="append",
        metavar="WHAT",
        help=f"what to keep, several with commas: {', '.join(KEEPS)}; with --out by default qk, from which patterns are computed when "
        "read; without --out, statistics are printed",
    )
    capture.add_argument("--tile", type=int, metavar="T", help="side of the tiles of pooled maps (default: at most 256 tiles a side)")
    capture.add_argument("--sites", action="append", metavar="GLOB", help="only sites of this name, such as '*layers.3*'; may be repeated")
    capture.add_argument("--layers", metavar="LIST", help="only these layers, such as 0,2-4")
    capture.add_argument("--heads", metavar="LIST", help="only these heads, such as 0,5")
    capture.add_argument("--overwrite", action="store_true", help="replace an earlier capture in that folder")
    capture.add_argument("--show", metavar="DIR", help="read a capture instead of making one")
    capture.add_argument("--layer", type=int, metavar="N", help="with --show: the layer of the head")
    capture.add_argument("--site", metavar="NAME", help="with --show: the site of the head, where a layer has several")
    capture.add_argument("--head", type=int, metavar="N", help="with --show: the head")
    capture.add_argument("--step", type=int, metavar="N", help="with --show: which call, where there were several")
    capture.add_argument("--rows", metavar="LIST", help="with --show: only these queries, such as 0,10-12")
    capture.add_argument("--png", metavar="FILE", help="write a picture: of all heads, pooled; with --show of that head")

    attribute = add_command(
        commands,
        "attribute",
        "attribute_command",
        "say which tokens, heads and layers an answer was made from, and whether the books close",
        'headscope attribute --model embedded:lm --text "The cat sat on the"\n'
        '         headscope attribute --text "To be, or not to" --target " be" --against " the" --words\n'
        "         headscope attribute --model embedded:vit --image 3 --png digit.png",
    )
    add_model(attribute)
    add_input(attribute)
    attribute.add_argument("--method", metavar="NAME", help="default attnlrp; see --list-methods")
    attribute.add_argument("--list-methods", action="store_true", help="print the methods and leave")
    attribute.add_argument("--compare", metavar="LIST", help="several methods side by side, such as attnlrp,cp-lrp,gim")
    attribute.add_argument("--target", metavar="TOKEN", help="token, class or number whose logit is explained (default: the largest)")
    attribute.add_argument("--against", metavar="TOKEN", help="explain the difference to this one's logit: why that and not this")
    attribute.add_argument("--position", type=int, metavar="N", help="after which token the prediction counts (default -1, the last)")
    attribute.add_argument("--generate", type=int, metavar="N", help="let the model write N tokens, and explain each and their sum")
    attribute.add_argument(
        "--span",
        metavar="START:STOP",
        help="explain these tokens, each and summed: of the generated ones with --generate, else of the text",
    )
    grouped = attribute.add_mutually_exclusive_group()
    grouped.add_argument("--words", action="store_true", help="sums over words in place of tokens")
    grouped.add_argument("--sentences", action="store_true", help="sums over sentences in place of tokens")
    attribute.add_argument("--heads", action="store_true", help="print every head, not only the strongest")
    attribute.add_argument("--layers", action="store_true", help="print the relevance at every block and its parts")
    attribute.add_argument("--map", metavar="LAYER.HEAD", help="print from which keys a head's relevance came, query by query")
    attribute.add_argument("--html", metavar="FILE", help="write the result as a page without scripts")
    attribute.add_argument("--png", metavar="FILE", help="draw the heads; with --map that head; of an image the patches over it")
    attribute.add_argument("--save", metavar="FILE", help="write the result as JSON that Attribution.load reads")
    attribute.add_argument("--strict", action="store_true", help="exit code 1 where the books do not close")

    add_edit(commands)
    _report(commands)
    _health(commands)
    _atlas(commands)

    app = add_command(commands, "app", "app_command", "open the workbench in the browser", "headscope app --model embedded:lm")
    app.add_argument("--model", default="embedded:lm", metavar="NAME", help="embedded:lm (default), a folder, or a hub id")
    app.add_argument("--device", default="cpu", help="where the model runs (default cpu)")
    app.add_argument("--host", default="127.0.0.1", help="only 127.0.0.1 so far; the HOST variable is not looked at")
    app.add_argument("--port", type=int, default=8050, help="default 8050; 0 takes a free one")
    app.add_argument("--threads", type=int, metavar="N", help="threads for torch (default: all cores but one)")
    app.add_argument("--no-open", action="store_true", help="print the address, do not open a browser")

    add_command(commands, "doctor", "doctor", "check the installation and the embedded models", "headscope doctor --json")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from importlib.metadata import version

        print(version("headscope"))
        parser.exit()


def _report(commands: Commands[Parser]) -> None:
    report = add_command(
        commands,
        "report",
        "report.command",
        "attribute prompts, measure how far that can be trusted, and write a page with all of it; or verify such a page",
        'headscope report --model embedded:lm --text "Once upon a time" --out report.html\n'
        "         headscope report verify report.html --recompute 2",
    )
    add_model(report)
    add_input(report).add_argument("--data", metavar="FILE", help='JSON lines, such as {"id": "a", "text": "…", "target": " word"}')
    report.add_argument("--out", metavar="FILE", help="the page, such as report.html; its numbers go beside it as report.json")
    report.add_argument("--method", default="attnlrp", help="what is reported on (default attnlrp)")
    report.add_argument("--compare", metavar="LIST", help="other methods for the curves (default gradient-x-input,rollout)")
    report.add_argument("--target", metavar="TOKEN", help="a token or class, by number or text (default: the largest logit)")
    report.add_argument("--against", metavar="TOKEN", help="a token or class whose logit is subtracted")
    report.add_argument("--removal", metavar="HOW", help="how tokens are taken away, such as token, delete or zero-embedding")
    report.add_argument("--recipe", metavar="FILE", help="edits that are in place all the time")
    report.add_argument("--examples", type=int, metavar="N", help="only the first N of --data")
    report.add_argument("--show", type=int, default=50, metavar="N", help="examples on the page (default 50); the JSON has all")
    report.add_argument("--order", choices=("first", "random", "worst"), default="first", help="which examples the page shows")
    report.add_argument("--heads", type=int, default=20, metavar="N", help="rows of the table of heads (default 20)")
    report.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    report.add_argument("--interactive", action="store_true", help="put plotly.js into the page, for charts that can be zoomed")
    report.add_argument("--pdf", metavar="FILE", help="print the page too, with an installed Chromium")
    verify = report.add_subparsers(metavar="verify", parser_class=Parser).add_parser(
        "verify",
        help="check a report: digests, sums, figures, and with --recompute some examples on the model",
        description="Check a report; exit code 1 if it is not as it was made.",
        epilog="example: headscope report verify report.html --recompute 2",
    )
    verify.set_defaults(function="run_verify")
    verify.add_argument("report", metavar="FILE", help="the page; its JSON lies beside it")
    verify.add_argument("--recompute", type=int, metavar="N", help="measure N examples again")
    verify.add_argument("--model", metavar="NAME", help="with --recompute: where the model is, if not where the report says")
    verify.add_argument("--device", default="cpu", help="with --recompute: where the model runs (default cpu)")
    verify.add_argument("--seed", type=int, default=0, metavar="N", help="with --recompute: which examples (default 0)")
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _atlas(commands: Commands[Parser]) -> None:
    atlas = add_command(
        commands,
        "atlas",
        "atlas_command",
        "say what each head does: previous-token, induction, sink, copying, …, with the numbers that say so",
        "headscope atlas --model embedded:lm\n"
        "         headscope atlas --model embedded:lm --head 5.2\n"
        "         headscope atlas --model embedded:lm --score induction --html atlas.html --png atlas.png",
    )
    add_model(atlas)
    add_input(atlas).add_argument("--data", metavar="FILE", help='JSON lines, such as {"text": "…"} (default: a few texts of our own)')
    atlas.add_argument("--head", metavar="LAYER.HEAD", help="print everything about one head, such as 5.2")
    atlas.add_argument("--score", metavar="NAME", help="rank the heads by this score, such as induction or importance")
    atlas.add_argument("--top", type=int, default=20, metavar="N", help="heads in a table and under a label (default 20)")
    atlas.add_argument("--length", type=int, default=64, metavar="N", help="tokens in a random block (default 64)")
    atlas.add_argument("--samples", type=int, default=8, metavar="N", help="random blocks (default 8)")
    atlas.add_argument("--no-weights", action="store_true", help="leave out what the weights say")
    atlas.add_argument("--no-redundancy", action="store_true", help="do not compare the heads with each other")
    atlas.add_argument("--html", metavar="FILE", help="write the atlas as a page without scripts")
    atlas.add_argument("--png", metavar="FILE", help="draw the heads with their labels; with --score that score")
    atlas.add_argument("--save", metavar="FILE", help="write the atlas as JSON that HeadAtlas.load reads")
    atlas.add_argument("--seed", type=int, default=0, metavar="N", help="of the random tokens (default 0)")


def _health(commands: Commands[Parser]) -> None:
    health = add_command(
        commands,
        "health",
        "health_command",
        "say which heads and layers are sick, why, and what may be tried, and which sharp heads are well",
        'headscope health --model embedded:lm --text "Four score and seven years ago our fathers brought forth a new nation"\n'
        "         headscope health --model embedded:lm --fail-on warn --html health.html\n"
        "         headscope health --list-thresholds",
    )
    add_model(health)
    add_input(health).add_argument("--data", metavar="FILE", help='JSON lines, such as {"id": "a", "text": "…"}; numbers are averaged')
    health.add_argument("--tokens", type=int, metavar="N", help="repeat or cut the text to exactly N tokens")
    health.add_argument("--sites", action="append", metavar="GLOB", help="only sites of this name, such as '*layers.3*'; may be repeated")
    health.add_argument("--ignore-special", action="store_true", help="special tokens, such as [CLS], do not count as queries")
    health.add_argument(
        "--spectrum", type=int, default=0, metavar="N", help="steps for singular values (default 0: the bracket that is free)"
    )
    health.add_argument("--no-baselines", action="store_true", help="compare with nothing: no freshly initialised network is run")
    health.add_argument("--no-names", action="store_true", help="do not look on random tokens for previous-token and induction heads")
    health.add_argument("--heads", action="store_true", help="print the numbers of every head")
    health.add_argument("--layers", action="store_true", help="print the numbers of the hidden states before and behind every block")
    health.add_argument("--lengths", metavar="LIST", help="does attention spread as the text grows? such as 64,256,1024")
    health.add_argument("--against-model", metavar="NAME", help="compare with another model of the same sites, such as a later checkpoint")
    health.add_argument("--recipe", metavar="FILE", help="compare with the same model under these edits")
    health.add_argument("--threshold", action="append", default=[], metavar="NAME=VALUE", help="change a threshold; may be repeated")
    health.add_argument("--list-thresholds", action="store_true", help="print the thresholds and where they come from, and leave")
    health.add_argument("--fail-on", metavar="SEVERITY", help="exit code 1 where something as bad as info, warn or alarm was found")
    health.add_argument("--html", metavar="FILE", help="write the report as a page without scripts")
    health.add_argument("--save", metavar="FILE", help="write the report as JSON that HealthReport.load reads")
    health.add_argument("--png", metavar="FILE", help="draw the attention budget of every head")
    health.add_argument("--seed", type=int, default=0, metavar="N", help="of fresh weights and random tokens (default 0)")
