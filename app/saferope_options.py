"""The options of `headscope edit saferope`. Nothing heavy is imported."""

from __future__ import annotations

import argparse


def saferope_options(parser: argparse.ArgumentParser) -> None:
    """What `edit saferope` takes, besides the model."""
    parser.add_argument(
        "--unsafe", required=True, metavar="FILE", help='JSON lines, such as {"text": "They sold guns.", "subject": "guns"}: the concept'
    )
    parser.add_argument("--safe", required=True, metavar="FILE", help="JSON lines of the same form: what must not change")
    parser.add_argument(
        "--kind",
        choices=("rotate", "half-turn", "project"),
        default="rotate",
        help="rotate as learned, or an edit that needs no learning (default rotate)",
    )
    parser.add_argument("--rank", type=int, default=2, metavar="R", help="directions of the concept in each head (default 2)")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="of learning (default 120)")
    parser.add_argument(
        "--alternate", type=int, default=0, metavar="N", help="N steps on safe prompts, then N on unsafe ones; 0 mixes them"
    )
    parser.add_argument("--least-gap", type=float, default=0.5, metavar="X", help="by which a head tells the sets apart (default 0.5)")
    parser.add_argument("--most-heads", type=int, metavar="N", help="only the N best heads")
    parser.add_argument("--role", choices=("text",), help="whose tokens are edited, in a model that joins text and image (default text)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the start, the order and the noise (default 0)")
    parser.add_argument("--save", metavar="FILE", help="write subspaces, thresholds and rotations as safetensors")
    parser.add_argument("--recipe", metavar="FILE", help="write the edits as a YAML recipe for this model")
