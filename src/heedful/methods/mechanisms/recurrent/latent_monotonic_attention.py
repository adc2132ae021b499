"""Softmax over t - 5 <= j < t + 5, t behind the place of the token before, u: p(t | u) = softmax(s_j, j > u) of t."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, Method, NonNegativeFloat, Paper, PositiveInt, Site, at, penalises
from heedful.methods.mechanisms.recurrent._walk import looked_last, remember


class LatentMonotonicAttention(Method):
    """A head goes through the source, place by place or further, and sees what is around the place it has come to.

    For encoder-decoders that are trained on with it after softmax, on all that is to be written at once, and that write
    fewer tokens than they read. In training the places are those of the likeliest path, which is to grow likelier; at
    rest a token takes the likeliest place behind the last one.
    """

    paper = Paper(
        "P161",
        "A study of latent monotonic attention variants",
        "Albert Zeyer, Ralf Schlüter, Hermann Ney",
        2021,
        "2103.16710",
        differs=(
            "This is the authors' local windowed attention that begins from a model trained with soft attention; hard "
            "and segmental attention are not here. Formulas are those of the authors' configurations.",
            "The likeliest path is that of places alone, exactly; the authors look for that of places and words by "
            "beam search, and keep the last epoch's where that was likelier.",
            "At rest a token takes one place; the authors look for places and words together by beam search.",
            "Scores are the model's own products, head by head, and each head has a path; the authors have one head, "
            "whose net of one layer of tanh is also told what was looked at so far.",
        ),
    )
    whole_map = True
    causal = False  # in training the likeliest path is that of all that is written
    subjects = ("cross",)
    window: PositiveInt = 10  # places, half of them before the one a token has come to; the authors: 10
    weight: NonNegativeFloat = 0.1  # of -log p(t | before) in training, per token; the authors: 0.1

    @classmethod
    def example(cls) -> LatentMonotonicAttention:
        return cls(3)

    def idle(self, call: Call) -> bool:
        return not call.cross

    @at(Site.NORMALISE)
    def weigh(self, scores: Tensor, call: Call) -> Tensor:
        lowest = torch.finfo(scores.dtype).min
        seen = torch.ones_like(scores, dtype=torch.bool) if call.keep is None else call.keep.expand_as(scores)
        columns = torch.arange(scores.shape[-1], device=scores.device)
        last = (seen * columns).amax(-1)  # [b h r]
        ahead = scores.masked_fill(~seen, lowest).flip(-1).logcumsumexp(-1).flip(-1)  # of this place and all behind it
        moves = call.is_text & seen.any(-1)
        start = looked_last(self, call, last.new_zeros(scores.shape[:2]))
        known = scores.detach().masked_fill(~seen, -torch.inf)
        if call.training:
            places, starts = self.likeliest_path(known, ahead.detach(), last, moves, start)
        else:
            places, starts = self.walk(known, last, moves, start)
        remember(call, torch.where(moves[..., -1], places[..., -1] + 1, starts[..., -1]))
        begin = starts.minimum(last)[..., None]
        unlikely = (ahead.gather(-1, begin) - scores.gather(-1, places[..., None]))[..., 0]
        # a penalty is told of a pattern, which no more knows of paths
        call.state.forward[call.name] = (unlikely * moves).sum() / moves[:, :1].sum().clamp(min=1)
        far = columns - places[..., None] + self.window // 2
        near = seen & (far >= 0) & (far < self.window)
        return scores.masked_fill(~near, lowest).softmax(-1).masked_fill(~near, 0.0)

    @penalises(Site.PATTERN, when="weight")
    def unlikely(self, weights: Tensor, call: Call) -> Tensor | None:
        """-log p(t | before), added up over heads, the mean over tokens."""
        found: Tensor = call.state.forward.pop(call.name)
        return self.weight * found if call.training else None

    def walk(self, scores: Tensor, last: Tensor, moves: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest place of each token behind that of the token before, and the place behind that, `[b h r]`."""
        columns, places, starts = torch.arange(scores.shape[-1], device=scores.device), [], []
        for i in range(scores.shape[2]):
            begin = start.minimum(last[:, :, i])
            place = scores[:, :, i].masked_fill(columns < begin[..., None], -torch.inf).argmax(-1)
            places.append(place)
            starts.append(start)
            start = torch.where(moves[:, :, i], place + 1, start)
        return torch.stack(places, 2), torch.stack(starts, 2)

    def likeliest_path(
        self, scores: Tensor, ahead: Tensor, last: Tensor, moves: Tensor, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of all tokens together, by Viterbi's algorithm over the place behind each token's."""
        n, k = scores.shape[2:]
        behind = torch.arange(k + 1, device=scores.device)
        value = scores.new_full((*start.shape, k + 1), -torch.inf).scatter(-1, start[..., None], 0.0)
        back = []
        for i in range(n):
            end = last[:, :, i, None]
            left = value - ahead[:, :, i].gather(-1, behind.minimum(end))
            best, come_from = left.cummax(-1)
            reach = torch.where(behind[:-1] == end, end + 1, behind[:-1])  # in the last place a token may stay
            longer = scores[:, :, i] + best.gather(-1, reach)
            longer = torch.cat([longer.new_full((*start.shape, 1), -torch.inf), longer], -1)
            come_from = torch.cat([come_from[..., :1], come_from.gather(-1, reach)], -1)
            moved = moves[:, :, i, None]
            value = torch.where(moved, longer, value)
            back.append(torch.where(moved, come_from, behind))
        now, places, starts = value.argmax(-1), [], []
        for come_from in reversed(back):
            before = come_from.gather(-1, now[..., None])[..., 0]
            places.append((now - 1).clamp(min=0))
            starts.append(before)
            now = before
        return torch.stack(places[::-1], 2), torch.stack(starts[::-1], 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("bart").train()
    ids = torch.arange(3, 19)[None]
    with attach(model, LatentMonotonicAttention(), only=("model.decoder.layers.0.encoder_attn",)) as run:
        run(input_ids=ids, decoder_input_ids=ids[:, :5], labels=ids[:, :5].contiguous()).loss.backward()
        print(run.loss().item(), run.activity())
