"""Whatever a verb or a value is handed, it answers with one plain error, or it does what it is for."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import heedful
from heedful import catalogue, explaining, models, nn, tasks
from heedful.core import asked, stats
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.kinds.tokens import Prompt
from heedful.core.spelling import spelled
from heedful.methods import ACT, PASTA, AttentionRollout, AttentionSorting, RetrievalHeads, SinkRate, SnapKV, TempScale
from heedful.models import Loaded

IDS = torch.arange(3, 23)
NAN = float("nan")


class Odd:
    """Nothing that anybody asks for."""


HOSTILE = [
    None, [], {}, (), "", "x", 300, -1, 1.5, NAN, True, Odd(), torch.ones(2), torch.zeros(0), b"x", [None], [[1]],
    [(0, 0), "x"], {"x": None}, ["", None], (1,), TempScale, torch.nn.Linear(2, 2), "a\0b", Path("a\0b"), 10**30,
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Callable[..., Any], dict[str, Any], str]]:
    """By name: a verb, arguments that suit it, and those that any value is tried for."""
    home, model = tmp_path_factory.mktemp("hostile"), models.tiny("llama").eval()
    prompt = Prompt(tuple(IDS.tolist()))
    with heedful.attach(model, SinkRate()) as run:
        run(input_ids=IDS[None])
    run.save(home / "statistics")
    profile = heedful.diagnose(model, IDS, measures=[SinkRate()])
    lens, patterns = explaining.logit_lens(model, IDS), heedful.patterns(model, IDS)
    clean, corrupt = IDS[None, :6], IDS[None, 6:12]
    effects = explaining.patching(model, clean, corrupt, lambda logits: logits[:, -1, 5], layers=[0])
    direct = explaining.direct_logits(model, IDS)
    pieces = IDS.view(4, 5)
    best, worst = (pick(model(input_ids=pieces).logits[:, -1], -1) for pick in (torch.argmax, torch.argmin))
    ability = explaining.Ability("a", pieces, pieces.flip(1), best, worst)
    faithful = explaining.faithfulness(model, IDS[:6], torch.rand(6), steps=2, seeds=1)
    return {
        "attach": (heedful.attach, {"model": model, "what": TempScale(0.5)}, "model what only backend roles tile_rows"),
        "attached": (heedful.attached, {"model": model}, "model"),
        "fit": (
            heedful.fit, {"method": TempScale(0.5), "model": model, "batches": []},
            "method model batches only out progress",
        ),
        "fold": (partial(heedful.fold, model), {}, "what"),
        "operate": (partial(heedful.operate, model), {}, "what"),
        "arrange": (heedful.arrange, {"model": model, "prompt": prompt, "step": None}, "model prompt step"),
        "load": (heedful.load, {"folder": home}, "folder kind backend roles"),
        "decode": (heedful.decode, {"model": model, "prompt": prompt, "step": None}, "model prompt step"),
        "diagnose": (
            heedful.diagnose, {"model": model, "texts": IDS, "measures": [SinkRate()]},
            "model texts tokenizer measures length batch out workers only backend tile_rows",
        ),
        "compare": (
            heedful.compare, {"model": Loaded(model, str, ""), "methods": [], "tasks": ["nothing of that name"]},
            "model methods tasks prompts minutes margin turns only backend",
        ),
        "check": (heedful.check, {"method": AttentionSorting, "only": ("is_documented",)}, "method only"),
        "edit": (heedful.edit, {"site": None, "function": abs}, "site function"),
        "explain": (heedful.explain, {"what": TempScale(0.5)}, "what softcap sink"),
        "patterns": (heedful.patterns, {"model": model, "text": IDS}, "text heads stack only backend"),
        "ablate": (heedful.ablate, {"model": model, "heads": [(0, 1)]}, "model heads mean only"),
        "head_importance": (
            explaining.head_importance, {"model": model, "batches": [{"input_ids": clean}]}, "model batches mean only",
        ),
        "HeadImportance.top": (
            explaining.HeadImportance(*[torch.rand(2, 2)] * 2, None).top, {"count": 1}, "count",
        ),
        "attribute": (
            explaining.attribute, {"model": model, "prompt": IDS[:6], "method": AttentionRollout()},
            "model prompt method target position only",
        ),
        "logit_lens": (explaining.logit_lens, {"model": model, "text": IDS}, "model text"),
        "activations": (
            explaining.activations, {"model": model, "text": IDS, "site": heedful.Site.OUTPUT},
            "text site layers stack only backend",  # as for patterns: plain torch says itself what it takes
        ),
        "direct_logits": (
            explaining.direct_logits, {"model": model, "text": IDS}, "model text answer instead position"
        ),
        "faithfulness": (
            explaining.faithfulness, {"model": model, "prompt": IDS[:6], "scores": torch.rand(6), "seeds": 1},
            "model prompt scores target position removal",
        ),
        "patching": (
            explaining.patching, {"model": model, "clean": clean, "corrupt": corrupt, "metric": lambda x: x[:, -1, 5]},
            "model clean corrupt positions layers estimate",
        ),
        "path_patching": (
            explaining.path_patching,
            {"model": model, "clean": clean, "corrupt": corrupt, "metric": lambda x: x[:, -1, 5], "layers": [0]},
            "model clean corrupt receivers side layers",
        ),
        "likeness": (
            explaining.likeness, {"model": model, "other": model, "batches": [{"input_ids": clean}]},
            "model other batches only",
        ),
        "weight_gradients": (
            explaining.weight_gradients, {"model": model, "batches": [{"input_ids": clean}]}, "model batches only",
        ),
        "dissociate": (
            explaining.dissociate, {"model": model, "one": ability, "other": ability, "count": 1, "draws": 1},
            "model one other count draws",
        ),
        "Ability": (
            explaining.Ability,
            {"name": "a", "clean": IDS[:6].view(2, 3), "corrupt": IDS[:6].view(2, 3), "right": IDS[:2],
             "wrong": IDS[:2]},
            "name clean corrupt right wrong",
        ),
        "spans": (explaining.spans, {"model": model, "text": IDS}, "text layer longest"),
        "ReAGent": (explaining.ReAGent, {}, "replaced kept within runs steps among seed"),
        "Likeness.best": (explaining.Likeness(*[torch.zeros(2, 2)] * 3).best, {"level": "heads"}, "level"),
        "inflection": (
            explaining.inflection, {"model": model, "batches": [{"input_ids": clean}]}, "model batches only",
        ),
        "Inflection.top": (
            explaining.Inflection(torch.rand(2), torch.rand(3), torch.rand(2), 1.0).top, {"count": 1}, "count",
        ),
        "linearity": (
            explaining.linearity, {"model": model, "batches": [{"input_ids": clean}]}, "model batches only",
        ),
        "depth_use": (
            explaining.depth_use, {"model": model, "batches": [{"input_ids": clean, "labels": clean}]},
            "model batches only",
        ),
        "word_maps": (explaining.word_maps, {"pipe": model, "prompts": "a cube"}, "pipe prompts steps seed"),
        "trace": (
            explaining.trace, {"model": model, "clean": clean[0], "corrupt": corrupt[0], "answer": 5},
            "model clean corrupt answer instead what heads",
        ),
        "nn.convert": (nn.convert, {"model": torch.nn.MultiheadAttention(8, 2)}, "model method"),
        "models.load": (models.load, {}, "name_or_path"),
        "models.tiny": (models.tiny, {}, "kind"),
        "catalogue.find": (catalogue.find, {}, "name"),
        "catalogue.search": (catalogue.search, {}, "word"),
        "tasks.find": (tasks.find, {}, "text"),
        "Stack": (heedful.Stack, {}, "parts"),
        "Prompt": (Prompt, {"tokens": (1, 2)}, "tokens roles"),
        "Removal": (explaining.Removal, {}, "keep token"),
        "on": (TempScale(0.5).on, {}, "layers heads"),
        "when": (TempScale(0.5).when, {}, "phase"),
        "|": (TempScale(0.5).__or__, {}, "other"),
        "Run[]": (run.__getitem__, {}, "part"),
        "Run.save": (run.save, {}, "path"),
        "Run.merge": (run.merge, {}, "path"),
        "Run.load_state_dict": (run.load_state_dict, {}, "state"),
        "Profile.answer": (profile.answer, {}, "part"),
        "Profile.save": (profile.save, {}, "folder"),
        "Profile.load": (heedful.Profile.load, {}, "folder"),
        "Profile.page": (profile.page, {}, "path"),
        "Profile.+": (profile.__add__, {}, "other"),
        "Profile.-": (profile.__sub__, {}, "other"),
        "Comparison.load": (heedful.Comparison.load, {}, "path"),
        "Lens.words": (lens.words, {}, "position"),
        "DirectLogits.top": (direct.top, {}, "count"),
        "Patterns[]": (patterns.__getitem__, {}, "place"),
        "Patterns.figure": (patterns.figure, {"layer": 0, "head": 0}, "layer head"),
        "Patterns.page": (patterns.page, {}, "path"),
        "HeadEffects.top": (effects.top, {}, "count"),
        "HeadEffects.overlap": (effects.overlap, {"other": effects, "count": 1}, "other count"),
        "Faithfulness.area": (faithful.area, {}, "curve"),
        "stats.load": (stats.load, {}, "path"),
        "stats.save": (stats.save, {"path": home / "more", "statistics": {}}, "path statistics"),
    }  # fmt: skip


VERBS = [
    "attach", "attached", "fit", "fold", "operate", "arrange", "load", "decode", "diagnose", "compare", "check", "edit",
    "explain", "patterns", "ablate", "head_importance", "HeadImportance.top", "attribute", "logit_lens", "activations",
    "direct_logits", "faithfulness", "patching",
    "path_patching", "likeness", "weight_gradients", "dissociate", "Ability", "spans", "ReAGent", "Likeness.best",
    "inflection", "Inflection.top", "linearity", "depth_use", "word_maps", "trace", "nn.convert", "models.load",
    "models.tiny",
    "catalogue.find", "catalogue.search", "tasks.find", "Stack", "Prompt", "Removal", "on", "when", "|", "Run[]",
    "Run.save", "Run.merge", "Run.load_state_dict", "Profile.answer", "Profile.save", "Profile.load", "Profile.page",
    "Profile.+", "Profile.-", "Comparison.load", "Lens.words", "DirectLogits.top", "Patterns[]", "Patterns.figure",
    "Patterns.page", "HeadEffects.top", "HeadEffects.overlap", "Faithfulness.area", "stats.load", "stats.save",
]  # fmt: skip


def refusal(act: Callable[..., Any], suits: dict[str, Any], name: str, value: Any) -> str:
    """What heedful says of one value in the place of a good one, if anything."""
    try:
        found = act(**{**suits, name: value}) if suits or name not in ("what", "path") else act(value)
    except HeedfulError as error:
        return str(error)
    if isinstance(found, heedful.Run):
        found.close()
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_says_what_is_wrong(found: Any, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    act, suits, names = found[verb]
    told = [refusal(act, suits, name, value) for name in names.split() for value in HOSTILE]
    assert sum(map(bool, told)) > len(HOSTILE) // 3
    assert not any(" at 0x" in message for message in told)


def test_the_table_has_every_verb(found: Any) -> None:
    assert list(found) == VERBS
    public = [getattr(home, name) for home in (heedful, explaining, nn) for name in home.__all__]
    tried = {inspect.unwrap(getattr(act, "func", act)) for act, _, _ in found.values()}
    missing = [f.__name__ for f in public if inspect.isfunction(f) and inspect.unwrap(f) not in tried]
    assert sorted(missing) == ["agreement", "lab"]  # tried in tests of their own


@pytest.mark.parametrize("name", sorted(catalogue.entries()))
def test_a_method_takes_what_its_fields_say(name: str) -> None:
    kind = catalogue.entries()[name]
    for field in dataclasses.fields(kind):
        for value in HOSTILE:
            assert " at 0x" not in refusal(kind, {}, field.name, value)


@pytest.mark.parametrize("kind", tasks.known().values(), ids=lambda kind: kind.__name__)
def test_a_task_takes_what_its_fields_say(kind: Any) -> None:
    for field in dataclasses.fields(kind):
        with pytest.raises(FieldError, match=rf"{kind.__name__}\.{field.name} = an? Odd: must be .*; for example"):
            kind(**{field.name: Odd()})


def test_every_annotation_of_a_verb_is_asked_for() -> None:
    """None names what is there for type checkers alone."""
    for home in (heedful, explaining):
        for name in home.__all__:
            function = inspect.unwrap(getattr(home, name)) if inspect.isfunction(getattr(home, name)) else None
            if function is not None:
                told = inspect.signature(function).parameters.values()
                named = {x.name for x in told if x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL)}
                assert set(asked._hints_of(function)) == named, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heedful.load(None), r"load\(\)\.folder = None: must be str or Path; for example folder='kept'"),
        (lambda: TempScale(NAN), r"TempScale\.tau = nan: must be a number; for example tau=0\.9"),
        (lambda: TempScale(10**400), r"TempScale\.tau = 1000+: must be above 0 and finite; for example tau=0\.9"),
        (lambda: TempScale(True), r"TempScale\.tau = True: must be a number"),
        (lambda: heedful.attach(models.tiny("llama"), TempScale(0.5), roles={"x": None}), r"example roles=\{'marked'"),
        (lambda: heedful.check(TempScale, only=("any_tiles",)), r"is no law\. Did you mean any_tile\?"),
        (
            lambda: heedful.fit(TempScale(0.5), models.tiny("llama"), {"input_ids": torch.ones(1, 4)}),  # type: ignore[arg-type]
            r"batches = .*: must be a list of batches, each a dict of the model's inputs; for example batches=\[",
        ),
        (
            lambda: heedful.fit(TempScale(0.5).on(layers=0), models.tiny("llama"), []),  # type: ignore[arg-type]
            r"fit\(\)\.method = .*: must be a method \(without \.on\(\) or \.when\(\)\)",
        ),
        (lambda: heedful.check(TempScale, only="any_tiles"), r"is no law\. Did you mean any_tile\?"),
        (
            lambda: heedful.compare(models.tiny("llama"), ["act"], ["recall"]),
            r"gives or a pair \(model, tokenizer\); for",
        ),
        (
            lambda: explaining.activations(models.tiny("llama"), IDS, heedful.Site.OUTPUT, layers=-1),
            r"activations\(Site\.OUTPUT\)\.on\(\)\.layers = -1: must be one or more numbers from 0 up",
        ),
        (
            lambda: explaining.patching(models.tiny("llama"), [], IDS[None], lambda logits: logits[:, -1, 5]),
            r"patching\(\)\.clean = \[\]: must be one text",
        ),
        (
            lambda: heedful.ablate(models.tiny("llama"), {3: [1]}),
            r"heads = \{3: \[1\]\}: must be pairs of layer and head",
        ),
        (
            lambda: nn.convert(3),
            r"convert\(\)\.model = 3: must be a model \(torch\.nn\.Module\); for example model=models\.default",
        ),
        (lambda: heedful.decode(models.tiny("llama"), [1, 2], None), r"for example prompt=Prompt\(\(1, 2, 3\)\)"),
        (lambda: Prompt((1, 2.5)), r"Prompt\.tokens = .*: must be tuple\[int, \.\.\.\]"),
    ],
)
def test_errors_name_field_value_rule_and_a_good_value(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        call()


def test_kinds_are_taken_as_python_takes_them() -> None:
    @asked.asks
    def verb(many: tuple[int, ...] | None = None, share: float = 0.5, layers: Any = None, *, name: str = "a") -> str:
        return f"{many} {share} {layers} {name}"

    class Whole:
        def __index__(self) -> int:
            return 3

        def more(self, count: int) -> None: ...

    assert verb((1, Whole()), 1).startswith("(1, ")  # type: ignore[arg-type]
    assert verb(None, share=float("inf"), layers=Odd) == f"None inf {Odd} a"
    with pytest.raises(TypeError, match=r"verb\(\)\.nmae = 'b': no such argument. Did you mean name\? It has many, "):
        verb(nmae="b")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"verb\(\) takes from 0 to 3 positional arguments but 4 were given"):
        verb(None, 0.5, None, "b")  # type: ignore[misc]
    with pytest.raises(FieldError, match=r"verb\(\)\.name = 3: must be str; for example name='a'"):
        verb(name=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 2 required positional arguments"):
        heedful.patterns(backend="tiled")  # type: ignore[call-arg]
    for wrong in (
        lambda: asked.asks(Whole.more)(Whole(), cuont=1),  # type: ignore[call-arg]
        lambda: TempScale(tua=0.5),  # type: ignore[call-arg]
    ):
        with pytest.raises(
            TypeError, match=r"(argument\. Did you mean count\?|field\. Did you mean tau\?) It has (count|tau)"
        ):
            wrong()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (lambda: RetrievalHeads(depths=[0.1, 0.5]), RetrievalHeads(depths=(0.1, 0.5))),
        (lambda: AttentionRollout(sources=range(2)), AttentionRollout(sources=(0, 1))),
        (lambda: PASTA(heads=[[0, 1], (1, 0)]), PASTA(heads=((0, 1), (1, 0)))),
        (lambda: Prompt([1, 2, 3]), Prompt((1, 2, 3))),
        (lambda: TempScale(1), TempScale(1.0)),
        (lambda: TempScale(np.float32(0.5)), TempScale(0.5)),
        (lambda: RetrievalHeads(depths=(0, 1)), RetrievalHeads(depths=(0.0, 1.0))),
        (lambda: SnapKV(np.int64(64)), SnapKV(64)),
        (lambda: AttentionRollout(sources=(np.int64(1),)), AttentionRollout(sources=(1,))),
        (lambda: ACT(ratio=1), ACT(ratio=1.0)),
    ],
)
def test_a_value_has_what_its_fields_ask_for(given: Callable[[], Any], meant: Any) -> None:
    """Tuples for lists, however they are nested, so that it stays frozen; plain numbers of the kind that is named."""
    found = given()
    assert found == meant
    assert repr(found) == repr(meant)
    assert hash(found) == hash(meant)
    if not isinstance(found, Prompt):
        assert json.dumps(spelled(found)) == json.dumps(spelled(meant))


def test_what_is_handed_in_stays_its_owners() -> None:
    depths = [0.1, 0.5]
    measure = RetrievalHeads(depths=depths)
    depths.append(0.9)
    assert measure.depths == (0.1, 0.5)


def test_a_list_of_the_wrong_kind_is_refused_as_it_was_given() -> None:
    with pytest.raises(FieldError, match=r"RetrievalHeads\.depths = \['deep'\]: must be tuple\[float, \.\.\.\]"):
        RetrievalHeads(depths=["deep"])
    with pytest.raises(FieldError, match=r"PASTA\.heads = \[\[0, 1, 2\]\]: must be"):
        PASTA(heads=[[0, 1, 2]])
