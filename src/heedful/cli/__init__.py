"""The command line: `heedful --help`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from traceback import format_exception, format_exception_only


def main() -> None:
    """Run the command line; heedful's own errors are one message and exit code 1, and being stopped is code 130."""
    try:
        _run()
    except KeyboardInterrupt:  # while libraries are imported, say, which takes seconds
        sys.exit(130)


def _run() -> None:
    try:
        from heedful.cli.app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich"):
            raise
        sys.exit("heedful's command line needs two more packages: pip install 'heedful[cli]'")
    from heedful.core.errors import HeedfulError

    try:
        require_given(sys.argv[1:])
        app()
    except HeedfulError as error:
        from rich.console import Console
        from rich.text import Text

        told = Text.assemble((type(error).__name__, "bold red"), f": {error}")
        Console(stderr=True, soft_wrap=True).print(told, highlight=False)
        sys.exit(1)
    except Exception as error:
        if not (words := raised_by_own(error, sys.argv[1:])):
            raise
        sys.stderr.write(words)
        sys.exit(1)


def raised_by_own(error: Exception, words: Sequence[str]) -> str:
    """What a file of the user's own raised, from its first line on: nothing of ours is wrong there, nor is shown."""
    own = {str(Path(name)) for word in words for name in re.findall(r"[^\s,|]+\.py\b", word)}
    if isinstance(error, SyntaxError) and error.filename in own:
        return "".join(format_exception_only(error))
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename not in own:
        trace = trace.tb_next
    return "" if trace is None else "".join(format_exception(type(error), error, trace))


def require_given(words: Sequence[str]) -> None:
    """Refuse an option whose value is empty, as one of a shell's variable that is not set: a path would mean "here"."""
    from heedful.core.errors import HeedfulError

    empty = [word[:-1] for word in words if word.startswith("--") and word.endswith("=")]
    empty += [option for option, value in pairwise(words) if option.startswith("--") and not value]
    if empty:
        raise HeedfulError(f"{empty[0]}: is given nothing. Leave it out, or say what, as in {empty[0]} something")
