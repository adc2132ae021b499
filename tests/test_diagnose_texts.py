"""Texts to windows, pieces and spans."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from heedful import models
from heedful.cli.diagnose import require_files
from heedful.core.errors import CatalogueError, FieldError, HeedfulError
from heedful.diagnosis import texts
from heedful.diagnosis.corpus import Corpus
from heedful.diagnosis.images import IMAGES
from heedful.diagnosis.run import diagnose
from heedful.diagnosis.texts import Delimiters, Source, cut, ordinary, pieces, positions, sources
from heedful.tasks import find, from_file

WORDS = "The keys, to the cabinet; are on the table.\nWho put them there? " * 4


def characters(bert: bool = False) -> Any:
    """A tokenizer with a token for each ASCII character; with the special tokens of BERT if asked."""
    backend = Tokenizer(WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    if bert:
        backend.post_processor = TemplateProcessing("\x01 $A \x02", special_tokens=[("\x01", 1), ("\x02", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="\x00", bos_token="\x01", eos_token="\x02")


@pytest.fixture
def model() -> Any:
    return models.tiny("llama")


def test_a_text_is_cut_into_windows_and_a_short_end_is_left_out() -> None:
    found = cut(sources("a" * 35), characters(), 16, 128)
    assert [len(row) for row in found.tokens] == [16, 16, 3]
    assert found.left_out == 0
    found = cut(sources("a" * 33), characters(), 16, 128)
    assert [len(row) for row in found.tokens] == [16, 16]
    assert found.left_out == 1


def test_every_window_has_the_special_tokens_that_the_model_expects() -> None:
    found = cut(sources("a" * 20), characters(bert=True), 16, 128)
    assert [(len(row), int(row[0]), int(row[-1])) for row in found.tokens] == [(16, 1, 2), (8, 1, 2)]


def test_folders_are_read_in_order_without_hidden_and_empty_files(tmp_path: Path) -> None:
    for name, text in {"b.txt": "bb", "a.md": "aa", "c.py": "", "d.bin": "dd", ".git/e.txt": "ee"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert [s.text for s in sources(tmp_path) if not s.unread] == ["aa", "bb"]
    assert [s.text for s in sources([tmp_path / "d.bin", "words"])] == ["dd", "words"]


def test_pieces_join_to_the_text(default_model: models.Loaded) -> None:
    text = "It's 3.14,  42\n\tdef f(x): été 你好 😀 end"
    (ids,) = cut(sources(text), default_model.tokenizer, 64, 49152).tokens
    assert "".join(found := pieces(sources(text)[0], default_model.tokenizer, ids)) == text
    assert len(found) == len(ids)
    bert = characters(bert=True)
    (ids,) = cut(sources("ab c"), bert, 16, 128).tokens
    assert pieces(sources("ab c")[0], bert, ids) == ["\x01", "a", "b", " ", "c", "\x02"]
    assert pieces(sources(ids)[0], None, ids[:2]) == ["1 ", "97 "]


def test_delimiters_are_special_tokens_punctuation_and_ends_of_lines() -> None:
    tokens = torch.tensor([1, *map(ord, "a, b;.\nc"), 2])
    assert Delimiters(characters()).spans(tokens) == ((0, 1), (2, 3), (5, 8), (9, 10))
    assert Delimiters(characters()).spans(torch.tensor([97, 98])) == ()


def test_ordinary_tokens_are_no_special_ones(model: Any) -> None:
    assert ordinary(characters(), model, 100).tolist() == list(range(3, 100))
    assert ordinary(None, model, 10).tolist() == list(range(3, 10))
    strange = SimpleNamespace(config=SimpleNamespace(pad_token_id=-1, eos_token_id=10))
    assert ordinary(None, strange, 10).tolist() == list(range(10))  # type: ignore[arg-type]


def test_positions_of_models() -> None:
    assert positions(models.tiny("gpt2")) == 512
    assert positions(models.tiny("t5")) is None


def test_texts_of_a_folder_that_cannot_be_read_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any
) -> None:
    bad = {
        "b latin.txt": ("é".encode("latin-1"), "cannot be read as UTF-8 text (byte 0)"),
        "c utf16.txt": ("abc".encode("utf-16"), "cannot be read as UTF-8 text (byte 0)"),
        "d binary.txt": (b"\x01\x00\x02\x00" * 9, "holds null characters, as no text does"),
        "e one.txt": (b"a", "holds a single token"),
        "_ empty.txt": (b"\n", "is empty"),
        "g locked.txt": (b"abc", "cannot be read"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "h link.txt").symlink_to(tmp_path / "gone.txt")
    os.mkfifo(tmp_path / "i pipe.txt")
    (tmp_path / "a good.txt").write_text("The keys.")
    (tmp_path / "j good.txt").write_text("On the table.")
    read = Path.read_text

    def locked(path: Path, **how: Any) -> str:
        if path.name.startswith("g"):
            raise PermissionError(13, "Permission denied")
        return read(path, **how)

    monkeypatch.setattr(Path, "read_text", locked)
    why = {name: reason for name, (_, reason) in bad.items()} | {
        "g locked.txt": "cannot be read", "h link.txt": "is a link to nothing", "i pipe.txt": "is no file",
    }  # fmt: skip
    whole = diagnose(model, tmp_path, tokenizer=characters(), measures="SinkRate")
    assert [whole.facts[k] for k in ("texts", "tokens")] == [2, 22]
    assert sorted(whole.facts["skipped"]) == [f"{tmp_path / name} {reason}" for name, reason in sorted(why.items())]
    assert f"8 of 10 texts left out: {tmp_path / '_ empty.txt'} is empty; " in str(whole)
    assert whole.view is not None
    assert "".join(whole.view.tokens) == "The keys."  # the first that can be read
    assert "8 of 11 texts left out" in str(
        whole + diagnose(model, "words", tokenizer=characters(), measures="SinkRate")
    )
    for name in ("a good.txt", "j good.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(FieldError, match="none of these can be read"):
        diagnose(model, tmp_path, tokenizer=characters())


def test_a_few_tokens_are_called_few(model: Any) -> None:
    assert "2 tokens are too few to tell much" in str(
        diagnose(model, "hi", tokenizer=characters(), measures="SinkRate")
    )
    assert "too few" not in str(diagnose(model, WORDS, tokenizer=characters(), measures="SinkRate"))
    # nor where nothing was measured on the text
    assert "too few" not in str(diagnose(model, torch.arange(5, 7), measures=["WeibullWeights", "InductionHeads"]))


def test_windows_are_those_of_the_tokenizer_which_never_sees_a_long_line_at_once(
    default_model: models.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = default_model.tokenizer
    text = "The keys to the cabinet are on the table. " * 40
    own = words(text, truncation=True, max_length=32, return_overflowing_tokens=True).input_ids
    found = cut(sources(text), words, 32, 49152)
    assert [row.tolist() for row in found.tokens] == own[: len(found.tokens)]
    assert sum(map(len, found.tokens)) + found.left_out == sum(map(len, own))

    class Counted:
        """The same tokenizer, which notes how much it is given."""

        longest = 0

        def __call__(self, text: str, **how: Any) -> Any:
            Counted.longest = max(Counted.longest, len(text))
            return words(text, **how)

    monkeypatch.setattr(texts, "PORTION", 100)
    again = cut(sources(text), Counted(), 32, 49152)
    assert all(torch.equal(a, b) for a, b in zip(again.tokens, found.tokens, strict=True))
    assert Counted.longest <= 100 < len(text) / 10
    assert len(cut([Source("line", "x" * 1000)], characters(bert=True), 16, 128).tokens) == 72  # no space at all


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="the folder holds no file with text"):
        sources(tmp_path)
    (tmp_path / "latin.txt").write_bytes("abc é".encode("latin-1"))
    with pytest.raises(FieldError, match=r"latin.txt': cannot be read as UTF-8 text \(byte 4\)"):
        sources(tmp_path / "latin.txt")
    with pytest.raises(FieldError, match=r"no file with text .*latin.txt cannot be read as UTF-8"):
        sources(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(FieldError, match=r"empty.txt': is empty"):
        sources(tmp_path / "empty.txt")
    with pytest.raises(FieldError, match="name of a file: to read it, pass a Path"):
        sources(str(tmp_path / "empty.txt"))
    with pytest.raises(FieldError, match=r"texts = 'nope.txt': reads like the name of a file, and there is none"):
        sources("nope.txt")
    assert sources("See nope.txt")[0].text == "See nope.txt"


@pytest.mark.parametrize("words", ["etc.", "U.S.", "It is v1.2", "v1.2", "Node.js ", "tests\n", "ж" * 200, "字" * 86])
def test_short_words_are_no_names_of_files(words: str) -> None:
    """A system takes no name of more than 255 bytes, and says so with an error of its own."""
    assert sources(words)[0].text == words


@pytest.mark.parametrize("name", ["ж" * 200, "字" * 86])
def test_a_name_longer_than_a_system_takes_is_that_of_no_file(name: str) -> None:
    for read in (sources, Corpus, from_file, lambda path: list(IMAGES.each(path, None))):
        with pytest.raises(FieldError, match="no such file or folder"):
            read(Path(name))
    with pytest.raises(CatalogueError, match="nor a file or folder"):
        find(name)
    with pytest.raises(HeedfulError, match=r"--text: there is no file or folder"):
        require_files({"text": Path(name)})


def test_lines_of_json_are_no_text_and_say_who_reads_the_texts_within(tmp_path: Path) -> None:
    file, plain = tmp_path / "notes.jsonl", tmp_path / "plain.jsonl"
    plain.write_text(WORDS)
    assert sources(plain)[0].text == WORDS
    for key, good, option in (("text", "", ""), ("body", ", column='body'", " --column body")):
        file.write_text(f'\n{{"number": 1, "{key}": "The keys are here."}}\n')
        with pytest.raises(FieldError, match=re.escape("is lines of JSON")) as found:
            sources(file)
        assert str(found.value).endswith(f"for example texts=Corpus({str(file)!r}{good})")
        with pytest.raises(HeedfulError, match=re.escape(f"as in --corpus {file}{option}") + "$"):
            require_files({"text": file})


@pytest.mark.parametrize(("words", "why"), [(b"", "is empty"), (b"\xff\xfe", "as UTF-8 text"), (b"a\0b", "null char")])
def test_a_file_without_words_is_refused_by_its_option(words: bytes, why: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.txt").write_bytes(words)
    with pytest.raises(HeedfulError, match=rf"^--text {re.escape(str(file))}: .*{why}.*, as in --text book.txt$"):
        require_files({"text": file})


def test_words_that_read_like_a_file_say_how_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for words in ("Node.js", "notes"):
        with pytest.raises(FieldError, match="if these are words, end them with a space"):
            sources(words)
        assert sources(f"{words} ")[0].text == f"{words} "
