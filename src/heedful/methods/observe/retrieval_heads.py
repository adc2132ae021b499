"""Share of the needle's tokens for which argmax_j A_ij is the needle token that comes next after i."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from heedful.core.call import Call, Phase
from heedful.core.entry import Probe, Readings
from heedful.core.errors import FieldError
from heedful.core.figures import Description, Finding, Head, HeadMap, Role, head_name, percent
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, Share, ShareBelowOne
from heedful.core.stats import Statistic
from heedful.core.summary import Summary, sums
from heedful.kit.pointing import pointing


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How often each head points at the needle token that comes next."""

    score: dict[int, Tensor] = field(repr=False)  # by layer [h]; nan where no answer was read

    @property
    def map(self) -> Tensor:
        """All heads, `[layers h]`."""
        return pad_sequence(list(self.score.values()), True, float("nan"))

    def heads(self, above: float) -> dict[Head, float]:
        """The heads whose score lies above that, the highest first."""
        found = {(n, h): x for n, row in self.score.items() for h, x in enumerate(row.tolist()) if x > above}
        return dict(sorted(found.items(), key=lambda head: -head[1]))

    def __str__(self) -> str:
        return ", ".join(f"{head_name(*head)}: {x:.0%}" for head, x in list(self.heads(0.0).items())[:8]) or "none"


class RetrievalHeads(Method):
    """Which heads fetch a needle from far back: they point at each of its tokens as the answer repeats it.

    It reads texts with spans "needle" and "answer", the second repeating the first; `heedful.diagnose` reads its own.
    """

    paper = Paper(
        "P141",
        "Retrieval Head Mechanistically Explains Long-Context Factuality",
        "Wenhao Wu, Yizhong Wang, Guangxuan Xiao, Hao Peng, Yao Fu",
        2025,
        "2404.15574",
        "ICLR 2025",
        differs=(
            "The answer is given token by token; the authors let the model write it and count only right ones.",
            "Needle, its cue and what lies around are random tokens in short prompts; the authors hide sentences in "
            "essays of up to 50k tokens and ask for them.",
            "A head must point at the needle token that stands where the next one of the answer does; without repeated "
            "tokens in the needle that is the authors' rule.",
        ),
    )
    size: PositiveInt = 16  # tokens of the needle
    cue: PositiveInt = 4  # tokens that stand before the needle and come again before the answer
    length: int = 128  # tokens of a prompt; the paper's 1000 to 50k
    # where the needle stands, 0 first; the paper's ten
    depths: Annotated[tuple[Share, ...], MinLen(1)] = (0.1, 0.5, 0.9)
    texts: PositiveInt = 1  # prompts a depth
    together: bool = False  # the needles of all depths in one prompt, where they fit; its answers follow one another
    seed: int = 0
    threshold: ShareBelowOne = 0.1  # score above which a head is a retrieval head; the paper's

    def __post_init__(self) -> None:
        if self.length < (least := 2 * (self.size + self.cue)):
            rule = f"must be {least} or more, to hold the needle with its cue twice"
            raise FieldError(self, "length", self.length, rule, max(least, 128))

    def probes(self, vocabulary: Tensor, length: int) -> Iterable[Probe]:
        length, block = min(self.length, length), self.cue + self.size
        several = len(self.depths) if self.together and length >= 2 * len(self.depths) * block else 1
        needed = several * block  # by the needles of a prompt with their cues, and again by its answers
        if length < 2 * needed or len(vocabulary) < needed:
            return
        prompts = [tuple(sorted(self.depths))] if several > 1 else [(depth,) for depth in self.depths]
        draw = torch.Generator().manual_seed(self.seed)
        shape = len(prompts) * self.texts, length
        rows, roles = vocabulary[torch.randint(len(vocabulary), shape, generator=draw)], []
        for row, depths in zip(rows, (depths for depths in prompts for _ in range(self.texts)), strict=True):
            starts = [round(depth * (length - 2 * needed)) + n * block for n, depth in enumerate(depths)]
            told = range(length - needed, length, block)  # where each comes again
            fresh = vocabulary[torch.randperm(len(vocabulary), generator=draw)[:needed]].split(block)
            for needle, *places in zip(fresh, starts, told, strict=True):
                for at in places:
                    row[at : at + block] = needle
            spans = {"needle": starts, "answer": told}
            roles.append({name: tuple((at + self.cue, at + block) for at in x) for name, x in spans.items()})
        yield Probe(rows, roles)

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE or call.cross or not {"needle", "answer"} <= call.roles.keys()

    @sums("place")
    def point(self, pattern: Summary, call: Call) -> Statistic | None:
        return pointing(pattern, call)

    def answer(self, readings: Readings) -> Retrieval:
        return Retrieval({layer: stat.value for layer, stat in readings.items()})

    def describe(self, answer: Retrieval) -> Description:
        values, heads = answer.map, answer.heads(self.threshold)
        what = "How often each head looks most at the token of a hidden needle that comes next in the answer."
        figure = HeadMap("retrieval", "Retrieval", what, list(answer.score), values, low=0, high=1)
        what = f"Points at the needle token that comes next in more than {percent(self.threshold)} of all cases."
        if values.isnan().all():
            return Description((figure,))
        finding = Finding("No retrieval head: none fetches text from far back.", 0.1, shows="retrieval")
        if heads:
            share = percent(len(heads) / int(values.isfinite().sum()))
            named = ", ".join(f"{head_name(*head)} ({percent(x)})" for head, x in list(heads.items())[:3])
            text = f"{share} of heads are retrieval heads, which fetch text from far back, above all heads {named}."
            finding = Finding(text, 0.3 + 0.4 * max(heads.values()), ("FocusDirections",), "retrieval")
        return Description((figure,), (Role("retrieval head", what, heads),), (finding,))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    method = RetrievalHeads(depths=(0.5,))
    with attach(model, method) as run:
        for probe in method.probes(torch.arange(1000, tokenizer.vocab_size), 2048):
            run.roles = probe.roles
            run(input_ids=probe.tokens)
        print(run[method])
