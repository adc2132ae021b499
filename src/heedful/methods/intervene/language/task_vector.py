"""x + v at the last prompt token, v = sum_h w_h O_h m_h: each layer's mean heads of prompts with examples, weighted."""

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
from heedful.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from heedful.core.sites import Site, at
from heedful.kit.seeds import drawn_for
from heedful.methods.intervene.language._task import learn_answers, mean_heads, split


class LearnableTaskVector(Method):
    """Gives a prompt without examples what heads write into the stream when there are some, by a weight for each."""

    paper = Paper(
        "P260",
        "Learning Task Representations from In-Context Learning",
        "Baturay Saglam, Xinyang Hu, Zhuoran Yang, Dionysis Kalogerias, Amin Karbasi",
        2025,
        "2502.05390",
        "Findings of ACL 2025",
        differs=(
            "A head's share of the stream is its own part of the output projection, as in the authors' regression "
            "code, without the projection's bias, which theirs has in every share; their language code cuts the "
            "projection's whole output into as many pieces as there are heads.",
            "Only the prompt's last token gets the vector; the authors' code gives it to every generated token too.",
            "The weights of the last step are kept, not those of the lowest loss, and examples are the caller's, not "
            "drawn anew for each step with shuffled answers.",
        ),
    )
    one_text = True
    causal = False  # what a token gets depends on whether it is the last of the prompt
    chunk_invariant = False  # a prompt read in pieces has the last token of every piece edited
    vectors: Fitted | None = None  # v.<layer> [e] and the weights w.<layer> [h], from a fit
    strength: float = 1.0  # factor on the vectors; the authors: 1
    steps: PositiveInt = 2000  # gradient steps of a fit; the authors' code: up to 100000, whose best are kept
    rate: PositiveFloat = 5e-5  # Adam's learning rate in a fit; the authors' code: 5e-5
    start: NonNegativeFloat = 1.0  # spread of the random weights that a fit starts from; the authors' code: 1
    seed: int | None = None  # without a fit: random vectors; in a fit: of the first weights, 0 unless given

    @classmethod
    def neutral(cls) -> LearnableTaskVector:
        return cls(strength=0.0)

    @classmethod
    def example(cls) -> LearnableTaskVector:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return self.strength == 0 or call.phase is Phase.DECODE

    @at(Site.RESIDUAL)
    def add(self, stream: Tensor, call: Call) -> Tensor:
        return _added(stream, self.strength * self._vector(stream.shape[-1], call.layer), call)

    def _vector(self, width: int, layer: int) -> Tensor:
        if self.vectors is None:
            return torch.randn(width, generator=drawn_for(self, "vectors", layer))
        found = self.vectors.get(f"v.{layer}")
        if found is None or found.shape != (width,):
            rule = f"was fitted to another model: a vector of width {width} is needed in layer {layer}"
            raise FieldError(self, "vectors", self.vectors, rule, "a fit to this model")
        return found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> LearnableTaskVector:
        """Mean heads of few-shot prompts, then weights with which they give zero-shot prompts their answers.

        A batch without "target" holds prompts with examples. One with "target", the answers' first tokens `[b]`, holds
        prompts without; `steps` gradient steps go round these. Everything else in a batch is the model's input.
        """
        shots, bare = split(self, batches)
        written = {
            layer: torch.einsum(
                "ehd,hd->he", context.weights(layer).o.float(), mean.to(context.weights(layer).o.device)
            )
            for layer, mean in mean_heads(context, shots).items()
        }
        parts = Fitted({f"t.{layer}": x for layer, x in written.items()})
        with context.attach(_Weights(parts, self.start, self.seed or 0)) as run:
            learn_answers(run, bare, self.steps, torch.optim.Adam(run.parameters(), lr=self.rate))
            weights = {int(name.split(".")[1]): w.float() for name, w in run.state_dict().items()}
        found = {f"v.{i}": weights[i].to(x) @ x for i, x in written.items()}
        return replace(self, vectors=Fitted({**found, **{f"w.{i}": w for i, w in weights.items()}}))


class _Weights(Method):
    """Weights that learn."""

    parts: Fitted  # t.<layer> [h e]: what each head writes
    start: float = 1.0
    seed: int = 0

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(4099 * self.seed + layer.number)
        return {"w": self.start * torch.randn(layer.heads, generator=source)}

    @at(Site.RESIDUAL)
    def add(self, stream: Tensor, call: Call) -> Tensor:
        weights = call.params["w"]
        return _added(stream, weights @ self.parts[f"t.{call.layer}"].to(weights), call)


def _added(stream: Tensor, vector: Tensor, call: Call) -> Tensor:
    """The stream `[b n e]` with the vector on top of each text's last token."""
    row = torch.arange(stream.shape[1], device=stream.device) == call.last
    return torch.where(row[..., None], stream + vector.to(stream), stream)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    tokenizer.padding_side = "left"
    pairs = {"hot": " cold", "big": " small", "up": " down", "old": " young", "fast": " slow", "day": " night"}
    shots = "".join(f"Q: {a}\nA:{b}\n\n" for a, b in pairs.items())
    bare = tokenizer([f"Q: {w}\nA:" for w in pairs], return_tensors="pt", padding=True)
    target = torch.tensor([tokenizer(answer).input_ids[0] for answer in pairs.values()])
    few = tokenizer([f"{shots}Q: {w}\nA:" for w in ("left", "rich")], return_tensors="pt", padding=True)
    method = fit(LearnableTaskVector(steps=10, rate=0.05, start=0.0), model, [few, {**bare, "target": target}])
    asked = tokenizer(["Q: high\nA:", "Q: dark\nA:"], return_tensors="pt", padding=True)
    with torch.no_grad(), attach(model, method) as run:
        print([tokenizer.decode(token) for token in run(**asked).logits[:, -1].argmax(-1)])
