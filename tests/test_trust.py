"""Nothing that is handed in gets into the user's machine: no code, no shell, no network, no file for all to read."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from heedful import models
from heedful.cli.app import app
from heedful.core.errors import ModelError

HOME = Path(__file__).parents[1]
SOURCE = HOME / "src" / "heedful"


def watched(folder: Path, *planted: str, **told: str) -> dict[str, Any]:
    """What a process that uses heedful does beside; the hub's name stands for a place where nobody listens."""
    (folder / "tmp").mkdir()
    env = {key: x for key, x in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"TMPDIR": str(folder / "tmp"), "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": f"{HOME / 'src'}:{HOME}"}
    env["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")  # what torch itself keeps there is torch's
    words = [sys.executable, str(HOME / "tests" / "watched.py"), str(folder), *planted]
    done = subprocess.run(words, env=env | told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_no_program_no_network_and_no_file_for_others(tmp_path: Path) -> None:
    assert watched(tmp_path) == {"programs": [], "addresses": [], "shared": [], "owned": []}


@pytest.mark.parametrize(
    ("planted", "seen"),
    [
        ("program", "programs"), ("shell", "programs"), ("address", "addresses"), ("name", "addresses"),
        ("shared", "shared"), pytest.param("hub", "addresses", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_each_of_these_would_be_seen(planted: str, seen: str, tmp_path: Path) -> None:
    found = watched(tmp_path, planted)
    assert found[seen], "the network is asked where a hub model is asked for" if planted == "hub" else planted
    if planted == "hub":
        assert "the hub cannot be asked" in found["hub"][0]
        assert all("127.0.0.1" in address for address in found["addresses"])


def calls(tree: ast.AST) -> set[str]:
    """Everything that is called or imported, by its dotted name."""
    found = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


BARRED = {
    "os.system", "os.popen", "subprocess", "torch.load", "eval", "exec", "pickle.load", "marshal.loads", "shelve.open",
    "numpy.load", "np.load", "yaml.load", "pty.spawn", "urllib.request", "requests", "httpx",
}  # fmt: skip

OURS = {  # what is built is code that is installed, never what a file says
    "asked.py": {"eval"},  # annotations
    "rotation.py": {"eval"},  # a condition of transformers'
    "catalogue.py": {"exec"},  # a file of methods that the caller names, as importing it would
    "call_laws.py": {"pickle.load"},  # a law, of what it has just written itself
    "rxnmapper.py": {"torch.load"},  # tensors and nothing else, of the one file whose digest is written there
}


def barred(text: str) -> set[str]:
    return {name for name in calls(ast.parse(text)) if any(name == x or name.startswith(f"{x}.") for x in BARRED)}


def test_no_line_of_ours_starts_a_program_or_builds_what_a_file_says() -> None:
    for file in SOURCE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert barred(text) <= OURS.get(file.name, set()), file
        assert text.count("torch.load(") == text.count("weights_only=True"), file
        if "pickle.loads" in text:
            assert file.name == "workers.py", "what goes between our own processes, and never a file"


@pytest.mark.parametrize(
    "planted",
    ["import subprocess", "from subprocess import run", "import os\nos.system('x')", "torch.load(path)", "eval(text)"],
)
def test_a_line_that_does_would_be_seen(planted: str) -> None:
    assert barred(planted)


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model's folder with code of its own, which leaves a file behind when it is run."""
    folder = tmp_path / "model"
    models.tiny("llama").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "owning",
        "auto_map": {"AutoConfig": "owning.Config", "AutoModelForCausalLM": "owning.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    code = (
        f"open({str(tmp_path / 'owned')!r}, 'w').close()",
        "from transformers import LlamaConfig, LlamaForCausalLM",
        "class Config(LlamaConfig):",
        "    model_type = 'owning'",
        "class Model(LlamaForCausalLM):",
        "    config_class = Config",
    )
    (folder / "owning.py").write_text("\n".join(code))
    return folder


def test_code_that_comes_with_a_model_is_not_run(with_code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    monkeypatch.setenv("HF_MODULES_CACHE", str(with_code.parent / "modules"))
    owned = with_code.parent / "owned"
    with pytest.raises(ModelError, match=r"custom code .* models.load\(name, trust_remote_code=True\)"):
        models.load(with_code)
    said = CliRunner().invoke(app, ["diagnose", str(with_code)], input="y\n" * 9)  # whoever is asked says yes
    assert isinstance(said.exception, ModelError)
    assert not owned.exists()
    with suppress(ModelError):  # whatever becomes of it
        models.load(with_code, trust_remote_code=True)
    assert owned.exists(), "where a caller asks for it, it is run: so the test would see it"
