"""The options of `headscope edit heads` and `headscope edit direction`. Nothing heavy is imported."""

from __future__ import annotations

import argparse


def heads_options(parser: argparse.ArgumentParser) -> None:
    """What `edit heads` takes, besides the model."""
    parser.add_argument(
        "--data", required=True, metavar="FILE", help='JSON lines, such as {"text": "…"}: prompts that the heads matter for'
    )
    parser.add_argument(
        "--score", choices=("ships", "sahara"), default="ships", help="nats for each prompt, or degrees of all (default ships)"
    )
    parser.add_argument(
        "--removal",
        choices=("query", "key", "value", "zero", "mean"),
        default="query",
        help="how a head is taken out (default query: it attends to all it sees alike)",
    )
    parser.add_argument("--search", choices=("greedy", "joint"), help="find a set of heads, not only the score of each")
    parser.add_argument("--count", type=int, default=3, metavar="N", help="with --search or --save: heads of the set (default 3)")
    parser.add_argument("--examples", type=int, metavar="N", help="only the first N prompts")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="rows of the table (default 10)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="heads taken out together (default 16)")
    parser.add_argument("--save", metavar="FILE", help="write a recipe that takes out the --count best heads")


def direction_options(parser: argparse.ArgumentParser) -> None:
    """What `edit direction` takes, besides the model."""
    parser.add_argument("--positive", required=True, metavar="FILE", help="JSON lines: prompts that have the concept")
    parser.add_argument("--negative", required=True, metavar="FILE", help="JSON lines: prompts that have not")
    parser.add_argument(
        "--behaviour",
        action="append",
        default=[],
        metavar="TOKEN",
        help="a token that shows it, by text or number; may be repeated. Without it the best separated block is taken",
    )
    parser.add_argument("--positions", metavar="LIST", default="1", help="tokens counted from the last, such as 1-3 (default 1, the last)")
    parser.add_argument("--held-out", type=float, default=0.5, metavar="SHARE", help="of prompts to choose by (default 0.5)")
    parser.add_argument("--max-kl", type=float, default=0.1, metavar="NATS", help="that removal may cost on negative prompts (default 0.1)")
    parser.add_argument("--min-induced", type=float, default=0.0, metavar="X", help="log-odds that adding must exceed (default 0)")
    parser.add_argument("--layer", type=int, metavar="N", help="take this block, whatever the rules say")
    parser.add_argument(
        "--also", action="append", default=[], metavar="GLOB", help="modules that removal covers too, such as '*embed_tokens'"
    )
    parser.add_argument("--add", type=float, metavar="X", help="the recipe adds X times the direction (default: it takes it away)")
    parser.add_argument("--save", metavar="FILE", help="write the plan as a recipe")
