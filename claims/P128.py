"""LessIsMore: does one set of tokens for all heads serve the layers that share it better than a set for each head?"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from claims._cache import Reading, prose, recall
from claims._loaded import default
from claims.ledger import Claim, run
from heedful import Method, Site, Stack, attach
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Call, Mask, at
from heedful.kit.chosen import Chosen
from heedful.methods import LessIsMore

SEEN, SINKS, NEWEST, SELECTING = 64, 4, 12, (2, 12)


class PerHead(Method):
    """As many tokens, each head its own: those that it ranks best here, or that it ranked best in a layer before."""

    paper = LessIsMore.paper
    sinks: int = SINKS
    newest: int = NEWEST
    shared: bool = True  # a selecting layer's choice serves those after it; False: each layer chooses for itself

    def idle(self, call: Call) -> bool:
        return call.layer < min(SELECTING) or (not self.shared and call.layer in SELECTING)

    @at(Site.MASK)
    def choose(self, mask: Mask, call: Call) -> Mask:
        if self.shared and call.layer not in SELECTING:
            seen = call.state.forward["seen"]
            return mask & Chosen(lambda rows: seen[:, :, rows])
        seen = self._best(mask, call)
        if not self.shared:
            return mask & Chosen(lambda rows: seen[:, :, rows])
        call.state.forward["seen"] = seen
        return mask

    def _best(self, mask: Mask, call: Call) -> Tensor:
        """Which tokens each head's queries see, `[b h q k]`."""
        scores = call.query @ call.spread(call.key).mT
        part = call.tile(slice(0, len(call.queries)), slice(0, len(call.keys)))
        always = (part.distance < self.newest) | (part.pairs.k < self.sinks)
        scores = scores.masked_fill(~mask.keeps(part.pairs) | always, -torch.inf)
        best = scores.topk(SEEN - self.sinks - self.newest).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) | always


@torch.no_grad()
def losses(text: Reading, methods: dict[str, Method | Stack]) -> dict[str, float]:
    """Mean loss, in nats, of the tokens that count, read under each method after a context that was read in full."""
    model, found = default().model, {}
    read = model(input_ids=text.context, use_cache=True, logits_to_keep=1)
    for how, method in methods.items():
        with attach(model, method) as session:
            more = session(input_ids=text.rest, use_cache=True, **{CACHE: copy.deepcopy(read[CACHE])})
        logits = torch.cat([read.logits, more.logits[:, :-1]], 1)
        each = torch.nn.functional.cross_entropy(logits[0], text.rest[0], reduction="none")
        found[how] = float(each[text.counts[0]].mean())
    return found


METHODS = {
    "everything": Stack(),
    "one set": LessIsMore(SEEN, (SINKS + NEWEST) / SEEN, SINKS, SELECTING),
    "a set for each head": PerHead(),
    "a set for each head, no window": PerHead(0, 0),
    "a set for each head and layer": PerHead(shared=False),
}


def measure(seed: int) -> tuple[float, dict[str, float]]:
    numbers = {}
    for name, text in (("numbers", recall(seed)), ("prose", prose(seed, 384, 128))):
        numbers |= {f"loss on {name}, {how}": loss for how, loss in losses(text, METHODS).items()}
    return numbers["loss on numbers, a set for each head"] - numbers["loss on numbers, one set"], numbers


CLAIM = Claim(
    key="P128",
    method="LessIsMore",
    says="One set of tokens for all heads, and a window, serve the layers that share a choice better than a set for "
    "each head.",
    paper_number="as accurate as full attention with half the tokens of other sparse methods (abstract)",
    setup="SmolLM2-135M, towns' numbers strewn over about 400 tokens that are read in full, and asked for after them; "
    f"there each token sees {SEEN}: {SINKS} sinks, the newest {NEWEST}, and {SEEN - SINKS - NEWEST} that layer "
    f"{SELECTING[0]} or {SELECTING[1]} chose (of 30; these and the first two see all), as one set for all heads or as "
    "each head's own. Beside it heads' own sets without sinks and window, which is TidalDecode, and the loss of 128 "
    "tokens of prose after 384. Heads' own sets that each layer chooses anew, at the price of ranking in every layer, "
    "are in the record too: they lose next to nothing, so what costs here is sharing between layers, not heads.",
    effect="nats of loss per digit that one set for all heads saves",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
