"""Charts that can be zoomed and read out, for `--interactive`: plotly.js inside the page, never from elsewhere."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from headscope.app.escape import markup
from headscope.app.report.schema import Json
from headscope.kernels.errors import InputError

BUNDLES = ("plotly-cartesian.min.js", "plotly.min.js")  # the smallest that holds lines and heat maps first
CONFIG = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": "", "responsive": True}
DRAW = """
for (const [id, chart] of Object.entries(charts)) {
  const ink = getComputedStyle(document.body).color;
  const layout = Object.assign({paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: {color: ink}}, chart.layout);
  Plotly.newPlot(id, chart.data, layout, config).then(() => { document.body.dataset[id] = "drawn"; });
}
"""


def chart_library() -> Json:
    """The bundle of plotly.js that is installed: its name, version, size and digest.

    Raises:
        InputError: plotly is not installed.
    """
    path = _bundle()
    content = path.read_bytes()
    return {"file": path.name, "plotly": version("plotly"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def chart_scripts(document: Json) -> list[str]:
    """The library, and what draws this report's charts with it."""
    data = json.dumps(charts(document), sort_keys=True).replace("<", "\\u003c")
    return [_bundle().read_text(encoding="utf-8"), f"const charts = {data};\nconst config = {json.dumps(CONFIG)};{DRAW}"]


def charts(document: Json) -> Json:
    """By the id of its place: data and layout of every chart."""
    found, heads = document["faithfulness"], document["heads"]
    lines = [
        {
            "x": found["shares"], "y": method[name], "name": f"{markup(method['name'])}, {words} first", "type": "scatter",
            "line": {"dash": "solid" if name == "most_first" else "dot"},
        }
        for method in found["methods"]
        for name, words in (("most_first", "most relevant"), ("least_first", "least relevant"))
    ]  # fmt: skip
    band = [
        {
            "x": found["shares"],
            "y": found["random"][name],
            "name": f"random orders, {name}",
            "type": "scatter",
            "line": {"color": "#888", "width": 1},
        }
        for name in ("low", "mean", "high")
    ]
    rows = heads["map"]
    grid = {
        "z": [levels for _, _, levels in rows], "y": [markup(site) if layer is None else f"layer {layer}" for site, layer, _ in rows],
        "type": "heatmap", "zmid": 0, "colorscale": "RdBu", "reversescale": True,
    }  # fmt: skip
    return {
        "curves": {"data": [*lines, *band], "layout": {"xaxis": {"title": {"text": "share of the units removed"}}, "height": 460}},
        "grid": {"data": [grid], "layout": {"xaxis": {"title": {"text": "head"}}, "yaxis": {"autorange": "reversed"}}},
    }


def _bundle() -> Path:
    found = find_spec("plotly")
    folder = None if found is None or found.origin is None else Path(found.origin).parent / "package_data"
    for name in BUNDLES:
        if folder is not None and (folder / name).is_file():
            return folder / name
    raise InputError("--interactive needs plotly: pip install 'headscope[app]'")
