"""Tasks from a user's own files: what is read, what is left out and why, and in which order it is asked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import heedful
from heedful import models
from heedful.bench.compare import Series, compare, fits
from heedful.core.errors import CatalogueError, FieldError, UnusableFile
from heedful.methods.intervene.language.temp_scale import TempScale
from heedful.tasks import find, from_file, known
from heedful.tasks.loss import LossByPosition
from heedful.tasks.needle import Needle
from heedful.tasks.recall import Induction
from heedful.tasks.task import Task
from tests.tasks.conftest import Bytes
from tests.test_cli_compare import Characters

LAMP = "The lamp on the desk was bought in Oslo by Ada."
QUESTIONS = [{"context": LAMP, "question": f"Who bought lamp {i}?", "answer": "Ada"} for i in range(5)]
WORDS = Bytes()


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_questions_are_asked_on_their_context(tmp_path: Path) -> None:
    task = from_file(lines(tmp_path / "my.jsonl", QUESTIONS))
    items = task.items(WORDS, 5)
    asked = {WORDS.decode(item.prompt.tokens) for item in items}
    assert asked == {f"{LAMP}\n\nQuestion: Who bought lamp {i}?\nAnswer:" for i in range(5)}
    (item, *_) = items
    assert [WORDS.decode(option) for option in item.options] == [" Ada"]
    assert WORDS.decode(item.prompt.tokens[: item.cut]) == LAMP
    told = {role: WORDS.decode(item.prompt.tokens[slice(*spans[0])]) for role, spans in item.prompt.roles.items()}
    assert told["needle"] == "Ada"
    assert told["context"] == LAMP
    assert task.unit == "share right"
    assert task.title == "my.jsonl"
    assert task.chance(item) == 0


def test_a_question_needs_no_context(tmp_path: Path) -> None:
    (item,) = from_file(lines(tmp_path / "my.jsonl", [{"question": "Two and two?", "answer": 4}])).items(WORDS, 1)
    assert item.cut is None
    assert WORDS.decode(item.options[0]) == " 4"


@pytest.mark.parametrize("answer", [1, "B", "b", "pear"])
def test_the_right_choice_comes_first_however_it_is_named(answer: object, tmp_path: Path) -> None:
    row = {"document": LAMP, "question": "Which?", "options": ["fig", "pear", "plum"], "answer": answer}
    task = from_file(lines(tmp_path / "my.jsonl", [row]))
    (item,) = task.items(WORDS, 1)
    assert [WORDS.decode(option) for option in item.options] == [" pear", " fig", " plum"]
    assert task.chance(item) == pytest.approx(1 / 3)


def test_text_is_cut_into_windows_and_its_second_half_graded(tmp_path: Path) -> None:
    text = "abcdefghij" * 20 + "end"
    (tmp_path / "book.txt").write_text(text)
    task = from_file(tmp_path / "book.txt", length=51)
    assert task.available(WORDS) == 4  # fifty letters each; the end is less than an eighth
    for item in task.items(WORDS, 4):
        assert item.prompt.tokens[0] == 256
        assert WORDS.decode(item.prompt.tokens) == "abcdefghij" * 5
        assert item.cut == 25
    assert not task.more_is_better
    rows = lines(tmp_path / "texts.jsonl", [{"text": "a" * 40}, {"text": "b" * 40}])
    assert {WORDS.decode(i.prompt.tokens)[0] for i in from_file(rows).items(WORDS, 2)} == {"a", "b"}


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name, text in (("a.txt", "a" * 60), ("deep/b.md", "b" * 60), (".hidden/c.txt", "c" * 60), ("d.bin", "d" * 60)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "e.txt").write_bytes(b"\xff" * 60)
    (tmp_path / "f.txt").symlink_to(tmp_path / "gone.txt")
    task = from_file(tmp_path)
    assert {WORDS.decode(item.prompt.tokens)[0] for item in task.items(WORDS, 2)} == {"a", "b"}
    assert [re.sub(r"\(.*\)", "()", why) for why in task.left_out] == [  # type: ignore[attr-defined]
        "e.txt: cannot be read as UTF-8 text (): convert it, or leave it out",
        "f.txt: cannot be read: No such file or directory",
    ]


BROKEN = {
    "{": "is not JSON",
    "[]": "must hold an object",
    "{}": "has neither 'question' nor 'text' but nothing",
    '{"question": "x"}': "has no 'answer'",
    '{"question": "x", "answer": ""}': "'answer' is '', and must be text",
    '{"question": "x", "answer": true}': "'answer' is True, and must be text",
    '{"question": ["x"], "answer": "y"}': "'question' is ['x'], and must be text",
    '{"question": "x", "choices": ["a"], "answer": "a"}': "must be two or more different texts",
    '{"question": "x", "choices": ["a", "b"], "answer": "c"}': "is 'c': none of the choices, nor the letter or place",
    '{"question": "x", "choices": ["a", "b"], "answer": 2}': "is 2: none of the choices",
    '{"text": "short"}': "is a text of 5 characters, and less than 32 tell nothing",
    '{"text": "long enough to be a text, though of another kind"}': "is plain text, and those before are a question",
}


def test_broken_lines_are_left_out_and_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "my.jsonl", [QUESTIONS[0], "", *BROKEN, QUESTIONS[1]])
    task = from_file(path)
    assert task.available(WORDS) == 2
    told: tuple[str, ...] = task.left_out  # type: ignore[attr-defined]
    for number, (why, wanted) in enumerate(zip(told, BROKEN.values(), strict=True), 3):
        assert why.startswith(f"my.jsonl, line {number}: ")
        assert wanted in why


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    for rows, wanted in (
        (["{"] * 3, r"can be asked: my.jsonl, line 1: is not JSON[^;]*; [^;]*line 2: [^;]*; [^;]*line 3: [^;]*; for"),
        (["{"] * 5, r"nothing that can be asked: my.jsonl, line 1: is not JSON.*; [^;]*line 3: [^;]*; and 2 more; for"),
        ([""], "holds noth"),
    ):
        with pytest.raises(FieldError, match=wanted):
            from_file(lines(tmp_path / "my.jsonl", rows))
    told = r"^compare\(\)\.tasks = 'nosuch.jsonl': no such file or folder; for example tasks='my.jsonl'$"
    for missing in ("nosuch.jsonl", Path("nosuch.jsonl")):
        with pytest.raises(UnusableFile, match=told):
            compare((models.tiny("llama"), WORDS), ["act"], [missing])
    with pytest.raises(FieldError, match="no such file"):
        find("none.jsonl")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(FieldError, match="of 5 characters, and less than 32 tell nothing; for example path='a longer"):
        from_file(tmp_path / "short.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FieldError, match="holds no file that ends in"):
        from_file(tmp_path / "empty")
    (tmp_path / "a.txt").write_text("a" * 99)
    with pytest.raises(FieldError, match="length"):
        from_file(tmp_path / "a.txt", length=3)
    with pytest.raises(CatalogueError, match=r"no task named 'nedle', nor a file or folder\. Did you mean needle"):
        find("nedle")


@pytest.mark.parametrize(
    ("broken", "good"),
    [
        ('{"image": "0.png", "question": "w3", "box": [0, 0, 4]}', {"image", "question", "box"}),
        ('{"question": "w3", "box": [0, 0, 4, 4]}', {"image", "question", "box"}),
        ('{"image": "0.png", "question": "w3", "answer": "w4"}', {"image", "question", "answer"}),
        ('{"image": "0.png", "question": "w3", "options": ["w4"]}', {"image", "question", "choices", "answer"}),
        ('{"question": "w3", "choices": ["w4"], "answer": 0}', {"context", "question", "choices", "answer"}),
        ('{"question": "w3"}', {"context", "question", "answer"}),
        ('{"text": "short"}', {"text"}),
        ('{"txt": "short"}', {"context", "question", "answer"}),
        ("[]", {"context", "question", "answer"}),
    ],
)
def test_where_all_are_broken_a_row_of_their_kind_is_shown(tmp_path: Path, broken: str, good: set[str]) -> None:
    with pytest.raises(FieldError) as told:
        from_file(lines(tmp_path / "my.jsonl", ["{", broken]))
    shown = str(told.value).rpartition("; for example path='")[2].removesuffix("'")
    assert set(json.loads(shown)) == good


def test_the_command_line_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a" * 300)
    assert find("notes/(length=64)").length == 64  # type: ignore[attr-defined]
    with pytest.raises(FieldError, match=r"FromFile\.size = 3: no such field"):
        find("notes/(size=3)")
    assert "own" not in str(known())
    assert heedful.tasks.from_file("notes").title == "notes"


def test_the_order_is_drawn_and_the_value_names_what_it_holds(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": "x"} for i in range(40)]
    one = from_file(lines(tmp_path / "a.jsonl", rows))

    def order(task: Task, seed: int) -> list[str]:
        return [WORDS.decode(item.prompt.tokens) for item in task.items(WORDS, 40, seed)]

    assert order(one, 0) != sorted(order(one, 0)) != order(one, 1)
    assert sorted(order(one, 0)) == sorted(order(one, 1))
    assert len(set(order(one, 0))) == 40
    two = from_file(lines(tmp_path / "a.jsonl", [*rows[:-1], {"question": "39?", "answer": "y"}]))
    assert re.fullmatch(r"OwnQuestions\('.*a.jsonl', 40 items, #[0-9a-f]{8}\)", repr(one))
    assert repr(one) != repr(two)


def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(FieldError, match=r"from_file\(\)\.path = 5: must be str or Path"):
        from_file(5)  # type: ignore[arg-type]


def test_items_longer_than_the_model_takes_are_left_out_and_counted(tmp_path: Path) -> None:
    loaded = models.Loaded(models.tiny("llama"), Characters(), "tiny")
    limit = loaded.model.config.max_position_embeddings
    long = {"context": "x" * limit, "question": "long?", "answer": "y"}
    task = from_file(lines(tmp_path / "my.jsonl", [*QUESTIONS, long, "{"]))
    series = Series(task, loaded.model, Characters(), 0, 40)
    assert len(series.first(40)) == 5
    assert len(series.first(3)) <= 3
    notes: list[str] = []
    found = compare(loaded, [TempScale(0.5)], [task], turns=0, progress=lambda p: notes.append(p.note))
    assert {r.prompts for r in found.results} == {5}
    told = "my.jsonl: 2 left out: my.jsonl, line 7: is not JSON (Expecting property name enclosed in double quotes"
    assert any(note.startswith(told) for note in notes)
    assert f"1 longer than the {limit} positions of LlamaForCausalLM" in str(found)
    with pytest.raises(FieldError, match="longer than the"):
        compare(loaded, [TempScale(0.5)], [lines(tmp_path / "long.jsonl", [long])], turns=0)


def test_a_long_text_is_read_whole(tmp_path: Path) -> None:
    text = " ".join(f"word{i}" for i in range(3000)) + "x" * 5000
    (tmp_path / "book.txt").write_text(text)
    task = from_file(tmp_path / "book.txt", length=101)
    count = task.available(WORDS)
    assert count == len(text) // 100 + (8 * (len(text) % 100) >= 100)
    found = {WORDS.decode(item.prompt.tokens) for item in task.items(WORDS, count or 0)}
    assert found == {text[i : i + 100] for i in range(0, 100 * (count or 0), 100)}


@pytest.mark.parametrize("task", [Needle(length=100_000), Induction(length=400), LossByPosition(length=1000)], ids=repr)
def test_prompts_that_the_model_cannot_take_are_refused_before_one_is_made(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = models.Loaded(models.tiny("llama"), Characters(), "tiny")
    monkeypatch.setattr(type(task), "item", lambda *_: pytest.fail("a prompt was made"))
    with pytest.raises(FieldError, match=f"makes prompts of {task.planned} tokens, and LlamaForCausalLM has 512"):
        compare(loaded, [TempScale(0.5)], [task], turns=0)
    assert not fits(loaded, task)
