"""The options of `headscope edit` and of the commands under it. Nothing heavy is imported."""

from __future__ import annotations

import argparse

from headscope.app.options import Commands, Parser, add_command, add_input, add_model
from headscope.app.saferope_options import saferope_options
from headscope.app.safety_options import direction_options, heads_options


def add_edit(commands: Commands[Parser]) -> None:
    """`edit` itself, and what stands under it."""
    edit = add_command(
        commands,
        "edit",
        "edit_command",
        "show what the model predicts before and after edits; or measure, compare, explain or make recipes",
        'headscope edit --model embedded:lm --text "The cat sat on the" --scale 3.5=0 --save recipe.yaml\n'
        "         headscope edit show recipe.yaml\n"
        "         headscope edit run recipe.yaml --data prompts.jsonl --metric accuracy --assert 'accuracy>=0.9' --max-kl 0.2",
    )
    add_model(edit)
    add_input(edit)
    edit.add_argument("--recipe", metavar="FILE", help="edits from a YAML recipe")
    edit.add_argument("--force", action="store_true", help="take a recipe that was made for another model")
    edit.add_argument("--scale", action="append", default=[], metavar="LAYER.HEAD=X", help="multiply a head's output z; may be repeated")
    edit.add_argument("--save", metavar="FILE", help="write all these edits as a recipe for this model")
    edit.add_argument("--top", type=int, default=10, metavar="N", help="rows of the table (default 10)")
    under = edit.add_subparsers(metavar="command", parser_class=Parser)
    for child in (_add_run(under), _add_diff(under)):
        _inherit(edit, child)
    _add_show(under)
    _add_methods(under)


def _inherit(parent: argparse.ArgumentParser, child: argparse.ArgumentParser) -> None:
    """What was said before the name of the command holds behind it, where the command knows the option."""
    known = {action.dest for action in parent._actions if action.option_strings}
    for action in child._actions:
        if action.option_strings and action.dest in known and action.dest != "help":
            action.default = argparse.SUPPRESS


def _add_run(under: Commands[Parser]) -> argparse.ArgumentParser:
    run = add_command(
        under,
        "run",
        "edit_command",
        "measure what a recipe does to a set of examples, what it does to others, and what it costs; exit code 1 if an assertion fails",
        "headscope edit run recipe.yaml --data prompts.jsonl --metric target-probability --assert 'target-probability<0.1'\n"
        "         headscope edit run recipe.yaml --data harmful.jsonl --benign benign.jsonl --metric refusal-rate --max-kl 0.2\n"
        "         headscope edit run recipe.yaml --data prompts.jsonl --metric accuracy --log log.jsonl --save result.json",
        "run_edit_run",
    )
    add_model(run)
    run.add_argument("recipe", metavar="RECIPE", help="the YAML file")
    run.add_argument("--data", required=True, metavar="FILE", help='JSON lines, such as {"id": "a", "text": "…", "target": " word"}')
    run.add_argument("--benign", metavar="FILE", help='JSON lines that should not change; or mark lines of --data with "benign": true')
    told = "what to measure, several with commas; see --list-metrics"
    run.add_argument("--metric", action="append", default=[], metavar="NAME", help=told)
    run.add_argument("--list-metrics", action=_ListMetrics, nargs=0, help="print the metrics and leave")
    run.add_argument(
        "--assert",
        action="append",
        default=[],
        dest="assertions",
        metavar="CLAIM",
        help="such as 'accuracy>=0.9', 'target-probability.difference<-0.1' or 'benign.accuracy>=0.95'; may be repeated",
    )
    run.add_argument("--max-kl", type=float, metavar="NATS", help="assert that benign.kl is at most this")
    run.add_argument("--phrase", action="append", default=[], metavar="TEXT", help="for refusal-rate: what a refusal says; may be repeated")
    run.add_argument("--generate", type=int, default=32, metavar="N", help="for refusal-rate: tokens to generate (default 32)")
    run.add_argument("--force", action="store_true", help="take a recipe that was made for another model")
    run.add_argument("--examples", type=int, metavar="N", help="only the first N of --data, and of --benign")
    run.add_argument("--repeats", type=int, default=5, metavar="N", help="timed forwards with and without (default 5; 0 does not time)")
    run.add_argument("--log", metavar="FILE", help="note every finished example there, and go on from it after an interruption")
    run.add_argument("--save", metavar="FILE", help="write the result as JSON that Evaluation.load reads")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the resampling behind the intervals (default 0)")
    return run


def _add_show(under: Commands[Parser]) -> argparse.ArgumentParser:
    show = add_command(
        under,
        "show",
        "edit_command",
        "say what a recipe does, in words and as Python; with --model also what it costs there",
        "headscope edit show recipe.yaml\n         headscope edit show recipe.yaml --model embedded:lm",
        "run_edit_show",
    )
    add_model(show, default=None)
    add_input(show)
    show.add_argument("recipe", metavar="RECIPE", help="the YAML file")
    show.add_argument("--force", action="store_true", help="take a recipe that was made for another model")
    show.add_argument("--repeats", type=int, default=5, metavar="N", help="timed forwards with and without (default 5)")
    return show


def _add_diff(under: Commands[Parser]) -> argparse.ArgumentParser:
    diff = add_command(
        under,
        "diff",
        "edit_command",
        "compare two recipes edit by edit; exit code 1 if they differ",
        "headscope edit diff before.yaml after.yaml",
        "run_edit_diff",
    )
    diff.add_argument("first", metavar="RECIPE", help="the one that is changed")
    diff.add_argument("second", metavar="RECIPE", help="what it is changed into")
    return diff


def _add_methods(under: Commands[Parser]) -> None:
    heads = add_command(
        under,
        "heads",
        "heads_command",
        "score every head by what its removal does to the answers to prompts, and find sets of them",
        "headscope edit heads --model embedded:lm --data prompts.jsonl --search greedy --count 3 --save recipe.yaml",
        "run_edit_heads",
    )
    add_model(heads)
    heads_options(heads)
    direction = add_command(
        under,
        "direction",
        "direction_command",
        "find the direction that tells two sets of prompts apart, and write the recipe that takes it away or adds it",
        "headscope edit direction --model embedded:lm --positive a.jsonl --negative b.jsonl --save recipe.yaml",
        "run_edit_direction",
    )
    add_model(direction)
    direction_options(direction)
    saferope = add_command(
        under,
        "saferope",
        "saferope_command",
        "find a concept in the heads of a model, learn to turn it away, and save it",
        "headscope edit saferope --model embedded:mmdit --unsafe eights.jsonl --safe others.jsonl --save eight.safetensors",
        "run_edit_saferope",
    )
    add_model(saferope)
    saferope_options(saferope)


class _ListMetrics(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        from headscope.interventions.evaluation.metrics import NAMED

        for name, made in NAMED.items():
            print(f"{name:<20}{made.__doc__.splitlines()[0] if made.__doc__ else ''}")
        parser.exit()
