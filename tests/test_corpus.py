"""A corpus is cut into shards of its own, read text by text; what is bad is told, and the rest is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from heedful import models
from heedful.conformance.tolerances import MERGE
from heedful.core.errors import FieldError, StatisticError, WriteError
from heedful.core.kinds.conversion import Progress
from heedful.core.stats import Histogram
from heedful.diagnosis import corpus as reading
from heedful.diagnosis import run as running
from heedful.diagnosis.corpus import ROW, Corpus
from heedful.diagnosis.profile import Profile
from heedful.diagnosis.run import diagnose
from heedful.diagnosis.workers import Ray
from tests.test_diagnose_texts import characters
from tests.test_files import room_for

MEASURES = ["SinkRate", "AttentionProfile", "MaxActivations", "PositionalHeads"]
TEXTS = [f"The keys, {i} to the cabinet. " * (1 + i % 4) for i in range(17)]


@pytest.fixture
def model() -> Any:
    return models.tiny("llama")


def lines(folder: Path, *rows: Any, name: str = "corpus.jsonl") -> Path:
    made = [row if isinstance(row, bytes) else json.dumps({"text": row}).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(made) + b"\n")
    return folder / name


def texts_of(corpus: Corpus) -> list[list[str | None]]:
    return [[source.text for source in shard.read() if not source.unread] for shard in corpus.shards()]


def reasons(corpus: Corpus) -> list[str]:
    return [f"{s.name} {s.unread}" for shard in corpus.shards() for s in shard.read() if s.unread]


def as_lines(folder: Path) -> Corpus:
    return Corpus(lines(folder, *TEXTS), shard=200)


def as_table(folder: Path) -> Corpus:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    parquet.write_table(table, folder / "corpus.parquet", row_group_size=5)
    return Corpus(folder / "corpus.parquet", shard=(folder / "corpus.parquet").stat().st_size // 4)


def as_folder(folder: Path) -> Corpus:
    for i, text in enumerate(TEXTS[:9]):
        (folder / f"a{i:02d}.txt").write_text(text)
    lines(folder, *TEXTS[9:], name="b.jsonl")
    return Corpus(folder, shard=200)


def as_rows(folder: Path) -> Corpus:
    datasets = pytest.importorskip("datasets")
    return Corpus(datasets.Dataset.from_dict({"text": TEXTS}), shard=4 * ROW)


def equal(one: Profile, other: Profile) -> bool:
    """Bit for bit, and parts too."""
    pairs = [(one.statistics, other.statistics), *zip(one.apart, other.apart, strict=True)]
    for a, b in pairs:
        if a.keys() != b.keys():
            return False
        for key, stat in a.items():
            other_one = b[key].tensors()
            if not all(torch.equal(x.nan_to_num(-1), other_one[n].nan_to_num(-1)) for n, x in stat.tensors().items()):
                return False
    return True


# what a corpus is


@pytest.mark.parametrize("make", [as_lines, as_table, as_folder, as_rows])
def test_every_text_is_in_one_shard_and_the_answer_is_that_of_the_texts(
    make: Callable[[Path], Corpus], model: Any, tmp_path: Path
) -> None:
    corpus = make(tmp_path)
    found = texts_of(corpus)
    assert len(found) > 3
    assert [text for shard in found for text in shard] == TEXTS
    assert corpus.shards() == corpus.shards()
    whole = diagnose(model, corpus, tokenizer=characters(), measures=MEASURES)
    plain = diagnose(model, TEXTS, tokenizer=characters(), measures=MEASURES)
    for fact in ("texts", "windows", "tokens", "left_out", "skipped", "backends"):
        assert whole.facts[fact] == plain.facts[fact], fact
    assert whole.facts["shards"] == len(found)
    assert whole.statistics.keys() == plain.statistics.keys()
    for key, stat in plain.statistics.items():
        for name, x in stat.tensors().items():
            y = whole.statistics[key].tensors()[name]
            if isinstance(stat, Histogram) or name in ("count", "place", "counts"):
                assert torch.equal(x, y), key
            near(y, x)
    assert whole.view is not None
    assert "".join(whole.view.tokens) == TEXTS[0]
    assert len(whole.apart) == 5


def near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    gap = (found - wanted).double().nan_to_num(0.0).abs().max() if found.numel() else torch.tensor(0.0)
    size = wanted.double().nan_to_num(0.0, 0.0, 0.0).abs().max() if wanted.numel() else torch.tensor(0.0)
    assert float(gap) <= MERGE * float(size)


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
def test_lines_are_cut_anywhere_and_none_is_lost_or_read_twice(tmp_path: Path, size: int) -> None:
    path = lines(tmp_path, "a", "bb" * 30, b"", "ccc", "é" * 9)
    corpus = Corpus(path, shard=size)
    assert [text for shard in texts_of(corpus) for text in shard] == ["a", "bb" * 30, "ccc", "é" * 9]
    path.write_bytes(path.read_bytes()[:-1])  # the last line without its end
    assert [text for shard in texts_of(Corpus(path, shard=size)) for text in shard][-1] == "é" * 9


def test_a_line_of_ten_million_characters_is_one_text(tmp_path: Path) -> None:
    corpus = Corpus(lines(tmp_path, "before", "words " * 1_700_000, "after"))
    assert len(corpus.shards()) > 30
    found = [text for shard in texts_of(corpus) for text in shard]
    assert [text and text[:6] for text in found] == ["before", "words ", "after"]


def test_ten_million_characters_in_one_line_are_diagnosed_with_the_rest(model: Any, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"?": 3, "words": 5}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    path = lines(tmp_path, "words before", ("x" * 9_999 + " ") * 1_000, b"{", "words after")
    found = diagnose(
        model, Corpus(path), tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), measures="SinkRate"
    )
    assert found.facts["shards"] > 30
    assert (found.facts["texts"], found.facts["left_out"], found.facts["tokens"]) == (3, 0, 1_004)
    assert [why.rpartition(" is ")[2] for why in found.facts["skipped"]] == ["no line of JSON"]


def test_a_large_corpus_has_larger_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_SHARDS", 3)
    assert len(as_lines(tmp_path).shards()) == 3
    assert len(as_table(tmp_path).shards()) <= 4
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.parquet").unlink()
    assert len(as_folder(tmp_path).shards()) <= 5  # a file of lines has shards of its own


# what is wrong with it


def test_what_is_wrong_with_a_line_is_told_and_the_rest_is_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST", 5_000)
    bad = {
        b'{"text": "cut': "is no line of JSON",
        b"[" * 4000: "is no line of JSON",
        b'{"text": "\xff\xfe"}': "is no UTF-8 text (byte 10 of the line)",
        b'["text"]': "has no text in 'text'",
        b'{"other": "text"}': "has no text in 'text', but in 'other'",
        b'{"text": 3}': "has no text in 'text'",
        b'{"text": "\\ud800"}': "holds half a character (a lone surrogate at 0)",
        b'{"text": "a\\u0000b"}': "holds null characters, as no text does",
        b'{"text": "  "}': "is empty",
        b'{"text": "' + b"x" * 9000 + b'"}': "is a line of more than 5000 bytes",
        b'{"text": "a"}': "holds a single token",
    }
    path = lines(tmp_path, TEXTS[0], *bad, TEXTS[1])
    for shard in (64, 10**6):
        found = diagnose(model, Corpus(path, shard=shard), tokenizer=characters(), measures="SinkRate")
        assert found.facts["texts"] == 2
        assert found.facts["tokens"] == len(TEXTS[0]) + len(TEXTS[1])
        places = [path.read_bytes().index(line) for line in bad]
        assert found.facts["skipped"] == [
            f"{path} at byte {at} {why}" for at, why in zip(places, bad.values(), strict=True)
        ]
        assert "11 of 13 texts left out: " in str(found)
        assert len([f for f in found.findings() if "left out" in f.text]) == 1


def test_a_text_of_no_token_is_left_out(model: Any, tmp_path: Path) -> None:
    class Deaf:
        """A tokenizer that knows only some of the words."""

        is_fast, all_special_ids = False, ()

        def __call__(self, text: str, **how: Any) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[] if text.startswith("~") else [ord(c) for c in text])

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return [self.decode(row) for row in rows]

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def __len__(self) -> int:
            return 128

    path = lines(tmp_path, "~~~", "words")
    found = diagnose(model, Corpus(path), tokenizer=Deaf(), measures="SinkRate")
    assert found.facts["skipped"] == [f"{path} at byte 0 holds no token"]
    assert found.facts["tokens"] == 5


def test_a_shard_that_cannot_be_read_is_told_and_the_rest_is_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_table(tmp_path)
    whole = (tmp_path / "corpus.parquet").read_bytes()
    (tmp_path / "corpus.parquet").unlink()
    (tmp_path / "a torn.parquet").write_bytes(whole[:-20])
    (tmp_path / "b flipped.parquet").write_bytes(whole[:60] + bytes(200) + whole[260:])
    (tmp_path / "c gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "d locked.jsonl").write_bytes(b'{"text": "locked"}\n')
    os.mkfifo(tmp_path / "e pipe.txt")
    lines(tmp_path, *TEXTS[:3], name="f good.jsonl")
    opened = Path.open

    def locked(path: Path, *args: Any, **how: Any) -> Any:
        if path.name.startswith("d"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **how)

    monkeypatch.setattr(Path, "open", locked)
    found = diagnose(model, Corpus(tmp_path), tokenizer=characters(), measures="SinkRate")
    told = "\n".join(found.facts["skipped"])
    assert found.facts["texts"] >= 3
    for name, why in {
        "a torn.parquet from row 0": "cannot be read (",
        "b flipped.parquet from row": "cannot be read (",
        "c gone.jsonl from byte 0": "cannot be read (No such file or directory)",
        "d locked.jsonl from byte 0": "cannot be read (Permission denied)",
        "e pipe.txt": "is no file that is there",
    }.items():
        assert f"{tmp_path / name}" in told
        assert why in told
    assert "texts left out" in str(found)
    with pytest.raises(FieldError, match="none of these can be read"):
        diagnose(model, Corpus(tmp_path / "d locked.jsonl"), tokenizer=characters())


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    as_table(tmp_path)
    for where in (tmp_path / "corpus.parquet", lines(tmp_path, "a")):
        assert all("'body'" in reason for reason in reasons(Corpus(where, "body")))
        assert reasons(Corpus(where, "body"))
    assert "holds int and no text" in reasons(Corpus(tmp_path / "corpus.parquet", "n"))[0]


def test_a_file_that_holds_nothing_is_named(model: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    for name, held in {"a.jsonl": b"", "b.jsonl": b"\n \n" * 90}.items():
        (tmp_path / name).write_bytes(held)
        assert reasons(Corpus(tmp_path / name)) == [f"{tmp_path / name} holds no line"]
    with pytest.raises(FieldError, match=r"a\.jsonl holds no line': none of these can be read"):
        diagnose(model, Corpus(tmp_path / "a.jsonl"), tokenizer=characters())
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert reasons(Corpus(tmp_path / "c.parquet")) == [
        f"{tmp_path / 'c.parquet'} from row 0 cannot be read (it has no row)"
    ]
    padded = tmp_path / "d.jsonl"
    padded.write_bytes(b"\n" * 500 + b'{"text": "The keys"}\n')
    assert reasons(Corpus(padded, shard=100)) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Corpus(p / "no.jsonl"), r"Corpus\.where = Path\('.*no.jsonl'\): there is no such file or folder"),
        (lambda p: Corpus("a\0b"), "there is no such file or folder"),
        (lambda p: Corpus([1, 2]), r"Corpus\.where = 'list': must be a Path, or a datasets\.Dataset with a column"),
        (lambda p: Corpus(p, shard=0), r"Corpus\.shard = 0: must be 1 or more"),
        (lambda p: Corpus(p).shards(), "the folder holds no file that ends in .jsonl"),
        (lambda p: Ray(0), r"Ray\.workers = 0: must be 1 or more; for example workers=2"),
        (lambda p: Ray(cpus=0.0), r"Ray\.cpus = 0.0: must be above 0"),
        (lambda p: diagnose(models.tiny("llama"), "words", workers=2), r"workers = 2: share the shards of a corpus"),
    ],
)
def test_wrong_input_is_a_plain_error(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FieldError, match=message):
        make(tmp_path)


# going on


def stopping(after: int) -> Callable[[Progress], None]:
    def stop(now: Progress) -> None:
        if now.stage == "corpus" and now.done >= after:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("every", [0.0, 1e9])
@pytest.mark.parametrize("after", [1, 2, 7])
def test_a_stopped_corpus_goes_on_and_ends_with_the_same_bits(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: float, after: int
) -> None:
    monkeypatch.setattr(running, "SAVE_EVERY", every)
    corpus = Corpus(lines(tmp_path, TEXTS[0], b"bad", *TEXTS[1:]), shard=100)
    options: dict[str, Any] = dict(tokenizer=characters(), measures=MEASURES)
    straight = diagnose(model, corpus, **options)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, corpus, out=tmp_path / "out", progress=stopping(after), **options)
    heard: list[Progress] = []
    later = diagnose(model, corpus, out=tmp_path / "out", progress=heard.append, **options)
    assert heard[0].note == f"goes on after {after} of {len(corpus.shards())} shards read before"
    assert len([p for p in heard if p.stage == "corpus"]) == 1 + len(corpus.shards()) - after
    for profile in (later, Profile.load(tmp_path / "out")):
        assert equal(profile, straight)
        counts = ("texts", "windows", "tokens", "left_out", "skipped", "shards", "unread", "backends")
        assert [profile.facts[x] for x in counts] == [straight.facts[x] for x in counts]
    os.utime(corpus.where)  # it may hold something else now
    with pytest.raises(StatisticError, match=r"its texts is .*Name another folder"):
        diagnose(model, corpus, out=tmp_path / "out", **options)


def test_a_full_disk_is_a_plain_error_and_what_was_saved_before_stays(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SAVE_EVERY", 0.0)
    corpus = as_lines(tmp_path)
    options: dict[str, Any] = dict(tokenizer=characters(), measures=MEASURES)
    with pytest.raises(KeyboardInterrupt):
        diagnose(model, corpus, out=tmp_path / "out", progress=stopping(3), **options)
    with room_for(1000), pytest.raises(WriteError, match=r"cannot write to .*Free some space"):
        diagnose(model, corpus, out=tmp_path / "out", **options)
    heard: list[Progress] = []
    later = diagnose(model, corpus, out=tmp_path / "out", progress=heard.append, **options)
    assert heard[0].done == 3
    assert equal(later, diagnose(model, corpus, **options))
