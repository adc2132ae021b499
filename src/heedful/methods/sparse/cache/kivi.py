"""Round keys channel by channel and values token by token, lo + s [(x - lo) / s] with s = (hi - lo) / (2^bits - 1)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from heedful.core.call import CachedKV, Call, Kept
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.packed import Packing
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.budget import between, grown
from heedful.kit.packing import Codes

WIDTHS = (2, 4, 8)


class KIVI(Method):
    """A cache of few bits: channels of keys have outliers and are scaled by themselves, the newest stay as they are."""

    paper = Paper(
        "2402.02750",
        "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        "Zirui Liu, Jiayi Yuan, Hongye Jin, Shaochen Zhong, Zhaozhuo Xu, Vladimir Braverman, Beidi Chen, Xia Hu",
        2024,
        "2402.02750",
        "ICML 2024",
        differs=(
            "What is packed is unpacked for every call, in its lowest numbers' and steps' own type, the model's; the "
            "authors' kernel unpacks while it multiplies, which saves time too.",
            "Keys and values have as many bits; the authors' code has a number for each.",
            "A group of equal numbers stays as it is; the authors' code divides by its width, which is zero.",
            "A piece of a prompt attends to its own entries unrounded, as a whole prompt does in the authors' code.",
            "A group is the tokens at so many positions in a row, of which other methods may have dropped some.",
            "A group of which tokens are cropped is rounded once more when it is full again.",
        ),
    )
    chunk_invariant = False  # what a call adds is rounded for the next
    bits: Literal[2, 4, 8] = 2  # of a number, 2, 4 or 8; the paper: 2, and 4
    # tokens of a key channel, and channels of a value, that share lowest and highest; the paper: 32
    group: Annotated[int, Ge(3)] = 32
    residual: int = 128  # newest values that are whole, and the most keys; the paper: 128

    def __post_init__(self) -> None:
        if self.residual < 1 or self.residual % self.group:
            good = 4 * self.group
            raise FieldError(self, "residual", self.residual, "must be a multiple of group, above 0", good)

    @classmethod
    def neutral(cls) -> KIVI:
        return cls(residual=2**20)

    @classmethod
    def example(cls) -> KIVI:
        return cls(group=4, residual=4)

    def rests(self, tokens: int) -> str | None:
        short = tokens < self.residual
        told = f"the newest {self.residual} tokens are whole, and the text has {tokens}: a smaller residual would act"
        return told if short else None

    @at(Site.CACHE)
    def quantise(self, entries: CachedKV, call: Call) -> Kept:
        (before, after), block = grown(call), self.residual
        keys = between(entries, before - before % block, after - after % block)
        values = between(entries, before - block, after - block)
        key, value = None, None
        if len(rows := entries.key[keys]):
            text, head, _ = keys.nonzero().T
            place = entries.positions.position.expand(keys.shape)[keys]
            key = Packing(keys, self.keys(rows, torch.stack([text, head, place // self.group], -1)))
        if len(rows := entries.value[values]):
            value = Packing(values, Codes.by_row(rows, self.group, self.bits))
        return Kept(key=key, value=value)

    def keys(self, rows: Tensor, group: Tensor) -> Codes:
        """Keys `[t d]`, those of a `group [t ...]` scaled together."""
        return Codes.by_group(rows, group, self.bits)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, KIVI(bits=4)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
