"""gamma KL(p || q), a prompt's last row before and during an edit, for heads drawn to the subject more than any was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext
from heedful.core.errors import FieldError
from heedful.core.fitted import Fitted
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeFloat, RoleName
from heedful.core.sites import Site, penalises, reads
from heedful.core.stats import Sum
from heedful.kit.batches import read
from heedful.kit.seeds import seed_of

EPS = 1e-8  # on every weight, as in the authors' code


class SADR(Method):
    """A loss for whoever edits a fact into a model: the subject shall not draw more attention than it did before.

    `fit` it to the prompts of the edit, one batch, before the edit; run the same prompts, with the target's tokens
    behind them if it has several, while the edit is learned, and add `run.loss()` to its loss. A run says where the
    subject stands, `roles={"subject": spans}`.
    """

    paper = Paper(
        "P005",
        "Revealing and Mitigating Over-Attention in Knowledge Editing",
        "Pinzheng Wang, Zecheng Tang, Keyan Zhou, Juntao Li, Qiaoming Zhu, Min Zhang",
        2025,
        "2502.14838",
        "ICLR 2025",
        differs=(
            "Only the loss is here; the edit that it is added to is the user's.",
            "Penalty and default follow the authors' code, in which their ROME run on GPT-J has a weight of 100e-4.",
        ),
    )
    whole_map = True
    weight: NonNegativeFloat = 0.01  # gamma; the authors' scripts: 0.01 with ROME, 0.005 with MEMIT, 0.08 with PMET
    role: RoleName = "subject"  # names the tokens of the subject, whose last one is looked at
    before: Fitted | None = None  # "row.LAYER" [b h n], "subject.LAYER" [b] and "at" [b], from a fit
    seed: int | None = None  # without a fit: random rows, as a control

    @classmethod
    def neutral(cls) -> SADR:
        return cls(weight=0.0)

    @classmethod
    def example(cls) -> SADR:
        return cls(weight=1.0, role="marked", seed=0)

    def idle(self, call: Call) -> bool:
        return self.weight == 0

    @penalises(Site.PATTERN)
    def restrain(self, weights: Tensor, call: Call) -> Tensor:
        row, subject = _row(weights, call, self._at(weights, call), self.role)
        p, highest = self._before(row, call)
        p, q = p + EPS, row[..., : p.shape[-1]] + EPS
        drawn = (subject > highest[:, None])[..., None]
        return self.weight * (p * (p / q).log() * drawn).sum() / len(row)

    def _at(self, weights: Tensor, call: Call) -> Tensor:
        """The position of each text's token that predicts the target, `[b]`; without a fit its last token's."""
        b = len(weights)
        if self.before is None:
            return call.q_pos[:, 0].expand(b, -1).gather(1, call.last.expand(b, 1))[:, 0]
        if len(self.before["at"]) != b:
            rule = f"holds rows of {len(self.before['at'])} prompts, and here are {b}"
            raise FieldError(self, "before", self.before, rule, "a fit to the same prompts and model")
        return self.before["at"].to(weights.device)

    def _before(self, row: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The rows of this layer before the edit, `[b h n]`, and the most that any head gave the subject, `[b]`."""
        if self.before is None:
            seed = seed_of(self, "before", "to the prompts before the edit", "[prompts]")
            draw = torch.Generator().manual_seed(1_000_003 * seed + call.layer)
            return torch.randn(row.shape, generator=draw).softmax(-1).to(row), row.new_zeros(len(row))
        found = self.before.get(f"row.{call.layer}")
        if found is None or found.shape[1] != row.shape[1] or found.shape[2] > row.shape[2]:
            rule = f"has no rows for layer {call.layer} of prompts like these: [b h n] is {list(row.shape)} here"
            raise FieldError(self, "before", self.before, rule, "a fit to the same prompts and model")
        return found.to(row), self.before[f"subject.{call.layer}"].to(row)

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> SADR:
        found = list(batches)
        if len(found) != 1 or "roles" not in found[0]:
            good = [{"input_ids": "...", "roles": {self.role: ((4, 9),)}}]
            rule = f'must be one batch of prompts, with roles naming "{self.role}"'
            raise FieldError(self, "batches", len(found), rule, good)
        at = found[0].get("attention_mask", torch.ones_like(found[0]["input_ids"])).long().sum(-1) - 1
        reader = _Rows(self.role, Fitted({"at": at}))
        rows = {layer: total.value for layer, total in read(context, reader, found).items()}
        kept = {f"row.{layer}": x[..., :-1].float() for layer, x in rows.items()}
        most = {f"subject.{layer}": x[..., -1].amax(1).float() for layer, x in rows.items()}
        return replace(self, before=Fitted({**kept, **most, "at": at}))


class _Rows(Method):
    """A prompt's row at a place, `[b h n]`, and behind it what that row gives the subject, `[b h 1]`."""

    whole_map = True
    role: str
    at: Fitted  # "at" [b]

    @reads(Site.PATTERN)
    def read(self, weights: Tensor, call: Call) -> Sum:
        row, subject = _row(weights, call, self.at["at"].to(weights.device), self.role)
        return Sum.of(torch.cat([row, subject[..., None]], -1))


def _row(weights: Tensor, call: Call, at: Tensor, role: str) -> tuple[Tensor, Tensor]:
    """The row of each text's token at a position, `[b h n]` by position, and what it gives the subject's last token."""
    here = (call.q_pos[:, 0] == at[:, None]).to(weights)
    row = torch.einsum("br,bhrk->bhk", here, weights)
    last = call.bounds(role)[..., 1].amax(-1)[:, None, None] - 1
    return call.keys.by_position(row), (row * (call.pairs.k[..., 0, :] == last)).sum(-1)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")
    roles = {"subject": ((1, 5),)}
    penalty = fit(SADR(), model, [{**text, "roles": roles}])
    layer = model.model.layers[5].mlp
    delta = torch.zeros(model.config.hidden_size, requires_grad=True)

    def push(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + delta * (torch.arange(out.shape[1]) == 4)[:, None]

    handle = layer.register_forward_hook(push)
    optimiser = torch.optim.Adam([delta], lr=0.3)
    target = tokenizer(" Rome").input_ids[0]
    with attach(model, penalty, roles=roles) as run:
        for step in range(5):
            surprise = -run(**text).logits[0, -1].log_softmax(-1)[target]
            print(f"step {step}: {surprise.item():.3f} + {run.loss().item():.5f}")
            optimiser.zero_grad()
            (surprise + run.loss()).backward()
            optimiser.step()
    handle.remove()
