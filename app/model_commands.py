"""`headscope sites`: where a model computes attention."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from headscope.app.case import case_of
from headscope.app.escape import visible
from headscope.app.printing import print_json, print_table
from headscope.probe import AttentionSite, Probe


def run_sites(arguments: argparse.Namespace) -> int:
    """List the sites of a model."""
    case = case_of(arguments)
    sites = Probe(case.model, case.processor).sites(**case.inputs)
    if arguments.json:
        print_json("headscope.sites/v1", case, {"sites": [site.to_dict() for site in sites]})
        return 0
    columns: tuple[tuple[str, Callable[[AttentionSite], object]], ...] = (
        ("layer", lambda site: "–" if site.layer is None else site.layer),
        ("name", lambda site: visible(site.name)),
        ("kind", lambda site: site.kind),
        ("heads", lambda site: site.query_heads),
        ("kv heads", lambda site: site.kv_heads),
        ("dims", lambda site: site.key_dim if site.key_dim == site.value_dim else f"{site.key_dim}/{site.value_dim}"),
        ("caught by", lambda site: site.mechanism),
        ("notes", lambda site: _notes(site) or "–"),
    )
    print_table([title for title, _ in columns], [[str(read(site)) for _, read in columns] for site in sites])
    print(f"\n{len(sites)} sites, {sum(site.query_heads for site in sites)} heads in {visible(case.name)}")
    return 0


def _notes(site: AttentionSite) -> str:
    marks = [
        "causal" if site.causal else "",
        "" if site.normaliser == "softmax" else site.normaliser,
        "" if site.softcap is None else f"softcap {site.softcap:g}",
        "sinks" if site.sinks else "",
        "bias" if site.bias else "",
        "" if site.fold == 1 else f"{site.fold} windows",
    ]
    return ", ".join(mark for mark in marks if mark)
