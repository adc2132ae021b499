"""What each word of a prompt is for a picture: where it is looked at, at which step, in which layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heedful.api import attach
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.errors import FieldError, ModelError, StatisticError
from heedful.core.figures import Description, Figure, Finding, Grid, Lit, percent
from heedful.core.kinds.weights import Measure
from heedful.core.ranges import PositiveInt
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat
from heedful.looking import WordPlaces, WordShares, grid, one_size

if TYPE_CHECKING:
    from heedful.report.pictures import Plots

PARTS = ("transformer", "unet")  # what pipelines call the model that takes the noise away
OWN = {  # options that are not the caller's
    "prompt", "num_inference_steps", "generator", "output_type", "num_images_per_prompt", "return_dict",
}  # fmt: skip
READ_BY = {"FluxTransformer2DModel": "tokenizer_2", "HiDreamImageTransformer2DModel": "tokenizer_3"}  # not the first
START, END = "(start)", "(end)"  # a tokenizer's marks around the prompt
REST = "(rest)"  # keys behind the prompt's own, such as padding or what another encoder reads
MARKS = {START, END, REST}


class _Times(WordShares):
    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Cat:
        return Cat.of(f"{call.forward:06d}", self.shares(weights, call).mean(0))


@dataclass(frozen=True, eq=False, repr=False)
class WordMap:
    """One prompt's words in the picture that was made of it; shares are of the attention that goes to all words."""

    prompt: str
    words: list[str]
    picture: Tensor  # [3 rows columns], from 0 to 1
    maps: Tensor  # [words rows columns]: the mean over layers, heads and steps
    steps: Tensor  # [steps words]: the mean over places, heads and layers
    layers: Tensor  # [layers words]: the mean over places, heads and steps
    names: list[str]  # of the layers

    def __getitem__(self, word: str | int) -> Tensor:
        """The map of a word, by its place or as it is written; of several alike the first."""
        if isinstance(word, str) and word in self.words:
            return self.maps[self.words.index(word)]
        if isinstance(word, int) and -len(self.words) <= word < len(self.words):
            return self.maps[word]
        raise FieldError("WordMap", "[word]", word, f"must be one of {self.words}, or its place", self.words[0])

    @property
    def lit(self) -> Lit:
        what = "From the first word to the last; shares are of the whole picture's attention."
        pairs = enumerate(zip(self.words, self.maps, strict=True))
        named = {f"{i}. {word}: {percent(float(x.mean()))}": x for i, (word, x) in pairs}
        return Lit("lit", f"“{self.prompt}”", what, self.picture, named)

    @property
    def figures(self) -> tuple[Figure, ...]:
        """The picture word by word, and each word's share by step and by layer."""
        columns = [f"{i}. {word}" for i, word in enumerate(self.words)]
        steps = [str(i) for i in range(len(self.steps))]
        return (
            self.lit,
            Grid("steps", "By step", "The share of the picture's attention that each word gets, step by step.",
                 self.steps, steps, columns, "step", "word", "share"),
            Grid("layers", "By layer", "The same by layer, from the first to the last.",
                 self.layers, _told_apart(self.names), columns, "layer", "word", "share"),
        )  # fmt: skip

    @property
    def plot(self) -> Plots:
        """A plot for each figure: `found[0].plot.lit()`."""
        from heedful.report.pictures import Plots

        return Plots(self.figures)

    def findings(self) -> Iterator[Finding]:
        """Which word gets most, and which one is looked at from the fewest places."""
        shares = self.maps.mean((1, 2))
        own = [i for i, word in enumerate(self.words) if word not in MARKS]
        if not own:
            return
        most = max(own, key=lambda i: float(shares[i]))
        rest = percent(float(1 - shares[own].sum()))
        around = "" if len(own) == len(shares) else f"; {rest} go to what is around them"
        share = percent(float(shares[most]))
        text = f"Of the words in “{self.prompt}”, “{self.words[most]}” gets most, {share}{around}."
        yield Finding(text, 0.5)
        even = self.maps.flatten(1) / self.maps.flatten(1).sum(1, keepdim=True).clamp(min=1e-12)
        spread = torch.special.entr(even).sum(1)
        narrow = min(own, key=lambda i: float(spread[i]))
        rows, columns = self.maps.shape[1:]
        row, column = divmod(int(self.maps[narrow].argmax()), columns)
        text = (
            f"“{self.words[narrow]}” is looked at from the fewest places, most from row {row + 1} of {rows}, column "
            f"{column + 1} of {columns}."
        )
        yield Finding(text, 0.4)


@dataclass(frozen=True, eq=False, repr=False)
class WordMaps(Sequence[WordMap]):
    """The words of some prompts, each prompt in its picture; a notebook shows them, `page` writes them down."""

    each: tuple[WordMap, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    view: None = None

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, place: Any) -> Any:
        return self.each[place]

    def description(self) -> list[tuple[Measure, Description]]:
        """What a page shows: figures of all prompts, each with a key of its own."""
        figures = [
            replace(figure, key=f"{figure.key}_{n}", title=titled(found, figure), folded=n > 0)
            for n, found in enumerate(self.each)
            for figure in found.figures
        ]
        return [(WordShares(), Description(tuple(figures)))]

    def findings(self) -> list[Finding]:
        return [finding for found in self.each for finding in found.findings()]

    @asks
    def page(self, path: str | Path) -> Path:
        """Write the page: one HTML file that needs nothing else."""
        from heedful.report import page

        return page.write(self, Path(path))

    def __repr__(self) -> str:
        return "\n".join(finding.text for finding in self.findings())

    def _repr_html_(self) -> str:
        from heedful.report.lit import strip

        return "".join(strip(found.lit) for found in self.each)


