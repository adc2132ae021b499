"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import heedful
from heedful.catalogue import entries, entry_from, find
from heedful.cli import main, raised_by_own, require_given
from heedful.cli.app import app
from heedful.cli.console import console
from heedful.core.code import code_of, file_of
from heedful.core.errors import HeedfulError
from heedful.functions import SOUGHT, functions, sought
from heedful.methods import SinkWindow

runner = CliRunner()


def told(*words: str) -> str:
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("words", [["diagnose", "default", "--text", ""], ["compare", "--out=", "--methods", "act"]])
def test_an_option_that_is_given_nothing_is_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["heedful", *words])
    monkeypatch.setattr("heedful.cli.app.app", lambda: None)
    with pytest.raises(SystemExit, match=r"^1$"):
        main()
    assert "is given nothing" in capsys.readouterr().err
    require_given(["show", "act", "--json", "--out=x"])
    with pytest.raises(HeedfulError, match=r"^--(text|out): is given nothing. Leave it out, or say what"):
        require_given(words)


def test_who_is_stopped_early_leaves_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(words: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heedful.cli.require_given", stop)
    with pytest.raises(SystemExit, match="130"):
        main()


def test_help_waits_for_no_library_that_takes_seconds() -> None:
    """Nor does what a shell completes, which runs the program at every tab."""
    code = (
        "import sys; import heedful.cli.app; print([x for x in ('torch', 'numpy', 'transformers') if x in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("code", "last"), [("class X(:", "SyntaxError: invalid syntax"), ("\n1 / 0", "ZeroDivisionError: division by zero")]
)
def test_what_is_wrong_in_a_file_of_ones_own_is_shown_without_our_frames(
    code: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "broken_of_a_test.py").write_text(code)
    for words in (["check", str(file)], ["compare", "--methods", f"act,act|{file}(factor=2)"]):
        monkeypatch.setattr(sys, "argv", ["heedful", *words])
        with pytest.raises(SystemExit, match=r"^1$"):
            main()
        told = capsys.readouterr().err
        assert told.rstrip().endswith(last)
        assert re.findall(r'File "(.*?)", line (\d)', told) == [(str(file), str(1 + code.count("\n")))]
    assert raised_by_own(ValueError("of ours"), [str(file)]) == ""


def test_it_is_a_module_that_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["heedful", "methods", "streaming"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("heedful", run_name="__main__")
    assert "SinkWindow" in capsys.readouterr().out


def test_methods_lists_and_searches() -> None:
    assert "SinkWindow" in told("methods")
    assert "SinkRate" not in told("methods", "streaming")
    for word in ("quantise", "quantize", "quantization"):  # by rooms, docstrings and titles, as either writes it
        assert all(name in told("methods", word) for name in ("KIVI", "FP4", "RSQ", "Absmax"))


def test_families_are_one_word_on_narrow_terminals_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 40)
    assert "mechanisms" in told("methods", "rectified")


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("knockout", "ablate"),
        ("Ablate", "ablate"),
        ("lens", "explaining.logit_lens"),
        ("pattern", "patterns"),
        ("recommend", "compare"),
    ],
)
def test_what_people_look_for_is_found_where_it_is_no_method(word: str, call: str) -> None:
    assert f"In Python: heedful.{call}(" in told("methods", word)


def test_every_function_that_is_sought_is_there_and_called_so() -> None:
    by_name = {function.name: function for function in functions().values()}
    for call in SOUGHT.values():
        name, _, rest = call.partition("(")
        known = inspect.signature(by_name[name].itself).parameters
        assert all(word.split("=")[0] in known or word == "text" for word in rest.rstrip(")").split(", ")), call


def test_a_function_is_shown_with_all_that_it_takes() -> None:
    said = told("show", "path_patching")
    assert "receivers: Iterable[Head] = ()" in said
    assert "side: Literal['q', 'k', 'v'] = 'q'" in said
    assert "**how" in told("show", "ablate")


