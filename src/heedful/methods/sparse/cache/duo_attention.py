"""Heads by a gate learned on gate A + (1 - gate) A_near: the high ones keep all, the others sinks and a window."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import CachedKV, Call
from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.mask import First, Mask, Rule, Window
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.kit.budget import all_fit, newest
from heedful.methods.sparse.cache._fits import among_best

IGNORED = -100  # the label of tokens that do not count, as everywhere in transformers
GOOD_BATCHES = [{"input_ids": "...", "labels": "..."}]


class DuoAttention(Method):
    """Retrieval heads keep the whole cache; streaming heads see, and keep, a few first tokens and a window.

    Fit it first: `fit` takes batches of the model's inputs with "labels", -100 where a token does not count: prompts
    that hide something far back and end by repeating it, whose last tokens count.
    """

    paper = Paper(
        "P258",
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        "Guangxuan Xiao, Jiaming Tang, Jingwei Zuo, Junxian Guo, Shang Yang, Haotian Tang, Yao Fu, Song Han",
        2025,
        "2410.10819",
        "ICLR 2025",
        differs=(
            "A gate mixes the two patterns of one stream, as in the paper; the authors' code takes the full half from "
            "the unedited model's stream.",
            "Streaming heads see sinks and window while a prompt is read, as in the authors' training; their code for "
            "generation lets the first chunk see everything.",
            "The defaults are the authors' deployment's 64 sinks and 256 tokens, for a fit too; their training scripts "
            "and released configurations have 128 sinks.",
            "Keys keep their positions in the text, and the window counts the query itself.",
            "Steps are passes over the batches given; the authors take 2000 of long passkey prompts, and warm their "
            "learning rate up and down.",
        ),
    )
    share: Share = 0.5  # of all key heads that stay retrieval heads; the authors: 0.25 (MHA) and 0.5 (GQA)
    sinks: NonNegativeInt = 64  # tokens; the authors' deployment: 64, their training scripts: 128
    window: PositiveInt = 256  # tokens; the authors' training: 256
    gates: Fitted | None = None  # "gates.LAYER" [g], 1 where a head needs everything
    seed: int | None = None  # without a fit: random gates, the control
    epochs: PositiveInt = 1  # passes of a fit over its batches
    rate: PositiveFloat = 0.02  # AdamW's learning rate in a fit; the paper: 0.02
    penalty: PositiveFloat = 0.05  # weight of the gates' mean in a fit; the paper: 0.05

    @classmethod
    def neutral(cls) -> DuoAttention:
        return cls(share=1.0, seed=0)

    @classmethod
    def example(cls) -> DuoAttention:
        return cls(sinks=1, window=4, seed=0)

    def rests(self, tokens: int) -> str | None:
        return all_fit(self.sinks + self.window, tokens, "smaller sinks or window")

    @property
    def stream(self) -> Rule:
        return Window(self.window) | First(self.sinks)

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        size = call.heads // call.kv_heads
        streaming = (~self.retrieving(call)).repeat_interleave(size).nonzero().flatten().tolist()
        return mask & self.stream.on(tuple(streaming), call.heads) if streaming else mask

    @at(Site.CACHE)
    def forget(self, entries: CachedKV, call: Call) -> Tensor:
        # the next query will see one more: itself
        keep = (entries.positions.position < self.sinks) | newest(entries, call, self.window - 1)
        return entries.is_text & (keep | self.retrieving(call)[:, None].to(keep.device))

    def retrieving(self, call: Call) -> Tensor:
        """Which key heads of the layer keep everything, `[g]`."""
        return among_best(self, "gates", (("gates", self.share),), call)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> DuoAttention:
        """Learn a gate for each key head: final states of the counted tokens as they were, and as few gates open."""
        given = list(batches)
        if not given or any("labels" not in batch for batch in given):
            raise FieldError(self, "batches", len(given), 'must be 1 or more, each with "labels"', GOOD_BATCHES)
        with context.attach(_Gated(self.stream)) as run:

            def states(batch: Mapping[str, Any]) -> Tensor:
                inputs = {name: x for name, x in batch.items() if name != "labels"}
                out = run(**inputs, use_cache=False, output_hidden_states=True)
                found: Tensor = out.hidden_states[-1][batch["labels"] != IGNORED]
                return found.float()

            with torch.no_grad():  # all gates are open still: this is the model itself
                requested = [states(batch) for batch in given]
            gates = run.parameters()
            optimiser = torch.optim.AdamW(gates, lr=self.rate, weight_decay=0.0)
            for _ in range(self.epochs):
                for batch, want in zip(given, requested, strict=True):
                    # the paper's L1 norm of the gates is their mean, since they are held at 0 or above
                    loss = (states(batch) - want).square().mean()
                    (loss + self.penalty * torch.cat(gates).mean()).backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    with torch.no_grad():
                        for gate in gates:
                            gate.clamp_(0, 1)
            found = {int(place.split(".")[1]): x.float() for place, x in run.state_dict().items()}
        return replace(self, gates=Fitted({f"gates.{layer}": x for layer, x in found.items()}))


class _Gated(Method):
    """Mixes each head's pattern with what it would be over sinks and window alone, by learned gates."""

    stream: Rule

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"gate": torch.ones(layer.kv_heads)}

    @at(Site.PATTERN)
    def mix(self, pattern: Tensor, call: Call) -> Tensor:
        near = pattern * self.stream.keeps(call.pairs)
        near = near / near.sum(-1, keepdim=True).clamp(min=torch.finfo(near.dtype).tiny)
        gate = call.spread(call.params["gate"].to(pattern)[None, :, None, None])
        return gate * pattern + (1 - gate) * near  # no rounding where a gate is 1


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    story = tokenizer("The code is 7 4 9 1. " + "The sea is calm. " * 20 + "The code is 7 4 9 1.", return_tensors="pt")
    labels = story.input_ids.clone()
    labels[:, :-9] = IGNORED
    method = fit(DuoAttention(sinks=4, window=16, epochs=5, rate=0.1), model, [{**story, "labels": labels}])
    with attach(model, method) as run:
        print(tokenizer.decode(run.generate(**story, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
