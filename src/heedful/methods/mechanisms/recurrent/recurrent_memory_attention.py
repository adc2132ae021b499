"""Out = a A(chunk) + b A(window) + c A(slots), slot = g oldest + (1 - g) mean of a past chunk: a queue with a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.authoring import Call, FieldError, Layer, Method, Paper, PositiveInt, Site, SiteError, at
from heedful.core.positions import spread_heads
from heedful.core.state import Until
from heedful.kit.running import grouped, past_keys, text_keys, wide
from heedful.kit.seen import softmax_over


class RecurrentMemoryAttention(Method):
    """Tokens see their chunk, a window of it, and a few slots for what was before. For causal models trained so."""

    paper = Paper(
        "P197",
        "Recurrent Memory-Augmented Transformers with Chunked Attention for Long-Context Language Modeling",
        "Ankit Kashyap",
        2025,
        "2507.00453",
        differs=(
            "Written from the paper's abstract and what others restate of its body, which was not at hand: three "
            "attentions with weights that add up to 1, and a memory that is a queue, with a gate like a recurrent "
            "net's between an old slot and what stands for a chunk.",
            "How the gate and the queue go together is a reading of ours: a chunk goes into the slot that is the "
            "oldest, mixed with what that held, by one gate a key head, told by both.",
            "A chunk is the mean of its keys and that of its values, which are turned by their places where the model "
            "turns keys; the memory is empty at a text's start, and its empty slots take part in the softmax.",
            "The paper's sizes, but for its chunks of 512 tokens, are not known here.",
        ),
    )
    chunk: PositiveInt = 512  # tokens of a chunk; the paper's
    window: PositiveInt = 64  # tokens of a window, of which a chunk has several side by side
    slots: PositiveInt = 32  # of the memory

    def __post_init__(self) -> None:
        if self.chunk % self.window:
            rule = f"must divide the chunk's {self.chunk} tokens"
            raise FieldError(self, "window", self.window, rule, self.chunk)

    @classmethod
    def example(cls) -> RecurrentMemoryAttention:
        return cls(4, 2, 2)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        size = layer.head_dim + layer.value_dim
        return {
            "mix": torch.zeros(3),
            "old": torch.zeros(layer.kv_heads, size),
            "new": torch.zeros(layer.kv_heads, size),
            "keeps": torch.zeros(layer.kv_heads),
        }

    @at(Site.MIX)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        if not call.mask.causal:
            raise SiteError(f"layer {call.layer}: a memory of past chunks needs a causal call; restrict it with .on()")
        q, k, v = wide(*qkv)
        slots, base = self.filled(torch.cat([k, v], -1), call)
        n, total = q.shape[2], k.shape[2]
        past, text, found = past_keys(call, n, total), text_keys(call, total), []
        shares = call.params["mix"].to(q).softmax(0)
        for start in range(0, n, self.chunk):
            rows = slice(start, min(start + self.chunk, n))
            cols = slice(max(0, past + start - self.chunk + 1), past + rows.stop)
            pairs = call.tile(rows, cols).pairs
            keep = pairs.k <= pairs.q
            if text is not None:
                keep = keep & spread_heads(text[..., cols], call.heads)[..., None, :]
            scores = grouped(q[:, :, rows], k[:, :, cols].mT) * call.scale
            near = [softmax_over(scores, keep & (pairs.q // s == pairs.k // s)) for s in (self.chunk, self.window)]
            heads = grouped(shares[0] * near[0] + shares[1] * near[1], v[:, :, cols])
            # of the slots so far a query sees the last that were filled before its chunk
            first = call.queries.take(rows).position // self.chunk - base[..., None]  # [b g r]
            low = max(0, int(first.min()))
            near_slots = slots[:, :, low : max(low, int(first.max())) + self.slots]
            place = torch.arange(near_slots.shape[2], device=q.device) + low
            place = place - spread_heads(first, call.heads)[..., None]
            seen = (place >= 0) & (place < self.slots)
            keys, values = near_slots.split([k.shape[3], v.shape[3]], -1)
            weights = softmax_over(grouped(q[:, :, rows], keys.mT) * call.scale, seen)
            found.append(heads + shares[2] * grouped(weights, values))
        return torch.cat(found, 2)

    def filled(self, given: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """What was put into slots, one after another `[b g s c]`, of keys' `[b g k c]`; the first so many were before.

        Beside them the number of the chunk `[b g]` that comes next after those.
        """
        kept, n, total = call.state.cache, len(call.queries), given.shape[2]
        end, first, past = kept.get("end"), call.queries.first or 0, past_keys(call, n, total)
        goes_on = bool(first) and end is not None and bool(end.eq(first).all())
        before = kept["slots"] if goes_on else given.new_zeros(*given.shape[:2], self.slots, given.shape[3])
        base = kept["chunks"] if goes_on else call.keys.index.new_zeros(given.shape[:2])
        cols = slice(max(0, past - self.chunk + 1) if goes_on else 0, past + n)
        number = call.keys.take(cols).position // self.chunk - base[..., None]  # [b g cols]
        held, text = number >= 0, text_keys(call, total, cols)
        weight = (held if text is None else held & text).to(given)
        number = number.clamp(min=0)
        means = given.new_zeros(*given.shape[:2], int(number.max()) + 1, given.shape[3] + 1)
        marked = torch.cat([given[:, :, cols], torch.ones_like(given[:, :, cols, :1])], -1) * weight[..., None]
        means = means.scatter_add(2, number[..., None].expand(marked.shape), marked)
        slots = [*before.unbind(2)]
        p = {name: x.to(given) for name, x in call.params.items()}
        for mean in (means[..., :-1] / means[..., -1:].clamp(min=1)).unbind(2):
            old = slots[-self.slots]
            gate = ((old * p["old"] + mean * p["new"]).sum(-1) + p["keeps"]).sigmoid()[..., None]
            slots.append(gate * old + (1 - gate) * mean)
        found = torch.stack(slots, 2)
        chunks = ((call.q_pos[..., -1] + 1) // self.chunk).expand(base.shape)
        last = (chunks - base).clamp(min=0)[..., None] + torch.arange(self.slots, device=given.device)
        kept["slots"] = found.gather(2, last[..., None].expand(*last.shape, found.shape[3]))
        kept["chunks"] = chunks.clamp(min=0)
        kept["end"] = Until(torch.full((len(given),), first + n, device=given.device))
        return found, base


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, RecurrentMemoryAttention(4, 2, 2)) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print(run.difference(**inputs), run.activity())