def test_functions_are_found_shown_and_cited_as_methods_are() -> None:
    call = "heedful.explaining.linearity(model, batches)"
    found = functions()["linearity"]
    assert (found.call, functions()["agreement"].call) == (call, "heedful.explaining.agreement(*texts)")
    assert found.paper is not None
    assert found.paper.key == "P244"
    for word in ("linearity", "P244", "LLM-Microscope", "Razzhigaev"):
        assert f"In Python: {call}" in told("methods", word)
    assert json.loads(told("methods", "P244", "--json")) == [
        {"name": "heedful.explaining.linearity", "kind": "function", "call": call}
    ]
    assert sought("depth use") == ["heedful.explaining.depth_use(model, batches)"]
    assert sought("logit_lens") == ["heedful.explaining.logit_lens(model, text)"]
    assert sought("") == []
    for name in ("linearity", "heedful.explaining.linearity", "p244", "LINEARITY", call, "linearity()"):
        text = told("show", name)
        assert text.startswith(call + "\n" + found.about.splitlines()[0])
        assert all(sentence[:30] in text for sentence in found.paper.differs)
    assert told("show", "depth-use") == told("show", "depth_use")
    assert told("show", "1806.07421") == told("show", "faithfulness")
    assert told("cite", "linearity", "P244", "linearity").strip() == found.paper.bibtex()
    assert told("cite", "sinkrate | linearity").count("@article") == 2
    with pytest.raises(HeedfulError, match=r"heedful\.ablate\(model, heads\) follows no paper; cite the methods"):
        told("cite", "ablate")
    assert not {name.replace("_", "") for name in functions()} & {name.lower() for name in entries()}


def test_each_file_of_the_explaining_that_names_a_paper_has_one_function() -> None:
    homes = [function.itself.__module__ for function in functions().values() if function.paper]
    assert len(set(homes)) == len(homes) == 10


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("LandmarkAttention", "mechanisms, acts at NORMALISE, reads MASK"),
        ("LLMInt8", "compress, acts at HIDDEN and HEAD_OUTPUT"),
        ("InjectedPatterns", "mechanisms, acts at MASK, reads MASK and PATTERN"),
        ("OffsetLocalHeads", "observe, reads PATTERN"),
        ("Absmax", "compress, surgery"),
    ],
)
def test_what_a_method_is_in_a_call(name: str, role: str) -> None:
    assert told("show", name).splitlines()[0] == f"{name}  {role}"


def test_show_tells_settings_paper_and_differences() -> None:
    text = told("show", "sinkwindow")
    assert "sinks = 4  tokens; the paper's default" in text
    assert "https://arxiv.org/abs/2309.17453" in text
    assert "unlike the authors: Keys keep their positions" in text


def test_explain_takes_settings_and_stacks() -> None:
    text = told("explain", "SinkWindow(sinks=2, window=8)", "SinkRate")
    assert text.startswith("SinkWindow(sinks=2, window=8) | SinkRate(epsilon=0.3, places=None)")
    assert "native     chosen" in text
    assert "tiled      possible, but dearer" in text


def test_explain_shows_what_attach_and_compare_take_where_no_settings_follow() -> None:
    assert told("explain", "SinkWindow").startswith(f"{SinkWindow()!r}\n")
    assert SinkWindow() != SinkWindow.example()


def test_explain_takes_what_compare_takes() -> None:
    joined = told("explain", "SnapKV|ACT")
    assert joined == told("explain", "SnapKV", "ACT")
    assert joined.startswith("SnapKV(")


def test_the_version_is_told() -> None:
    assert told("--version") == f"heedful {heedful.__version__}\n"


def test_cite_prints_bibtex_once() -> None:
    assert told("cite", "SinkWindow", "2309.17453").count("@article") == 1
    assert told("cite", "SinkWindow,ACT(beta=0.2, threshold=0.1)").count("@article") == 2


def test_a_misspelt_function_is_guessed_as_a_method_is() -> None:
    with pytest.raises(HeedfulError, match=r"^no method named 'diagnos'.*\. Of functions: Did you mean diagnose\?"):
        runner.invoke(app, ["show", "diagnos"], catch_exceptions=False)


