"""`heedful diagnose`: what it prints and writes, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from typer.testing import CliRunner

from heedful import models
from heedful.cli import console
from heedful.cli import diagnose as verb
from heedful.cli.app import app
from heedful.core.errors import HeedfulError
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.workers import Ray
from heedful.methods import SinkRate, WeibullWeights
from tests.tasks.beside import llava
from tests.test_diagnose_sounds import Reads, write
from tests.test_diagnose_texts import characters

runner = CliRunner()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model with a tokenizer under the name "small", and a folder of our own."""
    load = models.load

    def loading(name: str, **kw: Any) -> models.Loaded:
        return models.Loaded(models.tiny("llama"), characters(), "us/small") if name == "small" else load(name, **kw)

    monkeypatch.setattr(models, "load", loading)
    monkeypatch.chdir(tmp_path)


def told(*words: str, code: int = 0) -> Any:
    result = runner.invoke(app, ["diagnose", *words])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_it_prints_the_findings_and_where_the_page_lies(tmp_path: Path) -> None:
    result = told("small", "--measures", "SinkRate")
    assert "us/small: 2 layers of 4 heads, 1 text of" in result.stdout
    assert "\n- " in result.stdout
    (page,) = tmp_path.iterdir()
    assert page.name == "diagnose-us-small.html"
    assert f"The page: {page}" in result.stdout
    assert "<html" in page.read_text(encoding="utf-8")[:500]


def test_json_is_all_that_stands_on_standard_output(tmp_path: Path) -> None:
    found = json.loads(told("small", "--json", "--no-page", "--length", "64", "--measures", "SinkRate").stdout)
    assert found["facts"]["length"] == 64
    assert found["measures"] == ["SinkRate(epsilon=0.3, places=None)"]
    assert found["findings"][0]["text"]
    assert found["page"] is None
    assert not list(tmp_path.iterdir())


def test_a_folder_is_kept_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Who put the keys there?")
    words = ("small", "--text", "texts", "--out", "kept", "--measures", "SinkRate(epsilon=0.2)", "--no-page")
    assert "1 text of 23 tokens" in told(*words).stdout
    assert Profile.load(tmp_path / "kept").parts == (SinkRate(0.2),)
    assert "finished before" in told(*words).stderr
    assert "Name another folder" in str(told(*words, "--length", "8", code=1).exception)


def test_a_corpus_is_read_and_what_is_bad_in_it_is_counted(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"body": "Who put the keys there?"}\n{\n{"body": "On the table."}\n')
    words = ("small", "--corpus", "corpus.jsonl", "--column", "body", "--measures", "SinkRate", "--no-page")
    told_of = told(*words, "--out", "kept").stdout
    assert "2 texts of 36 tokens" in told_of
    assert "1 of 3 texts left out: corpus.jsonl at byte 36 is no line of JSON." in told_of
    assert "finished before" in told(*words, "--out", "kept").stderr


def test_workers_and_the_cluster_are_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Ray] = []

    def each(self: Ray, read: Any, shards: Any) -> Any:
        asked.append(self)
        yield from map(read, shards)

    monkeypatch.setattr(Ray, "each", each)
    (tmp_path / "corpus.jsonl").write_text('{"text": "Who put the keys there?"}\n')
    words = ("small", "--corpus", "corpus.jsonl", "--measures", "SinkRate", "--no-page")
    for more in (["--workers", "3"], ["--ray", "auto"], ["--ray", "10.0.0.1:6379", "--workers", "64"]):
        told(*words, *more)
    assert asked == [Ray(3), Ray(2, "auto"), Ray(64, "10.0.0.1:6379")]


def test_a_folder_of_images_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models.Loaded(models.tiny("vit"), ViTImageProcessorPil(size={"height": 8, "width": 8}), "us/vit")
    monkeypatch.setattr(models, "load", lambda _: loaded)
    (tmp_path / "photos").mkdir()
    for i, shade in enumerate(("red", "blue")):
        Image.new("RGB", (9, 7), shade).save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "2.png").write_text("no image")
    found = told("vision", "--images", "photos")
    assert "us/vit: 2 layers of 4 heads, 2 images of 10 tokens" in found.stdout
    assert "1 of 3 images left out: photos/2.png is no image that can be read." in found.stdout
    assert "In the images" in (tmp_path / "diagnose-us-vit.html").read_text(encoding="utf-8")


def test_a_folder_of_sounds_becomes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda _: models.Loaded(models.tiny("whisper"), Reads(), "us/whisper"))
    (tmp_path / "clips").mkdir()
    write(tmp_path / "clips" / "a.wav", 0.08)
    (tmp_path / "clips" / "b.wav").write_bytes(b"")
    found = told("speech", "--audio", "clips")
    assert "us/whisper: 6 layers of 4 heads, 1 sound of" in found.stdout
    assert "1 of 2 sounds left out: clips/b.wav is no WAV file of whole numbers" in found.stdout.replace("\n", " ")
    assert "In the sounds" in (tmp_path / "diagnose-us-whisper.html").read_text(encoding="utf-8")


def test_stopping_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.Bars, "__call__", stop)
    assert "stopped; the same command goes on" in told("small", "--out", "kept", "--no-page", code=130).stderr


