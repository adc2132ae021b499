"""x_i <- x_i + p_i on an image's tokens, p from a few steps down E = (1 - attention on a region / on the image)^2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.authoring import (
    Call,
    FieldError,
    FitContext,
    Fitted,
    Layer,
    Layers,
    Method,
    NonNegativeInt,
    Paper,
    Phase,
    PositiveFloat,
    PositiveShare,
    Region,
    RoleName,
    Site,
    at,
    penalises,
)
from heedful.core.regions import coordinates
from heedful.kit.seeds import seed_of


class ControlMLLM(Method):
    """Adds to an image's tokens what makes the words after it look at a marked part. Fit it to each prompt anew.

    A fit takes the prompt as one batch with "roles" that name the image's tokens and the marked ones among them.
    """

    paper = Paper(
        "P155",
        "ControlMLLM: Training-Free Visual Prompt Learning for Multimodal Large Language Models",
        "Mingrui Wu, Xinyue Cai, Jiayi Ji, Jiale Li, Oucheng Huang, Gen Luo, Hao Fei, Guannan Jiang, Xiaoshuai Sun, "
        "Rongrong Ji",
        2024,
        "2407.21534",
        "NeurIPS 2024",
        differs=(
            "The settings and the order of the steps are those of the authors' code for boxes and masks; its soft "
            "weights for points and scribbles are left out.",
            "The authors' code adds each step's latent to embeddings that hold those of the steps before, in place; "
            "here the embeddings hold the present one alone.",
            "A role may be any span of tokens: in a model of text a passage can stand for the image.",
        ),
    )
    one_text = True
    role: RoleName = "marked"  # the part to look at
    image: RoleName = "image"  # the tokens that the latent is added to
    question: str = ""  # the words that shall look; "": all after the image, as in the paper
    steps: NonNegativeInt = 4  # the authors: 4 for words in an image, 5 for things
    rate: PositiveFloat = 400.0  # step size on the energy; the authors: 400, as a factor on it
    blend: PositiveShare = 0.5  # of the new latent in what is added, the rest being what was before; the authors: 0.5
    enough: PositiveFloat = 0.25  # stops once the energy changed by this share; the authors: 0.25
    layers: Layers | None = None  # whose weights are averaged; None: all, as in the paper
    latent: Fitted | None = None  # "latent" [n e] for the image's n tokens
    seed: int | None = None  # without a fit: a random latent, as a control

    @classmethod
    def neutral(cls) -> ControlMLLM:
        return cls(steps=0)

    @classmethod
    def example(cls) -> ControlMLLM:
        return cls(seed=0)

    def idle(self, call: Call) -> bool:
        return self.steps == 0

    @at(Site.EMBEDDING)
    def add(self, x: Tensor, call: Call) -> Tensor:
        spans = call.region(self.image)
        tokens = spans.tokens
        latent = self._latent(tokens, x.shape[-1], call)
        place = coordinates(Region(spans, (tokens,)), call.q_pos)[:, 0, :, 0]  # [b|1 n], -1 outside
        return x + latent.to(x)[place.clamp(min=0)].masked_fill((place < 0)[..., None], 0.0)

    def _latent(self, tokens: int, width: int, call: Call) -> Tensor:
        if self.latent is None:
            seed = seed_of(self, "latent", "to the prompt", "[{**inputs, 'roles': roles}]")
            return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
        found = self.latent["latent"]
        if found.shape != (tokens, width):
            rule = f"was fitted to another prompt or model: [n e] is {[tokens, width]} here"
            raise FieldError(self, "latent", self.latent, rule, "a fit to this prompt")
        return found

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> ControlMLLM:
        """Take the steps on a prompt."""
        found = list(batches)
        if len(found) != 1 or not {self.role, self.image} <= set(found[0].get("roles", {})):
            good = [{"input_ids": "...", "roles": {self.image: ((0, 9),), self.role: ((4, 6),)}}]
            rule = f'must be one prompt, with roles naming "{self.image}" and "{self.role}"'
            raise FieldError(self, "batches", len(found), rule, good)
        inputs = {name: x for name, x in found[0].items() if name != "roles"}
        roles = dict(found[0]["roles"])
        tokens = Region(roles[self.image]).tokens
        stack = _Learner(image=self.image, tokens=tokens) | _Energy(self.role, self.image, self.question, self.layers)
        with context.attach(stack) as run, torch.enable_grad():
            run.roles = roles
            (added,) = run.parameters()
            latent, first = added.detach().clone(), None
            for step in range(self.steps):
                run(**inputs)
                energy = run.loss()
                if first is not None and abs(energy.item() - first) > self.enough * first:
                    break
                first = energy.item() if first is None else first
                (slope,) = torch.autograd.grad(energy, added)
                # the authors' slope is the latent's, of which all is added at first and then `blend`
                latent = latent - self.rate * (self.blend if step else 1.0) * slope
                with torch.no_grad():
                    added.copy_(self.blend * latent + (1 - self.blend) * added)
        return replace(self, latent=Fitted({"latent": added}))


class _Learner(ControlMLLM):
    """The latent while it learns."""

    tokens: int = 1  # of the image

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        return {"latent": torch.zeros(self.tokens, layer.width)} if layer.number == 0 else {}

    def _latent(self, tokens: int, width: int, call: Call) -> Tensor:
        return call.params["latent"]


class _Energy(Method):
    """(1 - attention on the marked part / attention on the image)^2, of the mean over layers, heads and words."""

    whole_map = True
    role: str = "marked"
    image: str = "image"
    question: str = ""
    layers: Layers | None = None

    @penalises(Site.PATTERN)
    def energy(self, pattern: Tensor, call: Call) -> Tensor | None:
        last = call.depth - 1 if self.layers is None else max(self.layers)
        if call.phase is Phase.DECODE or (self.layers is not None and call.layer not in self.layers):
            return None
        kept = call.state.forward
        image = call.marked(self.image)
        asks = call.marked_queries(self.question) if self.question else call.q_pos >= _end(call.region(self.image))
        asked = pattern * call.spread(asks & call.is_text)[..., None]
        for name, keys in (("image", image), ("part", image & call.marked(self.role))):
            kept[name] = kept.get(name, 0.0) + (asked * call.spread(keys)[:, :, None]).sum((1, 2, 3))  # [b]
        if call.layer < last:
            return None
        part, whole = kept["part"], kept["image"]
        return (1 - part / whole.where(whole > 0, 1.0)).square().mean()


def _end(spans: Region) -> int:
    return max(stop for _, stop in spans)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = "The code of the apple is red. The code of the apple is blue. So the code of the apple is"
    inputs = tokenizer(text, return_tensors="pt")
    for spans in ((0, 8), (8, 16)):
        roles = {"image": ((0, 16),), "marked": (spans,)}
        method = fit(ControlMLLM(rate=1.0), model, [{**inputs, "roles": roles}])
        with torch.no_grad(), attach(model, method, roles=roles) as run:
            top = run(**inputs).logits[0, -1].softmax(-1).topk(3)
        print(spans, [(tokenizer.decode(i), round(float(p), 3)) for p, i in zip(*top, strict=True)])
