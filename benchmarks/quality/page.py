"""docs/quality.md: what methods do to answers, and explanations to what they explain, from the committed records."""

from __future__ import annotations

import json

from benchmarks.speed.timing import RECORDS, load
from heedful.bench.comparison import Comparison
from heedful.bench.describing import markdown
from heedful.bench.records import Cost

COMPARED = RECORDS / "compare.jsonl"
SEEN = {
    ground: RECORDS / f"compare_{ground}.jsonl"
    for ground in ("speech", "pictures", "asked", "boxes", "scenes", "erased")
}


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def tasks() -> list[str]:
    """Each task, its chance level, and what the unedited default model scores."""
    path = RECORDS / "tasks.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    out = [
        "## Tasks\n",
        f"What the unedited {found['model']} scores, over {max(r['items'] for r in found['tasks'].values())} prompts "
        "each, and what guessing scores. `heedful compare --tasks list` lists them.\n",
        _row("task", "what it asks", "tokens", "unit", "guessing", "unedited model"),
        "|---|---|---:|---|---:|---:|",
    ]
    for name, row in found["tasks"].items():
        chance = "" if row["chance"] is None else f"{row['chance']:.3g}"
        score = f"{row['score']:.3g} ± {row['error']:.2g}"
        out.append(_row(name, row["about"], row["tokens"], row["unit"], chance, score))
    return [*out, "", f"{found['hardware']}, {_versions(found['versions'])}.", ""]


def compared() -> list[str]:
    """The committed comparison."""
    if not COMPARED.exists():
        return []
    found = Comparison.load(COMPARED)
    return ["## Ten methods on three tasks\n", *markdown(found.description()), ""]


TITLES = {"speech": "Speech", "pictures": "Pictures", "asked": "Questions about pictures",
          "boxes": "Where it looks for the answer",
          "scenes": "Scenes that are drawn", "erased": "Things that are taken out"}  # fmt: skip
ABOUT = {
    "speech": "Whisper base writes down a reading of A Tale of Two Cities, cut at pauses; few clips decide little.",
    "pictures": "DINOv2-S/14 under a ridge head names scikit-learn's handwritten digits; eight of each fit the head.",
    "asked": "The small vision-language model of `claims/_sight.py` says which colour or shape is on which side.",
    "boxes": "The same model, asked the same: does it look most at the thing that it is asked about?",
    "scenes": "The small denoiser that comes along, a diffusion transformer whose cross-attention reads words, draws "
    "two things in ten steps; each is right where the nearest of all halves of pictures that can be shows its colour "
    "and shape. Of the same pictures `scene_words` asks whether the place that looks most at a thing's words is in its "
    "box. Real pictures that judge the judge carry what is unclean in drawn ones.",
    "erased": "The same denoiser, without words, begins with a picture of two things and much noise; what lies around "
    "the patches of one is put back after each step. Right is where nothing is left of it; `other` are the patches of "
    "the thing that stays.",
}


def seen() -> list[str]:
    """The committed comparisons on speech, pictures, questions about pictures, boxes in them, and what is drawn."""
    out = [
        "## Speech, pictures, questions about pictures, and scenes\n",
        "Times were taken beside other work, and tell little; answers do not depend on that.\n",
    ]
    for ground, path in SEEN.items():
        if path.exists():
            found = Comparison.load(path)
            hardware = next(record.machine for record in found.records if isinstance(record, Cost))
            by = f"{hardware}, {_versions(found.facts['versions'])}."
            out += [f"### {TITLES[ground]}\n", f"{ABOUT[ground]} {by}\n", *markdown(found.description()), ""]
    return out if len(out) > 2 else []


def kvpress() -> list[str]:
    """Our cache methods beside kvpress' at equal budget."""
    if not (measured := load("kvpress")):
        return []
    found = measured[-1]
    theirs = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    out = [
        "## Beside kvpress, at equal budget\n",
        f"{found['asked'].capitalize()}. {found['rows'][0]['prompts']} prompts a row; theirs ran in an environment of "
        f"its own ({theirs}). The gap is ours less theirs, paired.\n",
        _row(
            "task", "ours", "theirs", "share kept", "right, ours", "right, theirs", "nats, ours", "nats, theirs", "gap"
        ),
        "|---|---|---|" + "---:|" * 6,
    ]
    for row in found["rows"]:
        gap = row["gaps"]["nats"]
        out.append(
            _row(
                row["task"].partition("(")[0], row["method"], row["press"], f"{row['share']:.0%}",
                *(f"{row[side]['right']:.0%}" for side in ("ours", "kvpress")),
                *(f"{row[side]['nats']:.2f}" for side in ("ours", "kvpress")),
                f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]",
            )
        )  # fmt: skip
    return [*out, ""]


def faithfulness() -> list[str]:
    """Explanations against random order."""
    if not (measured := load("faithfulness")):
        return []
    found = measured[-1]
    out = [
        "## Explanations against random order\n",
        f"{found['rows'][0]['texts']} short texts. The most important tokens go first (deletion) or come first "
        f"(insertion), {found['removal']}; the gain is over {found['random_orders']} random orders, in area under the "
        "curve.\n",
        _row("model", "explanation", "in", "deletion", "texts where better", "insertion", "texts where better"),
        "|---|---|---|" + "---:|" * 4,
    ]
    for row in found["rows"]:
        told = []
        for way in ("deletion", "insertion"):
            low, high = row[way]["interval"]
            told += [f"{row[way]['gain']:+.3f} [{low:+.3f}, {high:+.3f}]", row[way]["better"]]
        out.append(_row(row["model"], row["explanation"], row["unit"], *told))
    return [*out, ""]


def conversions() -> list[str]:
    """Models that were taught another attention."""
    if not (measured := load("converting")):
        return []
    found = measured[-1]
    rows = found["rows"]
    out = [
        "## Three conversions\n",
        f"{found['model']} taught another attention by AttentionEditing, {rows[0]['texts']} {found['inputs']}, one "
        "pass in layers and one as a whole: a showing of the way, and far from what a conversion wants. Nats a token "
        f"on texts of other topics; time and memory at a prompt of {found['prompt']:,} tokens, as ratios to the "
        "teacher's measured in turn, lowest to highest in brackets, and bytes that the cache holds.\n",
        _row("target", "teacher", "swapped", "taught", "reading", "one more token", "cache", "cache, MB"),
        "|---|" + "---:|" * 7,
    ]
    for row in rows:
        ratios = row["price"]["ratios"]
        times = [f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in (ratios["prefill"], ratios["token"])]
        losses = [f"{row[name]:.3f}" for name in ("teacher", "before", "after")]
        cache = [f"{ratios['cache']['median']:.2f}", f"{row['price']['cache'] / 1e6:.1f}"]
        out.append(_row(row["about"], *losses, *times, *cache))
    return [*out, ""]


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def page() -> str:
    """The whole page."""
    head = [
        "# Quality\n",
        "What methods do to answers, measured on small models: a statement about these models and tasks, and no more. "
        "Differences are paired by prompt; all intervals of a comparison hold at once with 95 %.\n",
    ]
    return "\n".join([*head, *tasks(), *compared(), *seen(), *kvpress(), *conversions(), *faithfulness()])
