"""The command line: `heedful --help`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; heedful's own errors are one message and exit code 1."""
    try:
        from heedful.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        sys.exit("heedful's command line needs two more packages: pip install 'heedful[cli]'")
    from heedful.core.errors import HeedfulError

    try:
        app()
    except HeedfulError as error:
        from rich.console import Console
        from rich.text import Text

        told = Text.assemble((type(error).__name__, "bold red"), f": {error}")
        Console(stderr=True, soft_wrap=True).print(told, highlight=False)
        sys.exit(1)