def test_another_paper_with_the_formula_is_found_shown_cited_and_counted() -> None:
    assert told("show", "P261") == told("show", "DynamicMaskAttention")
    text = told("show", "P018")
    assert text.startswith("V2P ")
    assert text.index("Visual Attention Calibration") < text.index("From Background Suppression")
    assert told("cite", "P006", "V2P", "P018").count("@article") == 2
    found = json.loads(told("methods", "From Background Suppression", "--json"))
    assert [(one["name"], one["paper"], one["also"]) for one in found] == [("V2P", "P006", ["P018"])]


OWN = """
from torch import Tensor
from heedful.authoring import Call, Method, Paper, Site, at


class Halved(Method):
    \"\"\"Halves the weights.\"\"\"

    paper = Paper("2601.00001", "A Paper about Halves", "Ada Author", 2026, "2601.00001")
    share: float = 0.5  # what is left

    @at(Site.PATTERN)
    def halve(self, weights: Tensor, call: Call) -> Tensor:
        return weights * self.share
"""


def test_a_method_in_a_file_of_ones_own_is_named_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stem, text in (
        ("own_halves", OWN + OWN.replace("Halved", "_Base")),
        ("own_pair", OWN + OWN.replace("Halved", "Other")),
        ("own_none", ""),
    ):
        (tmp_path / f"{stem}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, stem, raising=False)
    monkeypatch.chdir(tmp_path)
    assert "share = 0.5  what is left" in told("show", "own_halves.py")
    assert "Halved(share=0.25) at PATTERN" in told("explain", "own_halves.py(share=0.25)|act")
    assert "A Paper about Halves" in told("cite", f"{tmp_path / 'own_pair.py'}:Other")
    with heedful.attach(heedful.models.tiny("llama"), "own_halves.py:Halved") as run:
        run(**heedful.models.tiny_inputs(run.model))
        assert run.active
    for name, reason in (
        ("own_pair.py", "has several methods; name one of own_pair.py:Halved, own_pair.py:Other"),
        ("own_pair.py:Third", "has no method named 'Third'; name one of"),
        ("own_none.py", "has no method: write a class in it"),
        ("nowhere.py", "there is no file 'nowhere.py'"),
        ("nowhere", "one of your own goes by its file, as in mine.py"),
    ):
        with pytest.raises(HeedfulError, match=reason):
            told("show", name)
    for taken in ("json", "poplib"):  # imported already, and there to be imported
        (tmp_path / f"{taken}.py").write_text(OWN, encoding="utf-8")
        with pytest.raises(HeedfulError, match=f"there is a module named {taken} already; give the file another name"):
            told("check", f"{taken}.py")


def test_a_file_that_was_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "own_changed.py"
    monkeypatch.setitem(sys.modules, "own_changed", None)
    del sys.modules["own_changed"]
    file.write_text(OWN, encoding="utf-8")
    first = find(str(file))
    assert find(str(file)) is first
    file.write_text(OWN.replace("0.5", "0.7"), encoding="utf-8")  # of the same size, within a second
    assert entry_from(str(file)).share == 0.7
    file.write_text("broken(", encoding="utf-8")
    with pytest.raises(SyntaxError):
        find(str(file))
    file.write_text(OWN, encoding="utf-8")
    assert entry_from(str(file)).share == 0.5


def test_what_is_kept_under_the_code_of_a_file_goes_by_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that neither a comparison nor a training goes on from what other code under the same name has made."""
    file = tmp_path / "own_kept.py"
    monkeypatch.setitem(sys.modules, "own_kept", None)
    del sys.modules["own_kept"]
    file.write_text(OWN, encoding="utf-8")
    first = entry_from(str(file))
    file.write_text(OWN.replace("weights * self.share", "weights / self.share"), encoding="utf-8")
    before = code_of(first), file_of("own_kept")
    assert "weights * self.share" in before[1]
    again = entry_from(str(file))
    assert "weights / self.share" in file_of("own_kept")
    assert code_of(again) != before[0]
    assert pickle.loads(pickle.dumps(again)) == again
    assert copy.deepcopy(first) == first != again


def test_a_file_that_somebody_imported_is_read_again_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "own_imported", None)
    del sys.modules["own_imported"]
    file = tmp_path / "own_imported.py"
    file.write_text(OWN, encoding="utf-8")
    importlib.invalidate_caches()
    there = importlib.import_module("own_imported")
    assert find(str(file)) is there.Halved
    file.write_text(OWN.replace("0.5", "0.7"), encoding="utf-8")
    assert entry_from(str(file)).share == 0.7


def test_what_is_cited_or_shown_may_have_settings() -> None:
    assert told("cite", "act(beta=0.4) | sinkrate") == told("cite", "act", "sinkrate")
    assert told("show", "act(beta=0.4)") == told("show", "act")


def test_check_prints_every_law() -> None:
    text = told("check", "SinkWindow(1, 4)")
    assert "tokens come to the same" not in text
    assert text.count("kept") >= 14


def test_doctor_serves_a_tiny_model() -> None:
    assert "2 attention layers of LlamaForCausalLM" in told("doctor", "tiny:llama")
    assert "4 query heads, 2 key heads, 8 wide" in told("doctor", "tiny:llama")
    assert "backends: sdpa, native, triton, tiled, reference" in told("doctor")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "SinkWindo"], r"Did you mean SinkWindow\?"),
        (["explain", "SinkWindow(window=0)"], "SinkWindow.window = 0: must be 1 or more"),
        (["explain", "SinkWindow(widow=3)"], r"no such field. Did you mean window\? It has sinks, window"),
        (["explain", "SinkWindow(1, 2, 3)"], "takes at most 2 values"),
        (["explain", "SinkWindow(open"], "write it as in Python"),
        (["explain", "|"], r"heedful explain\.METHOD = '\|': names no method; for example"),
        (["explain", "ACT |"], r"METHOD = 'ACT \|': names no method beside a \|"),
        (["explain", "ACT || SinkRate"], r"names no method beside a \|"),
        (["explain", "PruneHeads"], "is surgery, which needs no backend"),
        (["methods", "zzzz"], "no method mentions 'zzzz'"),
        (["doctor", "tiny:nothing"], "nothing"),
        (["doctor", "[/red]"], r"'\[/red\]' is no file"),
    ],
)
def test_wrong_input_is_one_clear_error(words: list[str], message: str) -> None:
    with pytest.raises(HeedfulError, match=message):
        runner.invoke(app, words, catch_exceptions=False)


def test_the_program_prints_errors_and_exits_with_1() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "heedful.cli", "show", "Nobody"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "CatalogueError: no method named 'Nobody'" in run.stderr


def test_doctor_tells_of_models_outside_the_interface() -> None:
    assert "served: 2 attention layers of BloomForCausalLM" in told("doctor", "tiny:bloom")
    error = CliRunner().invoke(app, ["doctor", "denoiser"]).exception
    assert "known once it has run: call it, or" in str(error)
    assert "`heedful compare --tasks scenes` calls the small denoiser" in str(error)


@pytest.mark.slow
def test_the_demo_runs() -> None:
    text = told("demo", "--length", "128")
    assert "of all heads" in text
    assert "of the causal pairs" in text


def test_methods_for_machines() -> None:
    found = json.loads(CliRunner().invoke(app, ["methods", "SnapKV", "--json"]).stdout)
    one = next(row for row in found if row["name"] == "SnapKV")
    assert (one["family"], one["kind"], one["subjects"]) == ("sparse", "method", ["text"])
    assert {"site": "CACHE", "reads": False} in one["sites"]
    (call,) = json.loads(told("methods", "logit lens", "--json"))
    assert (call["kind"], call["call"]) == ("function", "heedful.explaining.logit_lens(model, text)")
