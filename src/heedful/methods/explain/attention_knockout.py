"""s_ij = -inf for the queries i and keys j of two spans: what then is lost had gone from j to i, in these layers."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import Call
from heedful.core.mask import Mask, Where
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import RoleName
from heedful.core.regions import by_text, marked
from heedful.core.sites import Site, at


class AttentionKnockout(Method):
    """Hides a span, such as an image, from the tokens outside it, or from those of one other span.

    `.on(layers=...)` says in which layers, and `.when("decode")` hides it from written tokens alone. In
    cross-attention the hidden span is one of the keys', the other one of the queries', by default all of them.
    """

    paper = Paper(
        "P097",
        "What's in the Image? A Deep-Dive into the Vision of Vision Language Models",
        "Omri Kaduri, Shai Bagon, Tali Dekel",
        2024,
        "2411.17491",
        "CVPR 2025",
        differs=(
            "What the authors do with it stays with the caller: which layers and spans to try, and how answers are "
            "judged, for which they ask a language model.",
            "A token always sees itself.",
            "The authors' localisation of things and their efficient processing of images are not here.",
        ),
    )
    hidden: RoleName = "image"  # the span that is not seen
    by: str = ""  # the span that does not see it; none: all tokens outside the hidden one

    @at(Site.MASK)
    def knock_out(self, mask: Mask, call: Call) -> Mask:
        hidden = call.regions(self.hidden)
        blind = call.regions(self.by) if self.by else None

        def seen(q: Tensor, k: Tensor) -> Tensor:
            gone = by_text(marked, hidden, k)
            if blind is not None:
                gone = gone & by_text(marked, blind, q)
            elif not call.cross:
                gone = gone & ~by_text(marked, hidden, q)
            return ~gone if call.cross else ~gone | (q == k)

        return mask & Where(seen)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The code of the lamp is Berlin. Question: the code of the lamp is", return_tensors="pt")
    roles = {"fact": ((0, 8),), "question": ((8, text.input_ids.shape[1]),)}
    for layer in range(0, 30, 6):
        method = AttentionKnockout("fact", "question").on(layers=range(layer, layer + 6))
        with attach(model, method, roles=roles) as run:
            print(layer, run.difference(**text))
