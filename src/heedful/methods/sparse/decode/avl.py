"""Of an image's entries the least are dropped, others kept, and each step sees a core of them, now and then anew."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call, Phase
from heedful.core.mask import Dense, Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveInt, PositiveShare
from heedful.core.regions import by_text, marked
from heedful.core.sites import Site, at
from heedful.kit.budget import rooms
from heedful.kit.picked import weights_of
from heedful.kit.scores import last_weights
from heedful.kit.topk import top_k

CORE, STEP = "core", "step"


class AVL(Method):
    """While text is written, an image is looked at through a few of its entries, which are chosen anew every few steps.

    Where the image stands is the role `image`. For the text itself put a method for caches of text beside it.
    """

    paper = Paper(
        "P082",
        "A-VL: Adaptive Attention for Large Vision-Language Models",
        "Junyang Zhang, Mu Yuan, Ruiguang Zhong, Puhan Luo, Huiyou Zhan, Ningkang Zhang, Chengchen Hu, Xiang-Yang Li",
        2024,
        "2409.14846",
        "AAAI 2025",
        differs=(
            "The authors' text was at hand in summaries, and of their code how it is set: the three kinds of entries "
            "and the renewal are theirs, and the shares and how often are those of a script of theirs.",
            "Every layer reads the whole prompt; the authors may leave out some of an image from an early layer on.",
            "The core is first chosen by the first written token, which sees all that was kept; theirs by the prompt.",
            "Text is left whole; the authors drop text that is far and draws little attention.",
        ),
    )
    chunk_invariant = False  # what a prompt drops depends on its end
    # of the image's entries that stay, by what the prompt's last token gives them; theirs: 0.5
    share: PositiveShare = 0.5
    core: PositiveShare = 0.3  # share of them all that a step sees; the authors: 0.3
    # steps after which the core is chosen anew; that step sees all that was kept; the authors: 3
    every: PositiveInt = 3

    @classmethod
    def neutral(cls) -> AVL:
        return cls(share=1.0, core=1.0)

    @classmethod
    def example(cls) -> AVL:
        return cls(share=0.5, core=0.3, every=2)

    def idle(self, call: Call) -> bool:
        return call.cross or self.share == self.core == 1.0

    @at(Site.MASK)
    def look(self, mask: Mask, call: Call) -> Mask:
        if call.phase is not Phase.DECODE or not call.causal:
            return mask
        number, notes = call.numbers("image"), call.state.cache
        number = number.expand(call.batch or len(number), call.kv_heads, -1)
        if CORE not in notes or int(notes[STEP][0]) % self.every == 0:
            given = _by_group(weights_of(mask, call, slice(0, 1)), call)
            total = max(self._sizes(call))
            score = given.new_zeros(*given.shape[:2], total)
            score.scatter_add_(2, number.clamp(min=0), given.masked_fill(number < 0, 0.0))
            notes[CORE] = self.choose(score, notes.get(CORE))
            notes[STEP] = torch.ones(len(number), dtype=torch.long, device=number.device)
            return mask
        notes[STEP] = notes[STEP] + 1
        seen = (number < 0) | notes[CORE].gather(2, number.clamp(min=0))
        return mask & Dense(call.spread(seen)[:, :, None])

    def choose(self, score: Tensor, before: Tensor | None) -> Tensor:
        """The core `[b g p]`, by what each of the image's tokens was just given; `before` is the one so far."""
        return top_k(score, ceil(self.core * score.shape[2]), torch.ones_like(score, dtype=torch.bool))

    @at(Site.CACHE)
    def drop(self, entries: CachedKV, call: Call) -> Tensor:
        if call.phase is Phase.DECODE or not call.causal:
            return entries.is_filled
        given = _by_group(last_weights(entries, call, 1)[0], call)
        image = by_text(marked, call.regions("image"), entries.positions.position)
        room = rooms(self.share, torch.tensor(self._sizes(call), device=given.device)[:, None, None])
        best = top_k(given, room, image & entries.is_text)
        return best | (entries.is_filled & ~image)

    def _sizes(self, call: Call) -> list[int]:
        """How many tokens the image has in each text, or in all of them."""
        return [region.tokens for region in call.regions("image")]


def _by_group(weights: Tensor, call: Call) -> Tensor:
    """One query's weights `[b h 1 k]`, added up over the heads of each group, `[b g k]`."""
    return torch.einsum("bgsk->bgk", weights[:, :, 0].unflatten(1, (call.kv_heads, -1)))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The code is Berlin. " + "The sea is calm. " * 20 + "The code is", return_tensors="pt")
    with attach(model, AVL(every=4), roles={"image": ((0, text.input_ids.shape[1] - 8),)}) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=10, do_sample=False)[0, -10:]))
        print(run.activity())
