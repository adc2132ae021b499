"""Each query keeps the first `sinks` keys and its last `window` keys; the cache keeps no others."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.mask import First, Mask, Window
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.budget import all_fit, newest


class SinkWindow(Method):
    """Streaming attention: a few sink tokens and a sliding window, as a mask while reading and as a cache after it."""

    paper = Paper(
        "2309.17453",
        "Efficient Streaming Language Models with Attention Sinks",
        "Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han, Mike Lewis",
        2023,
        "2309.17453",
        "ICLR 2024",
        differs=(
            "Keys keep their positions in the text; the authors give them their positions in the cache, which lets a "
            "model run past its trained length.",
            "The window counts the query itself; the authors' evict-after-forward code lets a query see one key more.",
            "A long prompt is masked row by row; the authors' code lets one forward see its whole chunk.",
        ),
    )
    sinks: NonNegativeInt = 4  # tokens; the paper's default
    window: PositiveInt = 512  # tokens; the authors' code: 512

    @classmethod
    def neutral(cls) -> SinkWindow:
        return cls(sinks=0, window=1 << 30)

    @classmethod
    def example(cls) -> SinkWindow:
        return cls(sinks=1, window=4)

    def declares(self, tokens: int) -> dict[str, float]:
        pairs = sum(min(i + 1, self.window + min(self.sinks, max(0, i + 1 - self.window))) for i in range(tokens))
        # the cache holds what the next token may see beside itself
        return {"density": pairs / tokens**2, "kept": min(tokens, self.window - 1 + self.sinks)}

    def rests(self, tokens: int) -> str | None:
        return all_fit(self.sinks + self.window, tokens, f"window={tokens // 2}")

    @at(Site.MASK)
    def drop_the_middle(self, mask: Mask, call: Call) -> Mask:
        return mask & (Window(self.window) | First(self.sinks))

    @at(Site.CACHE)
    def forget_the_middle(self, entries: CachedKV, call: Call) -> Tensor:
        # the next query will see one more: itself
        keep = (entries.positions.position < self.sinks) | newest(entries, call, self.window - 1)
        return entries.is_text & keep


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, SinkWindow(4, 32)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
