"""Keep the entries that the newest query looks at: the largest mean over all heads of softmax(q_n K)."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.paper import Paper
from heedful.core.sites import Site, at
from heedful.kit.budget import Budget
from heedful.kit.scored_cache import ScoredCache
from heedful.kit.scores import last_weights


class TOVA(ScoredCache):
    """Drops what the newest token attends to least; a layer's heads vote together and keep the same tokens."""

    paper = Paper(
        "2401.06104",
        "Transformers are Multi-State RNNs",
        "Matanel Oren, Michael Hassid, Nir Yarden, Yossi Adi, Roy Schwartz",
        2024,
        "2401.06104",
        "EMNLP 2024",
        differs=(
            "A share is of the text as it has grown, generated tokens included; the authors fix the number of entries.",
            "Entries keep their own positions, as in the authors' code by default; its narrowing of the gaps between "
            "them is not here.",
            "Weights are computed anew from queries and keys: they know of causality, padding, a soft cap and a bias, "
            "and not of narrower masks, learned sinks and other methods' edits of the map.",
        ),
    )
    budget: Budget = 0.125  # share of the text, or entries a head; the paper: an eighth is nearly on par with all

    @at(Site.CACHE)
    def omit(self, entries: CachedKV, call: Call) -> Tensor:
        weights, _ = last_weights(entries, call, 1)
        return self.best(weights.mean((1, 2)).unsqueeze(1).expand(entries.key.shape[:3]), entries, call)


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, TOVA(0.25)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
