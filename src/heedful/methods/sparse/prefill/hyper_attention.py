"""exp(s) where a hash sorts query and key into one block, c n / m exp(s) where key j was drawn c of m times, else 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import SiteError
from heedful.core.mask import Mask
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.core.sites import Site, adds, at
from heedful.kit.chosen import Chosen
from heedful.kit.running import past_keys


@dataclass(frozen=True, eq=False)
class _Square:
    """Some queries of one text and some keys, all of which they see."""

    text: int
    rows: range
    cols: range
    query: Tensor  # [h rows], the block of each
    key: Tensor  # [h cols]
    extra: Tensor  # [h cols], log(c n / m) of keys drawn, minus infinity of others

    def bias(self, rows: Tensor, cols: Tensor) -> Tensor:
        """What the scores of these queries and keys gain, `[h r k]`."""
        row, col = rows - self.rows.start, cols - self.cols.start
        same = self.query[:, row, None] == self.key[:, None, col]
        return self.extra[:, None, col].expand(same.shape).masked_fill(same, 0.0)


class HyperAttention(Method):
    """Large weights are found by a hash that sends near vectors to one block; the rest is estimated from a sample."""

    paper = Paper(
        "P259",
        "HyperAttention: Long-context Attention in Near-Linear Time",
        "Insu Han, Rajesh Jayaram, Amin Karbasi, Vahab Mirrokni, David P. Woodruff, Amir Zandieh",
        2023,
        "2310.05869",
        "ICLR 2024",
        differs=(
            "Its answers are here, and not its speed: pairs are left out and reweighted in attention as it is computed "
            "anyway, tile by tile.",
            "Where a block is not full it holds fewer keys; the authors' code fills it with zeros, which are attended.",
            "A drawn key that is in the query's block counts once, as the authors' code means it to; in full precision "
            "and with FlashAttention's own kernel that code counts it again.",
            "The same columns are drawn in every call of a layer, from its number and the seed, for all texts.",
            "A prompt that comes in several calls, and decoding, is exact after the first call.",
            "As in the authors' code the hash is the Gray code of the signs; in the paper's order neighbouring buckets "
            "differ in one sign, which is that code's inverse.",
        ),
    )
    one_text = True
    causal = False  # where a text is halved, and how it is sorted, depends on all of it
    chunk_invariant = False  # what continues a text sees all of it
    # tokens up to which a part is exact, and the smallest square that is not; the authors: 4096
    least: PositiveInt = 4096
    block: PositiveInt = 256  # sorted keys in a block; the authors: 256
    sample: NonNegativeInt = 256  # columns drawn; the authors: 256
    bits: PositiveInt = 7  # directions that the hash asks; the authors: 7
    seed: int = 0

    @classmethod
    def neutral(cls) -> HyperAttention:
        return cls(least=2**30)

    @classmethod
    def example(cls) -> HyperAttention:
        return cls(least=2, block=1, sample=1, bits=2)

    def rests(self, tokens: int) -> str | None:
        least = self.shortest(causal=True)
        told = f"squares of fewer than {self.least} queries are exact, and the text has {tokens}: "
        return f"{told}a smaller least would act" if tokens < least else None

    def idle(self, call: Call) -> bool:
        n = len(call.queries)
        later = call.phase is Phase.DECODE or past_keys(call, n, len(call.keys)) > 0
        return call.cross or later or n < self.shortest(call.mask.causal)

    def shortest(self, causal: bool) -> int:
        """Tokens of the shortest text that is not exact."""
        return 2 * self.least - 1 if causal else self.least

    @at(Site.MASK)
    def choose(self, mask: Mask, call: Call) -> Mask:
        squares = list(self.squares(call))
        call.state.forward[f"squares {call.layer}"] = squares
        if not squares:
            return mask
        shape, cols = (call.batch or 1, call.heads), torch.arange(len(call.keys), device=call.k_pos.device)

        def pick(rows: slice) -> Tensor:
            return self.bias(squares, shape, cols[rows], cols) > -torch.inf

        return mask & Chosen(pick)

    @adds
    def reweigh(self, call: Call) -> Tensor:
        squares = call.state.forward[f"squares {call.layer}"]
        shape, rows, cols = (call.batch or 1, call.heads), call.queries.index[0, 0], call.keys.index[0, 0]
        bias = self.bias(squares, shape, rows, cols)  # what is left out is masked, and needs no infinity
        return bias.masked_fill(bias == -torch.inf, 0.0)

    @staticmethod
    def bias(squares: list[_Square], shape: tuple[int, int], rows: Tensor, cols: Tensor) -> Tensor:
        """What the scores of these rows and columns gain, `[b h r k]`; nothing where they are exact."""
        out = torch.zeros(*shape, len(rows), len(cols), device=rows.device)
        for square in squares:
            mine, keys = (
                ((place >= own.start) & (place < own.stop)).nonzero().flatten()
                for place, own in ((rows, square.rows), (cols, square.cols))
            )
            if len(mine) and len(keys):
                out[square.text, :, mine[:, None], keys] = square.bias(rows[mine], cols[keys])
        return out

    def squares(self, call: Call) -> Iterator[_Square]:
        """The squares of each text's map that are not exact."""
        if call.query is None or call.key is None:
            raise SiteError(f"{self!r}, layer {call.layer}: hashes queries and keys, and is handed none")
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + call.layer)
        directions = torch.randn(call.query.shape[3], self.bits, generator=draw).to(call.query.device)
        column = torch.rand(call.heads, self.sample, generator=draw).to(call.query.device)
        query, key = (self.hash(x.detach().float(), directions) for x in (call.query, call.spread(call.key)))
        text = call.is_text[:, 0].expand(len(query), -1)
        for row, is_text in enumerate(text):
            places = is_text.nonzero().flatten().tolist()
            for rows, cols in self.parts(places[0], places[-1] + 1, call.mask.causal) if places else ():
                yield self.sorted(query[row], key[row], column, row, rows, cols)

    def parts(self, start: int, stop: int, causal: bool) -> Iterator[tuple[range, range]]:
        """The queries and keys of each square of a map."""
        if causal:
            yield from ((range(middle, end), range(begin, middle)) for begin, middle, end in self.halves(start, stop))
        elif stop - start >= self.least:
            yield range(start, stop), range(start, stop)

    def halves(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """A causal map as squares below its diagonal, whose triangles are halved until they are small."""
        if stop - start <= self.least:
            return
        middle = start + (stop - start + 1) // 2
        if middle - start >= self.least:
            yield start, middle, stop
        yield from self.halves(start, middle)
        yield from self.halves(middle, stop)

    def sorted(self, query: Tensor, key: Tensor, column: Tensor, text: int, rows: range, cols: range) -> _Square:
        """A square whose queries and keys are sorted by their hashes `[h n]` and cut into blocks."""
        both = query[:, rows.start : rows.stop], key[:, cols.start : cols.stop]
        rank, place = (x.argsort(stable=True).argsort() // self.block for x in both)
        length = len(cols)
        drawn = (column * length).long().clamp(max=length - 1)
        count = torch.zeros(len(key), length, device=key.device).scatter_add(1, drawn, torch.ones_like(column))
        extra = (count * (length / max(1, self.sample))).log()
        return _Square(text, rows, cols, rank, place, extra)

    @staticmethod
    def hash(x: Tensor, directions: Tensor) -> Tensor:
        """A number of each vector's signs: their Gray code."""
        code = ((x @ directions > 0) * 2 ** torch.arange(directions.shape[1], device=x.device)).sum(-1)
        return code ^ (code >> 1)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 80, return_tensors="pt")
    with attach(model, HyperAttention(256, 32, 32)) as run:
        print(run.difference(**text))
        print(run.activity())
