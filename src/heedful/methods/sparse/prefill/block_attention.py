"""A token of document d computes the keys of d alone; a token outside all documents computes every key."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import RoleName
from heedful.core.regions import by_text, span_of
from heedful.core.sites import Site, at


class BlockAttention(Method):
    """Documents that do not see one another, as if each had been read alone, kept, and turned to its place in the text.

    What stands outside the marked documents, a question behind them above all, sees everything before it.
    """

    paper = Paper(
        "P164",
        "Block-Attention for Efficient Prefilling",
        "Dongyang Ma, Yan Wang, Tian Lan",
        2025,
        "2409.15355",
        "ICLR 2025",
        differs=(
            "The authors fine-tune with this mask; here it is put into any model, trained with it or not.",
            "They read each document at positions from 0 on, keep its keys, and turn these to their place later. Where "
            "positions are rotary, one text under the mask gives the same; the keys are not kept for other prompts.",
            "Where positions are added to the embedding, documents keep those of the text; the authors' models have "
            "none such.",
            "To them all but the last block are blocks; here what is not marked as a document sees all before it, "
            "wherever it stands.",
        ),
    )
    role: RoleName = "documents"  # the spans that do not see one another

    def idle(self, call: Call) -> bool:
        return call.cross

    @at(Site.MASK)
    def part(self, mask: Mask, call: Call) -> Mask:
        regions = call.regions(self.role)

        def sees(query: Tensor, key: Tensor) -> Tensor:
            mine, theirs = (by_text(span_of, regions, place) for place in (query, key))
            return (mine < 0) | (mine == theirs)

        return mask & Where(sees)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    parts = ["The number of Oslo is 52.\n", "The number of Lima is 17.\n", "The number of Lima is"]
    ids = [tokenizer(part, return_tensors="pt").input_ids for part in parts]
    ends = torch.tensor([0, *(x.shape[1] for x in ids)]).cumsum(0).tolist()
    with attach(model, BlockAttention(), roles={"documents": ((ends[0], ends[1]), (ends[1], ends[2]))}) as run:
        print(tokenizer.decode(run.generate(torch.cat(ids, 1), max_new_tokens=4, do_sample=False)[0]))
