"""In training z ~ q(z|x, y) in place of softmax p(z|x), and the loss grows by KL(q | p): q is told what is written."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from heedful.authoring import (
    Call,
    Layer,
    Method,
    NonNegativeFloat,
    Paper,
    PositiveFloat,
    PositiveInt,
    Site,
    SiteError,
    at,
    penalises,
)
from heedful.kit.feature_maps import drawn
from heedful.kit.topk import top_k


class VariationalAttention(Method):
    """Where a word was found is drawn, by a net that knows which word it is; softmax learns to tell it beforehand.

    For encoder-decoders trained with it, on all that is to be written at once. At rest there is the softmax, of which
    each token keeps its likeliest places.
    """

    paper = Paper(
        "P239",
        "Latent Alignment and Variational Attention",
        "Yuntian Deng, Yoon Kim, Justin Chiu, Demi Guo, Alexander M. Rush",
        2018,
        "1807.03756",
        "NeurIPS 2018",
        differs=(
            "One place is drawn, and its gradient is that of a Gumbel-softmax; the authors learn by REINFORCE or add "
            "up all places, which both ask for the loss that each would have had. Their Gumbel-softmax mixes places.",
            "q is p times what the layer's keys say to a map of what stands at the next token, which is the word that "
            "was to be written and those before it; the authors' has nets of its own for all of source and target.",
            "Each head of each layer draws a place, the bound has a divergence for each, and later tokens and layers "
            "go on from what was drawn; the authors have one head, and hand on the mean over p.",
            "The last token has no next one: its place is drawn from p.",
            "At rest values are mixed by the likeliest places' shares; the authors mix what each would have written.",
            "Weights are drawn as torch.nn.Linear draws them, by a generator seeded by the layer's number.",
        ),
    )
    whole_map = True
    causal = False  # in training a token is told what it is to write
    subjects = ("cross",)
    best: PositiveInt = 5  # places that each token keeps at rest; the paper: 5
    weight: NonNegativeFloat = 1.0  # of the divergence, per token; 1 is the bound
    # of the draw's gradient: towards 0 it is that of fewer places; the authors' code: 1
    temperature: PositiveFloat = 1.0
    seed: int = 0  # of what is drawn

    @classmethod
    def example(cls) -> VariationalAttention:
        return cls(1)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return {"ask": drawn(random, layer.heads * layer.head_dim, layer.width)}

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.PATTERN, training=False)
    def keep_best(self, prior: Tensor, call: Call) -> Tensor:
        kept = prior.where(top_k(prior, self.best, _seen(prior, call)), 0.0)
        left = kept.sum(-1, keepdim=True)
        return kept / left.where(left > 0, 1.0) * prior.sum(-1, keepdim=True)

    @at(Site.PATTERN, training=True)
    def draw(self, prior: Tensor, call: Call) -> Tensor:
        seen, lowest = _seen(prior, call), torch.finfo(prior.dtype).min
        log_prior = prior.clamp(min=torch.finfo(prior.dtype).tiny).log().masked_fill(~seen, lowest).log_softmax(-1)
        evidence = self.evidence(call).to(prior.dtype) * self._told(call)[..., None]
        log_chance = (log_prior + evidence).masked_fill(~seen, lowest).log_softmax(-1)
        apart = (log_chance.exp() * (log_chance - log_prior)).masked_fill(~seen, 0.0).sum(-1)
        # a penalty is handed the pattern after this, which is no prior any more
        tokens = call.is_text.expand(len(prior), -1, -1).sum().clamp(min=1)
        call.state.forward[call.name] = (apart * call.is_text).sum() / tokens
        noise = -self._exponential(prior, call).log()
        soft = ((log_chance + noise) / self.temperature).masked_fill(~seen, lowest).softmax(-1)
        one = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return (one + (soft - soft.detach())).masked_fill(~seen, 0.0) * prior.sum(-1, keepdim=True)

    @penalises(Site.PATTERN, when="weight")
    def diverge(self, sample: Tensor, call: Call) -> Tensor | None:
        """KL(q | p), added up over heads, the mean over tokens."""
        return self.weight * call.state.forward.pop(call.name) if call.training else None

    def evidence(self, call: Call) -> Tensor:
        """What the next token says for each place of the source, `[b h r k]`; where there is none, nothing."""
        if call.hidden is None or call.key is None:
            raise SiteError(f"{self!r}, layer {call.layer}: the block is not handed hidden states to tell q")
        ask = call.params["ask"]
        x = linear(call.hidden.flatten(1, -2)[:, 1:].to(ask.dtype), ask)
        query = pad(x, (0, 0, call.earlier, 1)).unflatten(-1, (call.heads, -1)).transpose(1, 2)
        return call.scale * query[:, :, call.rows] @ call.spread(call.key).to(ask.dtype).mT

    def _told(self, call: Call) -> Tensor:
        """Which tokens have no padding behind them, which would tell nothing, `[b|1 1 r]`."""
        return call.is_text.roll(-1, -1)

    def _exponential(self, like: Tensor, call: Call) -> Tensor:
        """Of which the negative logarithm is Gumbel's."""
        random = torch.Generator().manual_seed(1_000_003 * self.seed + 1009 * call.forward + call.layer)
        return torch.empty(like.shape, dtype=torch.float64).exponential_(generator=random).to(like)


def _seen(pattern: Tensor, call: Call) -> Tensor:
    """Which pairs are, broadcastable to the pattern."""
    return pattern.new_ones(pattern.shape[-1], dtype=torch.bool) if call.keep is None else call.keep


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart").train()
    ids = torch.arange(3, 19)[None]
    names = [f"model.decoder.layers.{i}.encoder_attn" for i in range(2)]
    with attach(model, VariationalAttention(), only=names) as run:
        run(input_ids=ids, decoder_input_ids=ids[:, :5], labels=ids[:, :5]).loss.backward()
        print(run.loss().item(), run.activity())
