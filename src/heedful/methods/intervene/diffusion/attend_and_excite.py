"""x <- x - rate dL/dx with L = 1 - min over subjects of the highest place of their map: no word may be left out."""

from __future__ import annotations

from torch import Tensor

from heedful.core.call import Call
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, RoleName
from heedful.methods.intervene.diffusion._map_loss import Guidance


class AttendAndExcite(Guidance):
    """Moves what a diffusion model denoises until every subject has a place in the picture that looks at it.

    Roles name the subjects' words among the keys: `roles={"subjects": ((2, 3), (5, 6))}`.
    """

    paper = Paper(
        "2301.13826",
        "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models",
        "Hila Chefer, Yuval Alaluf, Yael Vinker, Lior Wolf, Daniel Cohen-Or",
        2023,
        "2301.13826",
        "SIGGRAPH 2023",
        differs=(
            "Moving on within a step until a threshold is met, which the authors do at steps 0, 10 and 20, is left to "
            "the caller: call run and moved again.",
            "Maps are averaged over the layers it is attached to; the authors take those of 16 x 16 places.",
            "The pictures of a batch are moved together; the authors' code takes one at a time.",
        ),
    )
    role: RoleName = "subjects"  # the words that must not be left out, each for itself
    text: str = ""  # the words that share the places; "": all; the authors: without the first and the last token
    sharpness: PositiveFloat = 100.0  # of that sharing; the authors: 100

    @classmethod
    def example(cls) -> AttendAndExcite:
        return cls(role="marked")

    def loss(self, maps: Tensor, call: Call) -> Tensor:
        subjects = call.marked(self.role)[:, 0]
        text = call.marked(self.text)[:, 0] if self.text else call.k_pos[:, 0] >= 0
        most = self.shared(maps, text, self.sharpness).amax(1)  # [b k]
        return (1 - most).masked_fill(~(subjects & text), 0.0).amax(-1).sum()


if __name__ == "__main__":
    import torch

    from heedful import attach, models

    model = models.tiny("bart")
    ids = torch.randint(3, 60, (2, 12))
    method = AttendAndExcite(sharpness=1.0)
    x = model.get_input_embeddings()(ids).detach()  # stands for a noised picture
    with attach(model, method, roles={"subjects": ((2, 3), (5, 6))}) as run:
        for i in range(4):
            x.requires_grad_()
            run(input_ids=ids, decoder_inputs_embeds=x)
            print(run.loss().item())
            x = method.moved(x, run.loss(), i, of=8)
