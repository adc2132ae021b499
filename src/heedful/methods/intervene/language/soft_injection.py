"""Task embeddings in place of examples: at the last prompt token each head becomes (1 - a) h + a t."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.entry import FitContext, Layer
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import PositiveFloat, PositiveInt, Share
from heedful.core.sites import Site, at
from heedful.methods.intervene.language._task import learn_answers, mean_heads, split


def _mixed(heads: Tensor, gate: Tensor, task: Tensor, call: Call) -> Tensor:
    """Heads `[b h q d]` with the last token's mixed by the gates `[h]`."""
    row = torch.arange(heads.shape[2], device=heads.device) == call.last
    gate = gate.to(heads)[:, None, None]
    return torch.where(row[:, None, :, None], (1 - gate) * heads + gate * task.to(heads)[:, None], heads)


class SoftInjection(Method):
    """Gives a prompt without examples the heads of prompts with examples, by a gate learned for each head."""

    paper = Paper(
        "P283",
        "Soft Injection of Task Embeddings Outperforms Prompt-Based In-Context Learning",
        "Jungwon Park, Wonjong Rhee",
        2025,
        "2507.20906",
        differs=(
            "The gates of the last step are kept, as in effect by the authors' code: no validation data are needed.",
        ),
    )
    one_text = True
    causal = False  # what a token gets depends on whether it is the last of the prompt
    chunk_invariant = False  # a prompt read in pieces has the last token of every piece edited
    task: Fitted | None = None  # t.<layer> [h d] and a.<layer> [h], from a fit
    gate: Share | None = None  # one gate for every head instead of the fitted ones, 0 to 1; without a fit t is 0
    steps: PositiveInt = 400  # gradient steps of a fit; the paper: 400
    rate: PositiveFloat = 0.2  # Adam's learning rate in a fit; the paper: 0.2

    @classmethod
    def neutral(cls) -> SoftInjection:
        return cls(gate=0.0)

    @classmethod
    def example(cls) -> SoftInjection:
        return cls(gate=0.5)

    def idle(self, call: Call) -> bool:
        return self.gate == 0 or call.phase is Phase.DECODE

    @at(Site.HEAD_OUTPUT)
    def inject(self, heads: Tensor, call: Call) -> Tensor:
        h, d = heads.shape[1], heads.shape[3]
        if self.task is None:
            if self.gate is None:
                raise FieldError(self, "task", None, "must be fitted with heedful.fit(), or gate be given", "gate=0.5")
            task, gate = heads.new_zeros(h, d), heads.new_zeros(h)
        else:
            if 2 * call.depth != len(self.task) or self.task[f"t.{call.layer}"].shape != (h, d):
                rule = f"was fitted to another model: {call.depth} layers and, in {call.layer}, [h d] = {[h, d]} needed"
                raise FieldError(self, "task", self.task, rule, "a task fitted to this model")
            task, gate = self.task[f"t.{call.layer}"], self.task[f"a.{call.layer}"]
        return _mixed(heads, gate if self.gate is None else torch.full_like(gate, self.gate), task, call)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SoftInjection:
        """Mean heads of few-shot prompts, then gates that give zero-shot prompts their answers.

        A batch without "target" holds prompts with examples. One with "target", the answers' first tokens `[b]`, holds
        prompts without; `steps` gradient steps go round these. Everything else in a batch is the model's input.
        """
        shots, bare = split(self, batches)
        task = {f"t.{layer}": mean for layer, mean in mean_heads(context, shots).items()}
        with context.attach(_Gates(Fitted(task))) as run:
            learn_answers(run, bare, self.steps, torch.optim.Adam(run.parameters(), lr=self.rate))
            learned = {name.split(".")[1]: p for name, p in run.state_dict().items()}
        gates = {f"a.{layer}": p.float().sigmoid() for layer, p in learned.items()}
        return replace(self, task=Fitted({**task, **gates}))


class _Gates(Method):
    """Gates that learn, a half at first."""

    task: Fitted

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"logit": torch.zeros(layer.heads)}

    @at(Site.HEAD_OUTPUT)
    def inject(self, heads: Tensor, call: Call) -> Tensor:
        return _mixed(heads, call.params["logit"].sigmoid(), self.task[f"t.{call.layer}"], call)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    tokenizer.padding_side = "left"
    pairs = {"hot": " cold", "big": " small", "up": " down", "old": " young", "fast": " slow", "day": " night"}
    words = list(pairs)
    shots = "".join(f"Q: {a}\nA:{b}\n\n" for a, b in pairs.items())
    bare = tokenizer([f"Q: {w}\nA:" for w in words], return_tensors="pt", padding=True)
    target = torch.tensor([tokenizer(pairs[w]).input_ids[0] for w in words])
    few = tokenizer([f"{shots}Q: {w}\nA:" for w in ("left", "rich")], return_tensors="pt", padding=True)
    method = fit(SoftInjection(steps=10), model, [few, {**bare, "target": target}])
    asked = tokenizer(["Q: high\nA:", "Q: dark\nA:"], return_tensors="pt", padding=True)
    with torch.no_grad(), attach(model, method) as run:
        print([tokenizer.decode(token) for token in run(**asked).logits[:, -1].argmax(-1)])
