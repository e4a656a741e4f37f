"""`headscope app`: the workbench."""

from __future__ import annotations

import argparse

from headscope.kernels.errors import InputError


def run_app(arguments: argparse.Namespace) -> int:
    """Serve the workbench until it is interrupted."""
    if not 0 <= arguments.port <= 65535:
        raise InputError(f"--port {arguments.port}: a port is a number from 0 to 65535")
    if arguments.threads is not None and arguments.threads < 1:
        raise InputError(f"--threads {arguments.threads}: give a number from 1 up")
    if arguments.json:
        raise InputError("the workbench has no JSON output; `headscope edit --json` gives the numbers it shows")
    try:
        from headscope.app.server import serve
    except ImportError as error:
        raise InputError(f"the workbench needs a package that is missing ({error.name}): pip install 'headscope[app]'") from error
    serve(
        arguments.model,
        host=arguments.host,
        port=arguments.port,
        threads=arguments.threads,
        device=arguments.device,
        open_browser=not arguments.no_open,
    )
    return 0