def _told_apart(names: list[str]) -> list[str]:
    """Names of layers without what all of them end with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(x) > shared + 1 for x in parts) and len({x[-1 - shared] for x in parts}) == 1:
        shared += 1
    return [".".join(x[: len(x) - shared]) for x in parts]


def titled(found: WordMap, figure: Figure) -> str:
    return figure.title if isinstance(figure, Lit) else f"{figure.title}: “{found.prompt}”"


@asks
def word_maps(
    pipe: Any, prompts: str | Sequence[str], *, steps: PositiveInt = 20, seed: int = 0, **options: Any
) -> WordMaps:
    """What a text-to-image pipeline of diffusers looks at for each word while it makes a picture of each prompt.

    `options` go to the pipeline. Maps of one layer's attention are held at a time. Left out are layers that attend to
    no words, and those in which nothing tells words from picture, as in Flux's single blocks. Of a guided batch the
    last row is read, which the text guides in most pipelines; where a pipeline calls its model once with the text and
    once without, as CogView4's does, the mean of both is told.
    """
    part = next((found for name in PARTS if isinstance(found := getattr(pipe, name, None), nn.Module)), None)
    if part is None or not callable(pipe):
        rule = f"must be a pipeline of diffusers, with a {' or a '.join(PARTS)}"
        raise FieldError("word_maps()", "pipe", type(pipe).__name__, rule, "DiffusionPipeline.from_pretrained(...)")
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given or not all(isinstance(prompt, str) and prompt.strip() for prompt in given):
        raise FieldError("word_maps()", "prompts", prompts, "must be a prompt or several, none empty", "a red cube")
    if taken := sorted(OWN & options.keys()):
        rule = "are set here, where one picture is made of each prompt: leave them out"
        raise FieldError("word_maps()", "options", taken, rule, ["guidance_scale"])
    found = tuple(_one(pipe, part, prompt, steps, seed, options) for prompt in given)
    size = found[0].picture.shape
    facts = {
        "model": Path(getattr(getattr(pipe, "config", None), "_name_or_path", "")).name or type(pipe).__name__,
        "kind": type(part).__name__,
        "prompts": len(found),
        "steps": steps,
        "seed": seed,
        "picture": f"{size[2]} x {size[1]}",
    }
    return WordMaps(found, facts)


def _one(pipe: Any, part: nn.Module, prompt: str, steps: int, seed: int, options: Mapping[str, Any]) -> WordMap:
    places, times = WordPlaces(), _Times()
    draw = torch.Generator().manual_seed(seed)
    with attach(part, places | times, backend="reference") as run:
        made = pipe(prompt, num_inference_steps=steps, generator=draw, output_type="np", **options)
        try:
            where, when, names = run[places], run[times], run.layer_names
        except StatisticError as none:
            rule = "attends to no words: no layer has cross-attention, nor joint attention whose halves are known"
            raise ModelError(f"word_maps(): {type(part).__name__} {rule}") from none
    if getattr(made, "images", None) is None:
        raise ModelError(f"word_maps(): {type(pipe).__name__} makes no pictures but {type(made).__name__}")
    picture = torch.as_tensor(made.images[0]).float().permute(2, 0, 1)
    words = _words(pipe, prompt, max(stat.total.shape[1] for stat in where.values()))
    maps, by_layer, by_step = [], [], []
    for layer, stat in where.items():
        every = torch.stack([piece for _, piece in sorted(when[layer].pieces.items())]).float()  # [forwards k]
        forwards = len(every)
        maps.append(grid((stat.total / forwards).float(), picture.shape[1] / picture.shape[2], names[layer]))
        by_layer.append(every.mean(0))
        by_step.append(every.unflatten(0, (steps, -1)).mean(1) if forwards % steps == 0 else every)
    whole = (one_size(maps), torch.stack(by_step).mean(0), torch.stack(by_layer))
    told = [_joined(x, len(words), axis) for x, axis in zip(whole, (0, 1, 1), strict=True)]
    if not all(bool(x.isfinite().all()) for x in told):
        raise ModelError(f"word_maps(): attention of {type(part).__name__} is not finite. Take bfloat16 or float32")
    share, step, depth = told
    if words[-1] == REST and not share[-1].any():  # padding that a mask hides
        words, share, step, depth = words[:-1], share[:-1], step[:, :-1], depth[:, :-1]
    return WordMap(prompt, words, picture, share, step, depth, [names[layer] for layer in where])


def _words(pipe: Any, prompt: str, keys: int) -> list[str]:
    """What the keys are: the prompt's tokens as the tokenizer whose come first has them, and one word for the rest."""
    tokenizer = getattr(pipe, READ_BY.get(type(getattr(pipe, "transformer", None)).__name__, "tokenizer"), None)
    if tokenizer is None:
        return [str(n) for n in range(keys)]
    ids = tokenizer(prompt, truncation=True, max_length=min(keys, tokenizer.model_max_length)).input_ids
    marks = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "sep", "eos", "pad")}
    first = next((n for n, i in enumerate(ids) if i not in marks), len(ids))
    words = [
        (START if n < first else END) if i in marks else tokenizer.decode([i]).strip() or "(space)"
        for n, i in enumerate(ids)
    ]
    return words if len(words) == keys else [*words, REST]


def _joined(x: Tensor, words: int, axis: int) -> Tensor:
    """Shares of keys as those of words: what is behind the prompt's own is one."""
    if x.shape[axis] == words:
        return x
    own, rest = x.split([words - 1, x.shape[axis] - words + 1], axis)
    return torch.cat([own, rest.sum(axis, keepdim=True)], axis)
