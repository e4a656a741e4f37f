"""SHOW: the command line, the workbench in the browser, and the attribution report.

build_report(model, tokenizer, "The cat sat on the").save("report.html")
"""

if __name__ != "headscope.app":
    raise ImportError("import headscope.app, not app: the folder is mapped to that name by the installed package")

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headscope.app.report.build import build_report

__all__ = ["build_report"]


def __getattr__(name: str) -> object:
    """Imported when first asked for: the command line starts here, and `headscope --help` must not wait for torch."""
    if name == "build_report":
        from headscope.app.report.build import build_report

        return build_report
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
