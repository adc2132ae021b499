"""AttentionLens: is what heads say of the next token heard better through a lens than through the unembedding?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from claims._tiny_lm import HeadNorm, Trained, batch
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import reads
from heedful.core.call import Call
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.sites import Site
from heedful.core.stats import Cat
from heedful.methods.explain.attention_lens import AttentionLens

LAYERS, STEPS, BATCHES, EPOCHS, LAYER = 4, 600, 400, 2, 2


def divergence(final: Tensor, said: Tensor) -> float:
    """KL of the model's words from others, nats a token."""
    return float(
        kl_div(said.log_softmax(-1).flatten(0, 1), final.flatten(0, 1), reduction="batchmean", log_target=True)
    )


class Heads(Method):
    """What a layer's heads hand over, `[b h n d]`."""

    paper = HeadNorm.paper

    @reads(Site.HEAD_OUTPUT)
    def keep(self, heads: Tensor, call: Call) -> Cat:
        return Cat.of("heads", heads)


@torch.no_grad()
def heads_of(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's heads, and the log-probabilities of what the model says."""
    part = Heads().on(layers=LAYER)
    with attach(model, part) as attached:
        logits = attached(input_ids=ids).logits
        (found,) = attached.state.statistics.values()
    return found.value[0], logits.log_softmax(-1)


def measure(seed: int) -> tuple[float, dict[str, float]]:
    trained = Trained(None, seed, STEPS, LAYERS)
    trained.run.close()
    model, source = trained.model.eval(), torch.Generator().manual_seed(1000 + seed)
    texts = [batch(source) for _ in range(BATCHES)]
    lens = fit(AttentionLens(LAYER, epochs=EPOCHS), model, [{"input_ids": ids} for ids in texts])
    heads, final = heads_of(model, batch(source, held_out=True, rows=64))
    with torch.no_grad():
        usual = torch.stack([model(ids).logits.softmax(-1).mean((0, 1)) for ids in texts[:50]]).mean(0).log()
        o = model.model.layers[LAYER].self_attn.o_proj.weight.unflatten(1, (4, -1))
        plain = torch.einsum("ve,ehd->hvd", model.lm_head.weight, o)
        unembedding = AttentionLens(LAYER, lens=Fitted({"weight": plain, "bias": torch.zeros(plain.shape[:2])}))
        numbers = {
            "KL through lenses": divergence(final, lens.through(heads).sum(1)),
            "KL through the unembedding": divergence(final, unembedding.through(heads).sum(1)),
            "KL of what is usual, whatever the heads": divergence(final, usual.expand_as(final)),
        }
    rest = min(numbers["KL through the unembedding"], numbers["KL of what is usual, whatever the heads"])
    return rest - numbers["KL through lenses"], numbers


CLAIM = Claim(
    key="P205",
    method="AttentionLens",
    says="Learned lenses translate what attention heads write into words of the vocabulary, which the unembedding "
    "alone does not fit.",
    paper_number="none given",
    setup=f"A language model of bytes, {LAYERS} layers of 4 heads, trained anew a seed; lenses for layer {LAYER} "
    f"fitted on {BATCHES} batches, {EPOCHS} passes; KL from the model's own words on held-out text, against the "
    "unembedding in their place and against the model's mean prediction, which hears no head.",
    effect="nats of KL a token by which lenses beat the better of the two",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
