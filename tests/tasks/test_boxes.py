"""Boxes in pictures: what is read, which tokens stand for a box, where a model looks, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.image_processing_base import ImageProcessingMixin

from heedful import attached, models
from heedful.bench.answer import answer
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError
from heedful.methods import MALA, PruneHeads, SnapKV, TempScale, ToMe
from heedful.tasks import from_file
from heedful.tasks._boxes import PicturedBoxes, covered, spans
from heedful.tasks._rows import Boxed
from heedful.tasks.task import Item, Sheet
from heedful.text_models import text_model
from tests.tasks.beside import llava, painted, rows

SHARP = TempScale(0.2)
QUARTERS = ([0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8])  # of pictures of 8 x 8 dots, each a token


def boxes(home: Path, found: list[Any] | None = None) -> Path:
    for i in range(4):
        painted(home / f"{i}.png", ((220, 30, 30), (30, 30, 220))[i % 2], i)
    asked = [{"image": f"{i}.png", "question": f"w{30 + i}", "box": box} for i, box in enumerate(QUARTERS)]
    return rows(home / "q.jsonl", asked if found is None else found)


def task_of(home: Path) -> PicturedBoxes:
    given = llava()
    task = from_file(boxes(home)).on(given.model, given.tokenizer)
    assert isinstance(task, PicturedBoxes)
    return task


def row_of(task: PicturedBoxes, item: Item) -> Boxed:
    (found,) = [row for row in task.rows if f"{row.question}" in llava().tokenizer.decode(item.prompt.tokens)]
    return found


def test_rows_with_boxes_are_read_and_broken_ones_are_named(tmp_path: Path) -> None:
    row: dict[str, Any] = {"image": "0.png", "question": "w3", "box": [0, 0, 4, 4]}
    broken = {
        json.dumps(row | {"box": [0, 0, 4]}): "'box' is [0, 0, 4], and must be four numbers: left, top, right, bottom",
        json.dumps(row | {"box": "0 0 4 4"}): "and must be four numbers",
        json.dumps(row | {"box": [0, 0, True, 4]}): "and must be four numbers",
        json.dumps(row | {"box": [4, 0, 4, 4]}): "in a picture of 8 x 8 dots; [0, 0, 8, 8] is all of it",
        json.dumps(row | {"box": [0, 0, 4, 9]}): "with left < right and top < bottom, in a picture of 8 x 8 dots",
        json.dumps(row | {"box": [-1, 0, 4, 4]}): "with left < right and top < bottom, in a picture of 8 x 8 dots",
        json.dumps(row | {"box": [0, 0, 9, 4]}): "with left < right and top < bottom, in a picture of 8 x 8 dots",
        json.dumps(row | {"box": [0, 4, 4, 4]}): "with left < right and top < bottom, in a picture of 8 x 8 dots",
        json.dumps(row | {"box": [0, -1, 4, 4]}): "with left < right and top < bottom, in a picture of 8 x 8 dots",
        json.dumps(
            row | {"answer": "w4"}
        ): "has both 'box' and 'answer'; give where to look and what to say a row each",
        json.dumps(row | {"options": ["w4", "w5"]}): "has both 'box' and 'options'",
        json.dumps(row | {"image": "9.png"}): "'image' is '9.png', which is no file beside this one",
        '{"question": "w3", "box": [0, 0, 4, 4]}': "has no 'image'",
        '{"image": "0.png", "question": "w3", "answer": "w4"}': "is a question about a picture, and those before "
        "are a question about a picture with a box",
    }
    task: Any = from_file(boxes(tmp_path, [row, *broken]))
    assert isinstance(task, PicturedBoxes)
    assert [row.box for row in task.rows] == [(0, 0, 4, 4)]
    assert len(task.left_out) == len(broken)
    for why, wanted in zip(task.left_out, broken.values(), strict=True):
        assert wanted in why


def test_the_tokens_of_a_box_are_marked(tmp_path: Path) -> None:
    task, processor = task_of(tmp_path), llava().tokenizer
    for item in task.items(processor, 4):
        ((first, _),) = item.prompt.roles["image"]
        number = int(row_of(task, item).question[1:]) - 30
        assert item.prompt.roles["box"] == ((first + number, first + number + 1),)
        assert task.chance(item) == 1 / 4
        assert item.shown.looks
        assert not item.options
    left = boxes(tmp_path, [{"image": "0.png", "question": "w30", "box": [0, 0, 4, 8]}])
    (item,) = from_file(left).on(llava().model, processor).items(processor, 1)
    ((first, _),) = item.prompt.roles["image"]
    assert item.prompt.roles["box"] == ((first, first + 1), (first + 2, first + 3))
    assert spans([1, 2, 3, 7, 9, 10]) == ((1, 4), (7, 8), (9, 11))


def row(home: Path, box: tuple[float, float, float, float], wide: int = 8) -> Boxed:
    from PIL import Image

    Image.new("RGB", (wide, 8)).save(home / "a.png")
    return Boxed("", "w3", (), "a.png", "", str(home / "a.png"), box)


def test_a_token_stands_for_the_box_where_half_as_much_lies_in_it_as_of_any_other(tmp_path: Path) -> None:
    processor = llava().tokenizer
    for box, wanted in {
        (0, 0, 5, 4): "1000",  # a quarter of the second
        (0, 0, 6, 4): "1100",
        (1, 0, 5, 4): "1000",  # a quarter of the second, and three of the first
        (1, 1, 2, 2): "1000",  # small, and all of it in the first
        (3, 3, 5, 5): "1111",
        (0, 0, 8, 4): "1100",
    }.items():
        assert covered(row(tmp_path, box), processor, 4) == tuple(one == "1" for one in wanted), box
    # the middle of a wide picture is what the model is shown
    assert covered(row(tmp_path, (4, 0, 8, 4), 16), processor, 4) == (True, False, False, False)
    assert covered(row(tmp_path, (0, 0, 3, 8), 16), processor, 4) == (False,) * 4


class Rows(ImageProcessingMixin):
    """A processor that gives patches one after another, four to a token, or something that nobody knows."""

    def __init__(self, known: bool = True) -> None:
        self.known = known

    def __call__(self, images: Any, return_tensors: str) -> Any:
        dots = torch.tensor([[images.getpixel((x, y))[0] / 255 - 0.5 for x in range(8)] for y in range(8)])
        dots[:, :2] = 0.0  # as where a processor pads
        whole = dots.view(2, 2, 2, 2, 2, 2).permute(0, 3, 1, 4, 2, 5)  # of tokens, in them of patches, in them of dots
        return {"pixel_values": whole.reshape(16, 4) if self.known else dots[None, None, None]}


def test_patches_that_stand_one_after_another_are_known_too(tmp_path: Path) -> None:
    assert covered(row(tmp_path, (4, 0, 8, 4)), Rows(), 4) == (False, True, False, False)
    assert covered(row(tmp_path, (0, 0, 4, 4)), Rows(), 4) == (True, False, False, False)
    with pytest.raises(FieldError, match="whose places are not known; for example"):
        covered(row(tmp_path, (4, 0, 8, 4)), Rows(known=False), 4)
    with pytest.raises(FieldError, match="whose places are not known"):
        covered(row(tmp_path, (4, 0, 8, 4)), Rows(), 7)


def test_boxes_of_which_nothing_or_all_is_shown_are_left_out(tmp_path: Path) -> None:
    from PIL import Image

    found = [{"image": f"{i}.png", "question": "w30", "box": box} for i, box in enumerate(QUARTERS[:2])]
    path = boxes(tmp_path, [*found, {"image": "3.png", "question": "w3", "box": [0, 0, 8, 8]}, "no row"])
    Image.new("RGB", (32, 8)).save(tmp_path / "1.png")
    task = from_file(path).on(llava().model, llava().tokenizer)
    assert [row.image for row in task.rows] == ["0.png"]  # type: ignore[attr-defined]
    broken, *left_out = task.left_out  # type: ignore[attr-defined]
    assert "line 4: is not JSON" in broken
    assert left_out == [
        "1.png, box [4, 0, 8, 4]: is nothing that the model is shown of the picture",
        "3.png, box [0, 0, 8, 8]: is all that the model is shown of the picture",
    ]
    only = from_file(rows(tmp_path / "o.jsonl", [{"image": "3.png", "question": "w3", "box": [0, 0, 8, 8]}]))
    with pytest.raises(FieldError, match="is all that the model is shown"):
        only.on(llava().model, llava().tokenizer)


def test_a_box_is_laid_over_the_tokens_once_and_a_picture_prepared_once_an_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPImageProcessor

    given, prepared = llava(), []
    whole = CLIPImageProcessor.__call__
    monkeypatch.setattr(CLIPImageProcessor, "__call__", lambda *args, **how: prepared.append(1) or whole(*args, **how))
    task = from_file(boxes(tmp_path)).on(given.model, given.tokenizer)
    assert len(prepared) == 4 * 4, "each picture for its tokens; black, white and the box for the places of these"
    prepared.clear()
    task.items(given.tokenizer, 4)
    assert len(prepared) == 4
    with pytest.raises(FieldError, match="makes items for one model alone"):
        from_file(boxes(tmp_path)).items(given.tokenizer, 1)


def test_what_leaves_no_map_is_refused_in_words_of_the_user(tmp_path: Path) -> None:
    item = task_of(tmp_path).items(llava().tokenizer, 1)[0]
    for what in (ToMe(1), TempScale(0.5) | ToMe(1), MALA().on(layers=0)):
        with pytest.raises(FieldError, match="leaves no map of single tokens, off which it is read where") as told:
            sheet_of(item, what)
        assert "Looks" not in str(told.value)


def eager(item: Item, temper: float = 1.0) -> Tensor:
    """What the last token gives to the picture's, by transformers' own weights."""
    model = llava().model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model(input_ids=torch.tensor([item.prompt.tokens]), **item.shown.inputs, output_attentions=True)
    ((first, stop),) = item.prompt.roles["image"]
    return torch.stack([layer[0, :, -1, first:stop].mean(0) for layer in seen.attentions]).mean(0)


def sheet_of(item: Item, what: Any = None) -> Sheet:
    model = llava().model
    with text_model(model, what, item.shown) as speaker:
        found = answer(speaker, item)
    assert attached(model) is None
    return found


def test_it_is_told_where_the_last_token_looks(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    hits = []
    for item in task.items(llava().tokenizer, 4):
        looks, sheet = eager(item), sheet_of(item)
        assert item.cut is not None, "the picture is read before the question, and the last call counts"
        assert close_model(sheet.looks, looks)
        number = int(row_of(task, item).question[1:]) - 30
        assert task.score(item, sheet) == float(int(looks.argmax()) == number)
        assert task.nats(item, sheet) == pytest.approx(math.log(float(looks[number] / looks.sum())), rel=1e-4)
        hits.append(task.score(item, sheet))
    assert {*hits} == {0.0, 1.0}


def test_a_voice_tells_of_each_prompt_by_itself(tmp_path: Path) -> None:
    items = task_of(tmp_path).items(llava().tokenizer, 2)
    with text_model(llava().model, None, items[0].shown) as speaker:
        found = [answer(speaker, item).looks for item in (*items, items[0])]
        assert speaker.run is not None
        assert not speaker.run.state.statistics, "what was told is not kept"
    assert close_model(found[1], eager(items[1]))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_methods_move_the_look_and_what_a_cache_has_lost_is_not_looked_at(tmp_path: Path) -> None:
    item = task_of(tmp_path).items(llava().tokenizer, 1)[0]
    plain, sharp, cut = (sheet_of(item, what).looks for what in (None, SHARP, SnapKV(0.25, window=1)))
    assert not close_model(plain, sharp)
    assert (cut == 0).any()
    assert (plain > 0).all()
    pruned = sheet_of(item, PruneHeads(groups=((2, 0),))).looks
    assert not close_model(pruned, plain)


def test_no_look_at_all_is_wrong_and_not_without_end(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    item = task.items(llava().tokenizer, 1)[0]
    blind = Sheet((), (), torch.empty(0), looks=torch.zeros(4))
    assert task.score(item, blind) == 0
    assert task.nats(item, blind) == math.log(1e-6)


def test_it_is_compared(tmp_path: Path) -> None:
    methods = [
        SHARP,
        "snapkv(budget=0.5)",
        "pruneheads(groups=((2,0),))",
        "attentionsorting(role='image')",
        "largepig(role='image')",
    ]
    found = compare(llava(), methods, [boxes(tmp_path)], turns=1, out=tmp_path / "out")
    results = {r.contender: r for r in found.results}
    assert {"unedited", "TempScale(tau=0.2)", "SnapKV(budget=0.5)"} <= set(results)
    assert results["TempScale(tau=0.2)"].active
    assert results["PruneHeads(groups=((2, 0),))"].active
    assert not results["unedited"].active
    told = {r.contender: r.reason for r in found.refused if r.task in found.tasks}
    for name in ("AttentionSorting(role='image')", "LargePiG(role='image')"):
        assert "where a prompt's last token looks is told under methods on attention and surgeries alone" in told[name]
    assert [name for name, _ in found.matrix.columns][:2] == ["verdict", "q.jsonl"]
    assert "Guessing scores 25%" in str(found)
    assert "q.jsonl: its log-probability is that of the box" in str(found)
    assert found.page(tmp_path / "page.html").stat().st_size > 100_000
    assert Comparison.load(found.save(tmp_path / "kept.jsonl")).records == found.records


def test_costs_are_those_without_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from heedful import looking
    from heedful.bench.cost import cost

    item = task_of(tmp_path).items(llava().tokenizer, 1)[0]
    monkeypatch.setattr(looking.Looks, "look", lambda *_: pytest.fail("it was read"))
    assert cost(llava().model, SHARP, "sharp", item, 1).prefill > 0


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="asks about pictures, and LlamaForCausalLM takes no pixels"):
        compare((models.tiny("llama"), SimpleNamespace()), [SHARP], [boxes(tmp_path)])
