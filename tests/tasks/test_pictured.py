"""Questions about pictures: what is read, what the model is shown, and which models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from heedful import models
from heedful.bench.answer import answer
from heedful.bench.asking import going_on
from heedful.bench.compare import compare
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel, SiteError
from heedful.core.kinds.tokens import Prompt
from heedful.methods import TempScale, ToMe
from heedful.tasks import from_file
from heedful.tasks._pictured import PicturedChoices, PicturedQuestions
from heedful.tasks.task import Item
from heedful.text_models import text_model
from tests.tasks.beside import image_reader, llava, painted, rows, vit

SHARP = TempScale(0.2)
COLOURS: list[Any] = [
    {"image": f"{i}.png", "question": f"w{30 + i}", "choices": ["red", "blue"], "answer": ("red", "blue")[i % 2]}
    for i in range(4)
]


def asked(home: Path, found: list[Any] = COLOURS) -> Path:
    for i in range(4):
        painted(home / f"{i}.png", ((220, 30, 30), (30, 30, 220))[i % 2], i)
    return rows(home / "q.jsonl", found)


def test_rows_about_pictures_are_read(tmp_path: Path) -> None:
    task = from_file(asked(tmp_path))
    assert isinstance(task, PicturedChoices)
    assert task.title == "q.jsonl"
    before = repr(task)
    painted(tmp_path / "0.png", (9, 9, 9))
    assert repr(from_file(tmp_path / "q.jsonl")) != before  # another picture under the same name is another task
    words = [{"image": "0.png", "question": "w30", "answer": "blue"}]
    assert isinstance(from_file(asked(tmp_path, words)), PicturedQuestions)


def test_yes_and_no_are_each_others_choice(tmp_path: Path) -> None:
    found = [{"image": "0.png", "question": "w30", "answer": said} for said in ("yes", "No")]
    task = from_file(asked(tmp_path, found))
    assert isinstance(task, PicturedChoices)
    assert sorted(row.options for row in task.rows) == [("No", "yes"), ("yes", "no")]
    text = rows(tmp_path / "text.jsonl", [{"question": "w30", "answer": "yes"}])
    assert from_file(text).rows[0].options == ("yes",)  # type: ignore[attr-defined]  # as ever, without a picture


def test_broken_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    long = "ж" * 200 + ".png"  # of more bytes than a system takes for a name
    broken = {
        f'{{"image": "{long}", "question": "w3", "answer": "w4"}}': "which is no file beside this one",
        '{"image": "9.png", "question": "w3", "answer": "w4"}': "'image' is '9.png', which is no file beside this one",
        '{"image": "x.png", "question": "w3", "answer": "w4"}': "is 'x.png', which is no image that can be read",
        '{"image": 0, "question": "w3", "answer": "w4"}': "'image' is '0', which is no file beside this one",
        '{"image": ["0.png"], "question": "w3", "answer": "w4"}': "'image' is ['0.png'], and must be text",
        '{"image": "0.png", "question": "w3"}': "has no 'answer'",
        '{"question": "w3", "choices": ["a", "b"], "answer": "a"}': "is a question with choices, and those before "
        "are a question about a picture with choices",
    }
    task: Any = from_file(asked(tmp_path, [*COLOURS, *broken]))
    assert task.available(None) == 4
    for why, wanted in zip(task.left_out, broken.values(), strict=True):
        assert wanted in why


@pytest.mark.parametrize("template", [None, "<image> w9 {{ messages[0]['content'][1]['text'] }} Answer:"])
def test_the_model_is_shown_picture_and_question(template: str | None, tmp_path: Path) -> None:
    given = llava(template)
    task: Any = from_file(asked(tmp_path))
    words = given.tokenizer.tokenizer
    for number, item in enumerate(task.items(given.tokenizer, 4)):
        row = task.rows[task.place(given.tokenizer, number, 0)]
        told = words.decode(item.prompt.tokens).replace("<image>", "").split()
        assert told == (["w9", row.question, "Answer:"] if template else ["Question:", row.question, "Answer:"])
        ((first, stop),) = item.prompt.roles["image"]
        places = [i for i, token in enumerate(item.prompt.tokens) if token == given.model.config.image_token_id]
        assert places == list(range(first, stop))
        assert item.cut == stop
        assert item.prompt.roles["question"] == ((stop, len(item.prompt)),)
        assert [words.decode(option) for option in item.options] == [row.options[0], row.options[1]]
        with text_model(given.model, None, item.shown) as speaker, torch.no_grad():
            sheet = answer(speaker, item)
            whole = given.model(input_ids=torch.tensor([item.prompt.tokens]), **item.shown.inputs).logits[0, -1]
        right, other = (option[0] for option in item.options)
        assert close_model(torch.cat(sheet.options), whole.log_softmax(-1)[[right, other]])
        assert task.score(item, sheet) == float(whole[right] > whole[other])


def test_what_is_told_of_each_token_goes_in_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = llava()
    own = type(given.tokenizer).__call__

    def telling(self: Any, **asked_for: Any) -> Any:
        found = own(self, **asked_for)
        return {**found, "token_type_ids": torch.zeros_like(found["input_ids"])}

    monkeypatch.setattr(type(given.tokenizer), "__call__", telling)
    (item,) = from_file(asked(tmp_path)).items(given.tokenizer, 1)
    assert item.cut is None
    assert set(item.shown.inputs) == {"pixel_values", "token_type_ids"}


def test_it_is_compared(tmp_path: Path) -> None:
    methods = [SHARP, "snapkv(budget=0.5)", "pruneheads(groups=((2,0),))", ToMe(1).on(layers=range(2))]
    found = compare(llava(), methods, [asked(tmp_path)], turns=1, batch=[1, 2])
    results = {r.contender: r for r in found.results}
    assert {r.prompts for r in results.values()} == {4}
    assert results["TempScale(tau=0.2)"].active
    assert {"SnapKV", "TempScale(tau=0.2)"} <= {name.partition("(budget")[0] for name in results}
    (merged,) = (r for name, r in results.items() if name.startswith("ToMe"))
    assert merged.active  # the encoder's patches, which no text has
    assert not found.refused
    assert found.page(tmp_path / "page.html").stat().st_size > 100_000


def test_the_pixels_are_seen(tmp_path: Path) -> None:
    """The same question about another picture gets another answer, and no picture is left over from the one before."""
    given = llava()
    task: Any = from_file(asked(tmp_path, [{**COLOURS[0], "image": f"{i}.png"} for i in range(4)]))
    with text_model(given.model) as speaker:
        items = task.items(given.tokenizer, 4)
        sheets = [answer(speaker, item).means for item in items]
        assert len(set(sheets)) == 4
        assert answer(speaker, items[0]).means == sheets[0]


def test_a_models_own_error_under_a_method_is_a_reason(tmp_path: Path) -> None:
    given = llava()
    (item,) = from_file(asked(tmp_path)).items(given.tokenizer, 1)
    alone = Item(Prompt((1, 2)))
    with (
        pytest.raises(SiteError, match="LlavaForConditionalGeneration cannot go on under it: 48 are no 64"),
        going_on(given.model, SHARP, item),
    ):
        raise ValueError("48 are no 64")
    for what, asked_of in ((None, item), (SHARP, alone)):
        with pytest.raises(ValueError, match=r"^48 are no 64$"), going_on(given.model, what, asked_of):
            raise ValueError("48 are no 64")
    with pytest.raises(FieldError, match="must be a size"), going_on(given.model, SHARP, item):
        raise FieldError("x", "y", 1, "must be a size", 2)


def test_an_error_of_the_unedited_model_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = llava()

    def broken(**more: Any) -> None:
        raise ValueError("not my day")

    monkeypatch.setattr(given.model.model, "get_image_features", broken)
    with pytest.raises(ValueError, match="not my day"):
        compare(given, [SHARP], [asked(tmp_path)], turns=0)


def test_models_that_cannot_be_asked_are_refused_before_they_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(tmp_path)
    model = models.tiny("llama")
    monkeypatch.setattr(model, "forward", lambda input_ids=None: pytest.fail("the model ran"))
    with pytest.raises(RefusedModel, match=r"q\.jsonl asks about pictures, and LlamaForCausalLM takes no pixels"):
        compare(models.Loaded(model, llava().tokenizer, "x"), [SHARP], [tmp_path / "q.jsonl"])
    with pytest.raises(RefusedModel, match="ViTForImageClassification is no causal language model"):
        compare(vit(), [SHARP], [tmp_path / "q.jsonl"])
    with pytest.raises(FieldError, match=r"^compare\(\).*needs the model's image processor"):
        compare(llava()._replace(tokenizer=object()), [SHARP], [tmp_path / "q.jsonl"])
    with pytest.raises(FieldError, match="prepares pictures alone, and the questions are text"):
        compare(llava()._replace(tokenizer=image_reader()), [SHARP], [tmp_path / "q.jsonl"])
    placeless = llava()
    placeless.tokenizer.image_token = None
    with pytest.raises(FieldError, match="'LlavaProcessor': has no token that stands for a picture"):
        compare(placeless, [SHARP], [tmp_path / "q.jsonl"])
