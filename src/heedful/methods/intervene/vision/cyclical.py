"""q_t = W e(y_t) in a second forward, y_t the word that the first one wrote: who says a word shall know where it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import RoleName
from heedful.core.regions import by_text, numbers
from heedful.core.sites import Site, at, reads
from heedful.kit.feature_maps import with_bias


class Cyclical(Method):
    """Trains a decoder to say a caption once more by regions that were found by the words it wrote. No boxes are given.

    Attach it to the layers of cross-attention. Where the run has no role "written" it changes nothing: that is the
    first forward, and all there is once the model is trained. For the second one append to the decoder's `n` tokens
    those that it found likeliest, without labels, say where they stand, `run.roles = {"written": ((n, 2 * n),)}`, and
    add up both losses, half each. Tokens then look at the other sequence as the words say that they write.
    """

    paper = Paper(
        "P172",
        "Learning to Generate Grounded Visual Captions without Localization Supervision",
        "Chih-Yao Ma, Yannis Kalantidis, Ghassan AlRegib, Peter Vajda, Marcus Rohrbach, Zsolt Kira",
        2020,
        "1906.00283",
        "ECCV 2020",
        differs=(
            "In transformers; the authors' decoder is a pair of recurrent nets. The localizer is a linear map of words "
            "to each head's queries, in each layer of cross-attention that it is attached to.",
            "Words are asked for as they enter the decoder's first layer, with what tells their places where the model "
            "adds that; the authors' localizer is told the word alone.",
            "The localizer's keys are those of the decoder, as with the authors' shared projections; its softmax has "
            "the model's own scale in place of a temperature.",
            "The authors train their decoder first, without the second forward; when that begins is the caller's "
            "choice.",
            "The map is drawn as torch.nn.Linear draws it, by a generator seeded by the layer's number.",
        ),
    )
    subjects = ("cross",)
    causal = False
    chunk_invariant = False
    written: RoleName = "written"  # the role of the words that the first forward wrote, in their order

    @classmethod
    def example(cls) -> Cyclical:
        return cls("marked")

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        return with_bias(random, "localizer", layer.heads * layer.head_dim, layer.width)

    def idle(self, call: Call) -> bool:
        return self.written not in call.roles

    @reads(Site.EMBEDDING)
    def listen(self, stream: Tensor, call: Call) -> None:
        call.state.forward[f"words of {call.lowest}"] = stream

    @at(Site.QUERY)
    def localize(self, query: Tensor, call: Call) -> Tensor:
        if not call.cross:
            return query
        p, words = call.params, call.state.forward[f"words of {call.lowest}"]
        number = by_text(numbers, call.regions(self.written), call.q_pos)[:, 0, None]  # [b|1 1 n]
        writes = (number == call.q_pos[:, 0, :, None]) & (number >= 0)  # [b|1 n n], who writes which word
        asks = linear(writes.to(words.dtype) @ words, p["localizer"].to(words), p["localizer_bias"].to(words))
        own = asks.unflatten(-1, (call.heads, -1)).transpose(1, 2)
        return torch.where(writes.any(-1)[:, None, :, None], own.to(query.dtype), query)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 9))
    layers = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))
    with attach(model, Cyclical(), only=layers) as run:
        optimiser = torch.optim.Adam(model.parameters(), 1e-3)  # among them the localizer
        for _ in range(5):
            run.roles = {}
            first = run(input_ids=ids, decoder_input_ids=ids, labels=ids)
            run.roles = {"written": ((9, 18),)}
            told = torch.cat([ids, first.logits.argmax(-1)], 1)
            labels = torch.cat([ids, torch.full_like(ids, -100)], 1)
            again = run(input_ids=ids, decoder_input_ids=told, labels=labels)
            optimiser.zero_grad()
            ((first.loss + again.loss) / 2).backward()
            optimiser.step()
            print(first.loss.item(), again.loss.item())
