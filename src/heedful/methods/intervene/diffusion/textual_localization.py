"""mean over places of w (A - M)^2, w = 1 in the mask M and outside; beside the loss by which a new word is learnt."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import Call
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName
from heedful.methods.intervene.diffusion._map_loss import MapLoss, levelled


class TextualLocalization(MapLoss):
    """Trains a new word to look at its own thing, in pictures that show others beside it.

    Roles say which word, among the keys, and which places its thing has: `roles={"word": ((0, 1),), "mask": spans}`.
    The penalty is `run.loss()`, to add to the loss of what is denoised. Words with masks of their own are joined:
    `TextualLocalization(0.5, "first", "its") | TextualLocalization(0.5, "second", "its own")`.
    """

    paper = Paper(
        "P177",
        "Textual Localization: Decomposing Multi-concept Images for Subject-Driven Text-to-Image Generation",
        "Junjie Shentu, Matthew Watson, Noura Al Moubayed",
        2024,
        "2402.09966",
        differs=(
            "Read off the authors' code, in which hard guidance asks for the mask and soft guidance for nothing "
            "outside of it.",
            "Maps of one number of places are averaged; the authors enlarge those of several, and level each first.",
            "The loss of what is denoised, which the authors take within the mask alone, is the caller's, and so are "
            "pictures of the class that keep what is known.",
        ),
    )
    weight: NonNegativeFloat = 1.0  # beside the loss of what is denoised; the authors: 1, shared among words
    role: RoleName = "word"  # the new word, or words
    mask: RoleName = "mask"  # the places of its thing, among the queries
    inside: NonNegativeFloat = 1.0  # say of the places in the mask; 1 is the authors' hard guidance, 0 the soft one

    @classmethod
    def example(cls) -> TextualLocalization:
        return cls(role="marked", mask="answer")

    def loss(self, maps: Tensor, call: Call) -> Tensor:
        words = call.marked(self.role)[:, 0].expand(len(maps), -1)
        mask = call.marked_queries(self.mask)[:, 0, :, None].expand(len(maps), -1, 1).to(maps)
        far = (levelled(maps) - mask).square() * (1 - mask + self.inside * mask)
        return self.weight * (far.mean(1) * words).sum() / words.sum().clamp(min=1)


if __name__ == "__main__":
    import torch

    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 12))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    with attach(model, TextualLocalization(), roles={"word": ((2, 3),), "mask": ((0, 4),)}) as run:
        for _ in range(4):
            loss = run(input_ids=ids, decoder_input_ids=ids, labels=ids).loss  # the penalty is in it
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            print(loss.item(), run.loss().item())
