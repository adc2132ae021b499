"""python tests/watched.py FOLDER: what people do with heedful, under names that no shell may see, and what it opened.

One line of JSON tells which programs were started, which addresses were asked for, and the modes of whatever lay among
temporary files. With a second word, one forbidden thing is done beside, to see that it is noticed.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HOME, SHARED = Path(sys.argv[1]), tempfile.gettempdir()
ODD = "a b; touch owned; $(touch owned) `touch owned` & echo '\" | x"
PROGRAMS = "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"
told: dict[str, list[Any]] = {"programs": [], "addresses": [], "shared": []}


def watch(event: str, args: tuple[Any, ...]) -> None:
    if event in PROGRAMS:
        told["programs"].append(repr(args)[:300])
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.bind", "socket.gethostbyname"):
        told["addresses"].append(repr(args[-1] if event == "socket.connect" else args)[:200])
    if event == "open" and not str(args[0]).startswith("/proc/"):
        with os.scandir(SHARED) as found:
            for entry in found:
                mode = stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode)
                if mode & 0o077 and entry.name not in told["shared"]:
                    told["shared"].append(entry.name)


def use() -> None:
    """Look, measure, compare, save, load, train: nothing of it is said to be on the network."""
    import torch
    from typer.testing import CliRunner

    import heedful
    from heedful import models
    from heedful.cli.app import app
    from heedful.core.errors import HeedfulError
    from heedful.laboratory import kinds
    from heedful.methods import SinkRate, TempScale
    from tests.lab.small import Halved, Little
    from tests.test_diagnose_texts import characters

    ids, out = torch.arange(5, 25), HOME / ODD.replace("/", "")
    model = models.tiny("llama").eval()
    loaded = models.Loaded(model, characters(), ODD)
    profile = heedful.diagnose(loaded, ["the keys to the cabinet"], out=out)
    profile.page(out / "page.html")
    heedful.Profile.load(out)
    heedful.compare(loaded, [TempScale(0.9)], ["recall"], prompts=2, turns=1, out=HOME / "compared")
    with heedful.attach(model, TempScale(0.9) | SinkRate()) as run:
        run(input_ids=ids[None])
        run.save(HOME / f"{ODD.replace('/', '')}.safetensors")
        model.save_pretrained(HOME / "saved")
    heedful.load(HOME / "saved").close()
    heedful.check(TempScale, only=("survives_saving",))
    kinds.KINDS["lm"] = (Little,)
    heedful.lab({"halved": Halved()}, seeds=1)
    models.default()
    run_cli = CliRunner().invoke
    for words in (["diagnose", ODD], ["show", ODD], ["explain", ODD], ["compare", "tiny:llama", "--methods", ODD]):
        said = run_cli(app, words)
        if said.exit_code == 0 or not isinstance(said.exception, HeedfulError | SystemExit):
            raise SystemExit(f"{words}: {said.exception!r}")
    for words in (
        ["diagnose", "tiny:llama", "--out", str(HOME / "cli")],
        ["methods"],
        ["show", "SinkRate"],
        ["doctor"],
    ):
        said = run_cli(app, words)
        if said.exit_code:
            raise SystemExit(f"{words}: {said.exception!r}")


def ask_the_hub() -> None:
    """What is asked for by a name of the hub's, at an address where nobody listens."""
    from heedful import models
    from heedful.core.errors import ModelError

    try:
        models.load("nobody/nothing-of-that-name")
    except ModelError as error:
        told["hub"] = [str(error)]


PLANTED: dict[str, Callable[[], Any]] = {
    "program": lambda: subprocess.run(["true"], check=False),
    "shell": lambda: os.system("true"),
    "address": lambda: socket.socket().connect_ex(("127.0.0.1", 9)),
    "name": lambda: socket.getaddrinfo("localhost", 9),
    "shared": lambda: [(Path(SHARED) / "for-all").touch(), Path(__file__).read_text()],
    "hub": ask_the_hub,
}

if __name__ == "__main__":
    os.chdir(HOME)
    os.umask(0)
    if len(sys.argv) == 2:
        import torch  # noqa: F401  what libraries do when they are imported is theirs
        import transformers  # noqa: F401
    sys.addaudithook(watch)
    PLANTED[sys.argv[2]]() if len(sys.argv) > 2 else use()
    print(json.dumps(told | {"owned": [str(path) for path in HOME.rglob("owned*")]}))
