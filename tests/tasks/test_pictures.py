"""Pictures in folders of classes: what is read, which class is which, the head of an encoder, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import accelerate
import cloudpickle
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipForImageClassification,
    ViTForMaskedImageModeling,
)
from typer.testing import CliRunner

from heedful import models
from heedful.bench.answer import answer
from heedful.bench.compare import compare
from heedful.bench.comparison import Comparison
from heedful.bench.records import Cost
from heedful.cli.app import app
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, RefusedModel
from heedful.methods import TempScale
from heedful.tasks import from_file
from heedful.tasks._pictures import OwnPictures
from heedful.tasks._ridge import Ridge
from heedful.text_models import features, text_model
from tests.tasks.beside import folders, image_reader, painted, vit

SHARP = TempScale(0.2)


def encoder() -> models.Loaded:
    return vit()._replace(model=vit().model.vit)


def test_folders_of_pictures_are_classes(tmp_path: Path) -> None:
    folders(tmp_path)
    painted(tmp_path / "lone.png", (0, 0, 0))
    (tmp_path / "red" / "broken.png").write_bytes(b"no picture")
    task = from_file(tmp_path)
    assert isinstance(task, OwnPictures)
    assert sorted((row.name, row.kind) for row in task.rows) == [
        (f"{kind}/{i}.png", kind) for kind in ("blue", "red") for i in range(4)
    ]
    assert task.left_out == (
        "lone.png: lies in no folder that names its class",
        "red/broken.png: is no image that can be read",
    )
    before = repr(task)
    painted(tmp_path / "red" / "0.png", (9, 9, 9))
    assert repr(from_file(tmp_path)) != before
    with pytest.raises(FieldError, match=": red: is the only folder with pictures, and there must be two or more"):
        from_file(_only(tmp_path, "red"))


def _only(home: Path, kind: str) -> Path:
    for file in home.rglob("*.png"):
        if file.parent.name != kind:
            file.unlink()
    return home


def test_a_classifier_is_asked_among_all_its_classes(tmp_path: Path) -> None:
    given = vit()
    task = from_file(folders(tmp_path)).on(given.model, given.tokenizer)
    assert task.available(given.tokenizer) == 8
    for item in task.items(given.tokenizer, 8):
        right = {"red": 0, "blue": 1}[str(item.labels["class"])]
        assert item.options == ((right,), (1 - right,))
        assert len(item.prompt) == 5  # a class token and four patches
        with text_model(given.model, None, item.shown) as speaker, torch.no_grad():
            sheet, logits = answer(speaker, item), given.model(**item.shown.inputs).logits[0]
        assert close_model(torch.stack([*sheet.options])[:, 0], logits.log_softmax(-1)[[right, 1 - right]])
        assert task.score(item, sheet) == float(int(logits.argmax()) == right)
        assert task.chance(item) == 1 / 2


def test_a_class_goes_by_any_of_its_names_or_its_number(tmp_path: Path) -> None:
    given = vit()
    for red, blue in (("RED", "Navy Blue"), ("0", "1"), ("red", "navy_blue, blue")):
        home = tmp_path / red
        painted(home / red / "a.png", (200, 0, 0))
        painted(home / blue / "a.png", (0, 0, 200))
        task = from_file(home).on(given.model, given.tokenizer)
        assert isinstance(task, OwnPictures)
        assert task.seeing is not None
        assert task.seeing.numbers == {red: 0, blue: 1}


def test_classes_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    given = vit()
    painted(folders(tmp_path) / "green" / "a.png", (0, 200, 0))
    with pytest.raises(FieldError, match="'green' names no class of ViTForImageClassification, whose classes are Red"):
        compare(given, [SHARP], [tmp_path])
    given.model.config.id2label = {0: "Red", 1: "navy-blue, blue", 2: "sky, blue", 3: "green"}
    with pytest.raises(FieldError, match="'blue' names more than one class"):
        compare(given, [SHARP], [tmp_path])


def test_an_encoder_gets_a_head_from_half_of_each_class(tmp_path: Path) -> None:
    given = encoder()
    painted(folders(tmp_path) / "green" / "a.png", (0, 200, 0))
    whole = from_file(tmp_path)
    task = whole.on(given.model, given.tokenizer)
    assert isinstance(task, OwnPictures)
    assert task.left_out == ("green: has one picture, and a head is fitted on one and asked about another",)
    assert task.available(given.tokenizer) == 4
    assert task.seeing is not None
    asked = {row.name for row in task.rows}
    fitted = sorted((row for row in whole.rows if row.name not in asked and row.kind != "green"), key=lambda r: r.name)  # type: ignore[attr-defined]
    assert [row.kind for row in fitted] == ["blue", "blue", "red", "red"]

    def known(name: str) -> Tensor:
        pixels = image_reader()(images=_picture(tmp_path / name), return_tensors="pt").pixel_values
        with torch.no_grad():
            states = given.model(pixel_values=pixels).last_hidden_state
        assert close(features(states)[0], torch.cat([states[0, 0], states[0].mean(0)]))
        return features(states)

    head = Ridge.fit(torch.cat([known(row.name) for row in fitted]), torch.tensor([0, 0, 1, 1]))
    for item in task.items(given.tokenizer, 4):
        with text_model(given.model, None, item.shown) as speaker:
            sheet = answer(speaker, item)
        seen = item.shown.inputs["pixel_values"]
        (name,) = [row.name for row in task.rows if torch.equal(task._pixels(row, given.tokenizer), seen)]
        (right,) = item.options[0]
        assert right == ["blue", "red"].index(str(item.labels["class"]))
        assert close_model(sheet.options[0], head(known(name)).log_softmax(-1)[0, [right]])
        assert task.score(item, sheet) == 1  # two colours are told apart


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_head_is_fitted_to_states_and_to_no_projection_of_them(tmp_path: Path) -> None:
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, image_size=8, patch_size=4, projection_dim=6))
    task = from_file(folders(tmp_path)).on(model, image_reader())
    (item,) = task.items(image_reader(), 1)
    with text_model(model, None, item.shown) as speaker, torch.no_grad():
        states = model(**item.shown.inputs).last_hidden_state
        assert item.shown.head is not None
        wanted = item.shown.head(features(states)).log_softmax(-1)[0]
        assert close_model(torch.cat(answer(speaker, item).options), wanted[[i for (i,) in item.options]])


def test_a_model_without_classes_and_states_is_refused(tmp_path: Path) -> None:
    model = ViTForMaskedImageModeling(vit().model.config)
    with pytest.raises(RefusedModel, match="ViTForMaskedImageModeling names no classes, and tells no states"):
        compare((model, image_reader()), [SHARP], [folders(tmp_path)])


def test_how_many_words_a_model_reads_says_nothing_of_pictures(tmp_path: Path) -> None:
    """Its patches are counted where they are read, and not where a text would end."""
    config = SiglipConfig(
        text_config={**SIZES, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**SIZES, "image_size": 8, "patch_size": 2},
        id2label={0: "red", 1: "blue"},
    )
    found = compare((SiglipForImageClassification(config), image_reader()), [SHARP], [folders(tmp_path)], turns=1)
    assert {r.prompts for r in found.results} == {8}
    costs = [r for r in found.records if isinstance(r, Cost)]
    assert {r.tokens for r in costs} == {16}
    assert {r.density for r in costs if r.contender.startswith("TempScale")} == {1.0}


def test_an_encoder_whose_weights_are_elsewhere_is_asked_like_a_whole_one(tmp_path: Path) -> None:
    given, where = encoder(), folders(tmp_path)
    whole = compare(given, [SHARP], [where], turns=0)
    apart = given._replace(model=accelerate.cpu_offload(given.model, torch.device("cpu")))
    found = compare(apart, [SHARP], [where], turns=0)
    assert [(r.score, r.nats) for r in found.results] == [(r.score, r.nats) for r in whole.results]


def _picture(path: Path) -> object:
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_pictures_that_are_parted_stay_so(tmp_path: Path) -> None:
    given = encoder()
    folders(tmp_path / "train")
    folders(tmp_path / "test", 2)
    painted(tmp_path / "test" / "green" / "a.png", (0, 200, 0))
    painted(tmp_path / "more" / "red" / "a.png", (200, 0, 0))
    whole = from_file(tmp_path)
    assert whole.left_out == ("more/red/a.png: is neither in 'train' nor in 'test'",)  # type: ignore[attr-defined]
    task = whole.on(given.model, given.tokenizer)
    assert {row.name for row in task.rows} == {f"test/{kind}/{i}.png" for kind in ("red", "blue") for i in (0, 1)}  # type: ignore[attr-defined]
    assert task.left_out[1:] == ("green: has no pictures in 'train' to fit a head on",)  # type: ignore[attr-defined]
    alone = vit()
    alone.model.config.id2label[2] = "green"
    assert from_file(tmp_path).on(alone.model, alone.tokenizer).available(None) == 5  # type: ignore[arg-type]


def test_a_head_wants_two_classes_to_be_fitted_on(tmp_path: Path) -> None:
    folders(tmp_path, 1)
    with pytest.raises(FieldError, match=r"a head needs two classes or more with pictures .*; blue: has one picture"):
        compare(encoder(), [SHARP], [tmp_path])


@pytest.mark.parametrize("apart", [0.8, 4.0])  # of which the second would let the head be ever surer of itself
def test_the_head_is_a_ridge_regression_that_others_fit(apart: float) -> None:
    """Scores that are left out are those of fits without the row, one by one; so are penalty and scale."""
    by = torch.Generator().manual_seed(0)
    kinds = torch.tensor([0, 1, 2] * 5)
    x = torch.randn(15, 6, generator=by) + apart * one_hot(kinds, 6)
    head, y = Ridge.fit(x, kinds), one_hot(kinds).double()

    def fit(rows: list[int], penalty: float) -> tuple[Tensor, Tensor, Tensor]:
        mean, shares = x[rows].double().mean(0), y[rows].mean(0)
        inner = x[rows].double() - mean
        return mean, shares, torch.linalg.solve(inner.T @ inner + penalty * torch.eye(6), inner.T @ (y[rows] - shares))

    spread = (x.double() - x.double().mean(0)).square().sum() / 6
    penalties = [float(10.0**e * spread) for e in torch.linspace(-6, 3, 19, dtype=torch.float64)]

    def others(penalty: float) -> Tensor:
        said = []
        for i in range(15):
            mean, shares, weight = fit([j for j in range(15) if j != i], penalty)
            said.append((x[i].double() - mean) @ weight + shares)
        return torch.stack(said)

    best = min(penalties, key=lambda p: float((others(p) - y).square().mean()))
    mean, shares, weight = fit(list(range(15)), best)
    assert close(head.weight, weight.float())
    assert close(head.bias, (shares - mean @ weight).float())
    scales = [float(10.0**e) for e in torch.linspace(-1, 2, 31, dtype=torch.float64)]
    losses = [float(cross_entropy(s * others(best), kinds, label_smoothing=1 / 17)) for s in scales]
    assert head.scale == pytest.approx(scales[losses.index(min(losses))])
    assert close(head(x), head.scale * (x @ head.weight + head.bias))


def test_a_head_of_pictures_that_are_all_alike_says_how_frequent_classes_are() -> None:
    for x in (torch.zeros(6, 4), torch.full((6, 4), 0.1)):
        head = Ridge.fit(x, torch.tensor([0, 0, 0, 0, 1, 2]))
        assert close(head.weight, torch.zeros(4, 3))
        assert close(head.bias, torch.tensor([4.0, 1.0, 1.0]) / 6)
        assert head(x).isfinite().all()


def test_names_are_read_in_any_spelling(tmp_path: Path) -> None:
    """Systems write one letter in several ways, and endings in capitals."""
    given = vit()
    given.model.config.id2label = {0: "Café", 1: "red"}
    painted(tmp_path / "Cafe\u0301" / "a b.PNG", (200, 0, 0))
    painted(tmp_path / "red" / "ж 1.Jpg", (0, 0, 200))
    task = from_file(tmp_path).on(given.model, given.tokenizer)
    assert sorted(item.options[0] for item in task.items(given.tokenizer, 2)) == [(0,), (1,)]


def test_it_is_compared(tmp_path: Path) -> None:
    given = encoder()
    methods = ["tome(count=1)", "pruneheads(groups=((0,0),(1,1)))", SHARP, "trimmedllama", "attentionsorting"]
    found = compare(given, methods, [folders(tmp_path / "pictures")], turns=1, batch=[1, 2], out=tmp_path / "out")
    results = {r.contender: r for r in found.results}
    assert set(results) == {"unedited", "ToMe(count=1)", "PruneHeads(groups=((0, 0), (1, 1)))", "TempScale(tau=0.2)"}
    assert all(r.active for name, r in results.items() if name != "unedited")
    assert len({r.nats for r in results.values()}) == 4
    told = " ".join(r.reason for r in found.refused)
    assert "it is for models of two halves, and these prompts are images" in told
    assert "rearranges the tokens of a text, and these prompts are images" in told
    costs = [r for r in found.records if isinstance(r, Cost)]
    assert {(r.tokens, r.step, r.cache) for r in costs} == {(5, None, 0)}
    assert {r.density for r in costs if r.contender.startswith("ToMe")} == {None}  # of fewer patches
    assert {r.density for r in costs if r.contender.startswith("TempScale")} == {1.0}
    assert [name for name, _ in found.matrix.columns] == ["verdict", "pictures", "prefill", "pairs"]
    figures = {figure.key: figure for figure in found.description().figures}
    assert "throughput" not in figures  # as no tokens follow
    table = figures["costs"]
    assert table.columns == ("method", "prefill, s", "prefill ×", "peak, MB", "pairs")  # type: ignore[attr-defined]
    assert {len(row) for row in table.rows} == {5}  # type: ignore[attr-defined]
    assert found.page(tmp_path / "page.html").stat().st_size > 100_000
    assert Comparison.load(found.save(tmp_path / "kept.jsonl")).records == found.records
    assert len(found.to_pandas()["costs"]) == 8


def test_the_command_line_reads_a_folder_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: vit())
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "pictures")
    asked = [
        "compare",
        "x",
        "--methods",
        "tempscale(0.2)",
        "--tasks",
        "pictures/",
        "--no-page",
        "--json",
        "--turns",
        "0",
    ]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert [about["name"] for about in found["facts"]["tasks"].values()] == ["pictures"]
    assert {r["prompts"] for r in found["results"]} == {8}


def test_models_that_do_not_see_are_refused_before_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path)
    model = models.tiny("llama")
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("the model ran"))
    with pytest.raises(RefusedModel, match="LlamaForCausalLM is not a model that reads a picture alone"):
        compare(models.Loaded(model, image_reader(), "x"), [SHARP], [tmp_path])
    with pytest.raises(FieldError, match=r"^compare\(\).*needs the model's image processor"):
        compare(vit()._replace(tokenizer=object()), [SHARP], [tmp_path])
    with pytest.raises(RefusedModel, match="ViTForImageClassification is no causal language model"):
        compare(vit(), [SHARP], ["induction"])
    with pytest.raises(FieldError, match=r"has no tokenizer or processor.*; for example model=\(model, tokenizer\)$"):
        compare(vit()._replace(tokenizer=None), [SHARP], [tmp_path])


def test_the_task_goes_to_other_processes(tmp_path: Path) -> None:
    given = encoder()
    task = from_file(folders(tmp_path)).on(given.model, given.tokenizer)
    (item,) = task.items(given.tokenizer, 1)
    again, other = pickle.loads(cloudpickle.dumps((task, item)))
    with text_model(given.model, None, item.shown) as speaker:
        assert answer(speaker, other).means == answer(speaker, item).means
    assert repr(again) == repr(task)


def test_items_want_a_model(tmp_path: Path) -> None:
    with pytest.raises(FieldError, match="makes items for one model alone"):
        from_file(folders(tmp_path)).items(image_reader(), 1)


def test_a_picture_that_has_gone_is_named(tmp_path: Path) -> None:
    given = vit()
    task = from_file(folders(tmp_path)).on(given.model, given.tokenizer)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"gone")
    with pytest.raises(FieldError, match=r"\.png': is no image that can be read: take it out"):
        task.items(given.tokenizer, 1)
