"""Calibrated sinks: columns whose mean received attention passes a threshold, but for the first, keep a share beta."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.sites import Site, at


class ACT(Method):
    """Takes attention from sinks inside the text; what each row frees goes to its other keys, in proportion."""

    paper = Paper(
        "P003",
        "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through "
        "Attention Calibration",
        "Zhongzhi Yu, Zheng Wang, Yonggan Fu, Huihong Shi, Khalid Shaikh, Yingyan Celine Lin",
        2024,
        "2406.15765",
        "ICML 2024",
        differs=(
            "The authors search heads on calibration data and act in layers 2 to 30 of 32; here the caller names "
            "layers and heads with .on(), there is no search yet, and without .on() every head is calibrated.",
            "A column's mean runs over the rows that may see it: where attention is causal that is the authors' "
            "divisor T - k, and it has a meaning in windows and encoders too.",
            "A row whose weight lies on sinks alone stays as it is, having no key to give to.",
        ),
    )
    whole_map = True
    causal = False  # a column's mean, and so what every row gives away, depends on later rows
    streams = False  # only the call that reads the prompt is calibrated, by its own rows
    beta: float = 0.4  # share of a sink's weight that it keeps, 0 to 1; the authors' code: 0.4
    threshold: float = 0.1  # mean weight that a sink receives from a row; the authors' code: 0.1
    ratio: float | None = None  # if given, the threshold is ratio / number of tokens; the paper's text: 5

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise FieldError(self, "beta", self.beta, "must lie from 0 to 1", 0.4)
        if not 0 <= self.threshold <= 1:
            raise FieldError(self, "threshold", self.threshold, "must lie from 0 to 1", 0.1)
        if self.ratio is not None and not self.ratio > 0:
            raise FieldError(self, "ratio", self.ratio, "must be above 0, or None", 5.0)

    @classmethod
    def neutral(cls) -> ACT:
        return cls(beta=1.0)

    @classmethod
    def example(cls) -> ACT:
        return cls(threshold=0.02)

    @at(Site.PATTERN)
    def calibrate(self, pattern: Tensor, call: Call) -> Tensor:
        if self.beta == 1 or call.phase is Phase.DECODE:
            return pattern
        sinks = self.sinks(pattern, call)[..., None, :]
        rest = pattern.masked_fill(sinks, 0.0).sum(-1, keepdim=True)
        freed = (1 - self.beta) * pattern.masked_fill(~sinks, 0.0).sum(-1, keepdim=True)
        gain = 1 + freed / rest.masked_fill(rest == 0, 1.0)
        return (pattern * gain).where(~sinks, pattern * self.beta).where(rest > 0, pattern)

    def sinks(self, pattern: Tensor, call: Call) -> Tensor:
        """Which columns lose weight, `[b h k]`."""
        rows = call.live[..., None]
        seen = rows.expand_as(pattern) if call.keep is None else rows & call.keep
        received = pattern.masked_fill(~seen, 0.0).sum(-2) / seen.sum(-2).clamp(min=1)
        high = self.threshold if self.ratio is None else self.ratio / call.live.sum(-1, keepdim=True).clamp(min=1)
        found = received > high
        return found & (found.cumsum(-1) > 1)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer(
        "Q: What is the capital of Italy?\nA: Rome\nQ: What is the capital of Japan?\nA:", return_tensors="pt"
    )
    with attach(model, ACT().on(layers=range(2, 29))) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=8, do_sample=False)[0]))
        print(run.activity())
