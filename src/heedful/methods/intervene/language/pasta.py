"""A_ij <- alpha A_ij / C_i for keys j outside a marked span, A_ij / C_i inside it, in chosen heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import Layers, PositiveInt, RoleName
from heedful.core.reweight import Reweight, reweights
from heedful.core.sites import Site, reads
from heedful.core.summary import Summary
from heedful.kit.batches import Batch
from heedful.kit.head_search import Head, gains, heads_here


class PASTA(Method):
    """Emphasises a marked part of the prompt by turning down the rest of it.

    Acts in every head until `fit` has chosen some. A fit takes batches with "roles" that mark the part, and "options"
    `[b c]` (first tokens of answers, the right one first) or "target" `[b]`; batches of several tasks name their
    "task", and a head must be among the best `count` of each.
    """

    paper = Paper(
        "2311.02262",
        "Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs",
        "Qingru Zhang, Chandan Singh, Liyuan Liu, Xiaodong Liu, Bin Yu, Jianfeng Gao, Tuo Zhao",
        2023,
        "2311.02262",
        "ICLR 2024",
        differs=(
            "The authors rank heads by their task's own score, accuracy mostly, over 1000 samples a task; here by the "
            "log-probability of the right answer on the batches given.",
            "A fit tries every head of every layer, or those of the layers in `layers`.",
            "What a learned sink logit takes of a row stays what it is: it is no token of the prompt.",
        ),
    )
    chunk_invariant = False  # tokens that the model adds are not turned down, and so not what they would be in a prompt
    role: RoleName = "marked"  # the spans to emphasise
    alpha: Annotated[float, Interval(ge=1e-30, le=1e30)] = 0.01  # factor on what lies outside them; the paper: 0.01
    heads: tuple[Head, ...] | None = None  # (layer, head) pairs that a fit chose; None: every head
    # heads that a fit takes from each task's best; the paper: 300 to 500 of 1024, less by intersection
    count: PositiveInt = 50
    layers: Layers | None = None  # layers whose heads a fit tries; None: all

    @classmethod
    def neutral(cls) -> PASTA:
        return cls(alpha=1.0)

    def idle(self, call: Call) -> bool:
        if self.alpha == 1 or call.cross:
            return True
        return self.heads is not None and not heads_here(self, self.heads, call)

    @reads(Site.QUERY)
    def note_prompt(self, query: Tensor, call: Call) -> None:
        """Where the prompt ends."""
        if call.phase is Phase.PREFILL or "end" not in call.state.cache:
            end = torch.where(call.is_text, call.q_pos, -1).amax(-1, keepdim=True) + 1
            call.state.cache["end"] = end.expand(len(query), -1, -1)  # [b 1 1]

    @reweights()
    def turn_down(self, summary: Summary, call: Call) -> Reweight:
        later = call.pairs.k[:, :, 0] >= call.state.cache["end"]
        kept = call.spread(call.marked(self.role)) | later  # [b|1 h|1 k]
        # rows add up to one again, so to turn the rest down is to turn these up, and they are few
        found = Reweight(torch.where(kept, 1 / self.alpha, 1.0))
        return found if self.heads is None else found.on(heads_here(self, self.heads, call), call.heads)

    def fit(self, context: FitContext, batches: Iterable[Batch]) -> PASTA:
        """Steer heads one by one, and keep those that are among the best of every task."""
        tasks: dict[str, list[Batch]] = {}
        for batch in batches:
            tasks.setdefault(str(batch.get("task", "")), []).append({k: v for k, v in batch.items() if k != "task"})
        if not tasks or any(self.role not in batch.get("roles", {}) for found in tasks.values() for batch in found):
            good = [{"input_ids": "...", "target": "token ids", "roles": {self.role: ((4, 9),)}}]
            raise FieldError(
                self, "batches", len(tasks), f'must be 1 or more, each with roles naming "{self.role}"', good
            )
        tried = [(size.number, h) for size in context.layers for h in range(size.heads)]
        if self.layers is not None:
            tried = [place for place in tried if place[0] in self.layers]
        best = []
        for found in tasks.values():
            gained = gains(context, replace(self, heads=None), tried, found)
            best.append(set(sorted(tried, key=lambda place: -gained[place])[: self.count]))
        return replace(self, heads=tuple(sorted(set.intersection(*best))))


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = "The code of the apple is red. The code of the stone is blue. So the code of the"
    inputs = tokenizer(text, return_tensors="pt")
    for roles in ({"marked": ((0, 8),)}, {"marked": ((8, 16),)}):
        with torch.no_grad(), attach(model, PASTA(alpha=0.1).on(layers=range(8, 16)), roles=roles) as run:
            top = run(**inputs).logits[0, -1].softmax(-1).topk(3)
        print(roles, [(tokenizer.decode(i), round(float(p), 3)) for p, i in zip(*top, strict=True)])
