"""x + [sin(w i + r dt); cos(w i + r dt)]: an event is told its number, and how long after the last one it came."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Layer, Method, Paper, Site, SiteError, at
from heedful.kit.running import wide


class TimeShiftedPositions(Method):
    """Positions whose waves are shifted by time, for sequences of events. For models trained with it.

    The time since the event before is one channel of what the model is handed as `inputs_embeds`, which goes on as
    zero. It is read as it enters the first layer, so that a model must not change it before: with positions or a
    norm of its own, say.
    """

    paper = Paper(
        "P036",
        "Self-Attentive Hawkes Processes",
        "Qiang Zhang, Aldo Lipani, Omer Kirnap, Emine Yilmaz",
        2020,
        "1907.07561",
        "ICML 2020",
        differs=(
            "The paper's time encoding alone. What makes intensities of a model's last states, and their likelihood, "
            "is the user's; the claim has them.",
            "Shifts are of the time since the event before, as in the authors' code; the paper's formula has the time "
            "of the event itself.",
            "The authors hand times beside tokens; here they come in a channel of the embeddings.",
            "Initial shifts are those of the authors' linear map of one number, drawn by a seeded generator.",
        ),
    )
    one_text = True
    channel: int = -1  # of an embedding, where the time since the event before stands

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        if layer.number:
            return {}
        random = torch.Generator().manual_seed(layer.number)
        return {"shift": torch.rand((layer.width + 1) // 2, generator=random) * 2 - 1}

    def idle(self, call: Call) -> bool:
        return call.layer > 0

    @at(Site.EMBEDDING)
    def place(self, x: Tensor, call: Call) -> Tensor:
        width = x.shape[-1]
        if not -width <= self.channel < width:
            raise SiteError(f"{self!r}: embeddings have {width} channels, and times must stand in one of them")
        waves = self.angles(x[..., self.channel], call)
        waves = torch.cat([waves.sin(), waves.cos()], -1)[..., :width]
        there = torch.tensor([self.channel % width], device=x.device)
        return x.index_fill(-1, there, 0.0) + waves.to(x.dtype)

    def angles(self, interval: Tensor, call: Call) -> Tensor:
        """Of tokens that came so long after the ones before them `[b n]`, half as many as channels, `[b n e/2]`."""
        interval, shift = wide(interval, call.params["shift"])
        rates = 10000.0 ** (-torch.arange(len(shift), device=interval.device, dtype=shift.dtype) / len(shift))
        return call.q_pos[:, 0, :, None] * rates + interval[..., None] * shift


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("gpt2")
    events = torch.randn(1, 6, model.config.n_embd)
    with attach(model, TimeShiftedPositions()) as run:
        print(run(inputs_embeds=events).logits.std(), run.activity())