def test_measures_are_parted_by_commas_outside_of_settings() -> None:
    assert verb.measures_from("SinkRate(0.1), sinkrate") == [SinkRate(0.1), SinkRate()]
    assert verb.measures_from("weibullweights") == [WeibullWeights()]
    assert verb.measures_from("") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["smol"], "no file, no folder and no name that heedful knows"),
        (["small", "notes/"], r"notes/: one model is named\. What it reads goes by an option: --text notes/"),
        (["small", "--text", "no.txt"], "there is no file or folder 'no.txt'"),
        (["[/x]"], "no file, no folder and no name that heedful knows"),
        (["smol", "--text", "."], r"--text \.: the folder holds no file that ends in \.txt"),  # before the model loads
        (["small", "--length", "1000"], "has 512 positions; for example length=512"),
        (["tiny:llama", "--text", "/etc/hostname"], "tiny:llama has no tokenizer, and reads no words"),
        (["tiny:vit"], "reads images. Name one, or a folder of them: heedful diagnose tiny:vit --images photos"),
        (["tiny:vit", "--images", "no"], "--images: there is no file or folder 'no'. Name one that exists"),
        (["smol", "--images", "."], r"--images \.: the folder holds no file that ends in \.png"),
        (["tiny:vit", "--images", "/etc/hostname"], "needs the model's image processor"),
        (
            ["small", "--images", "/etc/hostname"],
            "--images /etc/hostname: us/small reads text. Leave it out",
        ),
        (
            ["small", "--images", ".", "--text", "/etc/hostname"],
            r"--text /etc/hostname --images \.: one of them is read",
        ),
        (["tiny:whisper"], "reads sounds. Name one, or a folder of them: heedful diagnose tiny:whisper --audio clips"),
        (["tiny:whisper", "--images", "/etc/hostname"], "reads sounds. Name one"),
        (["denoiser"], "`heedful compare --tasks scenes` calls the small denoiser"),
        (["tiny:whisper", "--audio", "no"], "--audio: there is no file or folder 'no'"),
        (["tiny:whisper", "--audio", "/etc/hostname"], "needs the model's feature extractor"),
        (
            ["small", "--audio", "/etc/hostname"],
            r"--audio /etc/hostname: us/small reads text\. Leave it out.*speech --audio",
        ),
        (["small", "--measures", "SinkRat"], r"Did you mean SinkRate\?"),
        (["small", "--measures", "SinkWindow"], "must be methods that read and edit nothing"),
        (["small", "--measures", "PruneHeads"], "surgery, which reads nothing"),
        (["small", "--backend", "fast"], "must be one of auto"),
        (["small", "--out", "/dev/null/here"], "cannot write to"),
        (["small", "--out", "/dev/null"], "is a file, and must be the name of a folder"),
        (["small", "--corpus", "no.jsonl"], "there is no such file or folder"),
        (["small", "--workers", "2"], "there is none. Name one: --corpus"),
        (["small", "--column", "body"], "--column body: is of a corpus, and there is none. Name one: --corpus"),
        (["small", "--corpus", "/etc/hostname", "--text", "/etc/hostname"], "one of them is read"),
        (["small", "--corpus", "/etc/hostname", "--workers", "0"], "must be 1 or more"),
        (["smol", "--corpus", "/etc/hostname", "--workers", "0"], "must be 1 or more"),  # before the model loads
    ],
)
def test_wrong_input_is_a_plain_error(words: list[str], message: str, tmp_path: Path) -> None:
    error = told(*words, "--no-page", code=1).exception
    assert isinstance(error, HeedfulError)
    with pytest.raises(HeedfulError, match=message):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_tokenizer_reads_drawn_tokens() -> None:
    found = told("tiny:llama", "--no-page", "--measures", "SinkRate").stdout
    assert found.startswith("tiny:llama: 2 layers of 4 heads, 1 text of 256 tokens")  # and ":llama:" is no picture


def test_a_model_that_reads_no_english_asks_for_a_text(tmp_path: Path) -> None:
    with pytest.raises(HeedfulError, match=r"RXNMapper reads other texts than English.*\[UNK\]\. Name.*--text FILE"):
        verb.built_in(models.load("reactions"))
    (tmp_path / "esters.txt").write_text("CC(=O)O.OCC>>CC(=O)OCC")
    found = told("reactions", "--text", "esters.txt", "--no-page", "--measures", "SinkRate").stdout
    assert "RXNMapper: 12 layers of 8 heads, 1 text of 23 tokens" in found


def test_words_are_asked_of_the_tokenizer_that_a_processor_holds() -> None:
    loaded = llava()
    assert loaded.tokenizer.tokenizer.unk_token_id is None
    assert str(verb.built_in(loaded)).strip()
    loaded.tokenizer.tokenizer.unk_token = "w3"
    with pytest.raises(HeedfulError, match=r"tiny:llava reads other texts than English.*100% of the built-in text w3"):
        verb.built_in(loaded)


def test_a_path_in_an_error_is_written_as_one_would_write_it(tmp_path: Path) -> None:
    (tmp_path / "hi.txt").write_text("h")
    error = str(told("small", "--text", "hi.txt", "--no-page", code=1).exception)
    assert "'hi.txt': holds a single token" in error
    assert error.endswith("for example texts=Path('book.txt')")


def test_a_missing_package_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "find_spec", lambda name: None if name == "jinja2" else object())
    assert "jinja2 is not installed" in str(told("no-such-model", code=1).exception)


def test_usage_is_exit_code_2() -> None:
    told("small", "--lenght", "3", code=2)
