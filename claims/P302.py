"""AUSteer: at the same harm to other text, do a hundred channels move a trait farther than whole blocks?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims._praise import own_things, praise_and_blame, trait
from claims._texts import apart
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.core.method import Part
from heedful.methods.intervene.language.austeer import AUSteer
from heedful.methods.intervene.language.steering_vector import SteeringVector

COUNT, EVERY = 100, 10**6
HARM = 0.1  # nats a token that a way may cost on neutral text
HALVINGS = 8
LAYER = 13  # of 30, as in the claim of the steering vector's paper


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    loaded: Any = default()
    plain = loaded.model
    seen, unseen = own_things(seed)
    neutral = torch.tensor([loaded.tokenizer(text).input_ids[:64] for text in apart(seed, 4, 64)])
    pairs = praise_and_blame(seen)
    few, every = (fit(AUSteer(count=count), plain, pairs) for count in (COUNT, EVERY))
    vector = fit(SteeringVector(), plain, pairs)
    chance = torch.Generator().manual_seed(seed)

    def shuffled(method: AUSteer) -> AUSteer:
        """The same momenta on channels drawn at random."""
        named = dict(method.momenta or {})
        flat = torch.cat([x.flatten() for x in named.values()])
        parts = flat[torch.randperm(len(flat), generator=chance)].split([x.numel() for x in named.values()])
        drawn = {name: part.view_as(x) for (name, x), part in zip(named.items(), parts, strict=True)}
        return replace(method, momenta=Fitted(drawn))

    elsewhere = shuffled(few)
    ways: dict[str, Callable[[float], Part]] = {
        f"{COUNT} channels": lambda by: replace(few, strength=by),
        f"{COUNT} channels at random": lambda by: replace(elsewhere, strength=by),
        "all channels": lambda by: replace(every, strength=by),
        "vector on a layer": lambda by: SteeringVector(by, vector.vectors).on(layers=LAYER),
    }

    def loss(of: Any, text: Tensor = neutral) -> float:
        return float(of(input_ids=text, labels=text, use_cache=False).loss)

    start, at_rest = trait(plain, unseen), loss(plain)

    def harm(way: Part) -> float:
        with attach(plain, way) as attached:
            return loss(attached) - at_rest

    numbers = {"log odds, plain": start, "neutral loss, plain": at_rest}
    for name, way in ways.items():
        low, high = 1e-2, 1e3  # the strongest that does no more harm, by halving its logarithm
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if harm(way(middle)) < HARM else (low, middle)
        with attach(plain, way(low)) as attached:
            numbers[f"log odds, {name}"] = trait(attached, unseen)
        numbers[f"strength, {name}"] = low
    gains = {name: numbers[f"log odds, {name}"] - start for name in ways}
    mine = gains.pop(f"{COUNT} channels")
    return mine - max(gains.values()), numbers


CLAIM = Claim(
    key="P302",
    method="AUSteer",
    says="Steering at most about 100 channels does more than steering whole blocks.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct, {COUNT} channels by praise against blame of 8 things (24 pairs of texts); each "
    f"way as strong as costs {HARM} nats a token on 4 neutral texts; log odds of good words over bad ones after a "
    "sentence about 8 other things. Against the better of: the same momenta on random channels, every channel by its "
    f"momentum, the mean difference on the stream after layer {LAYER}. No two seeds share a thing or a text.",
    effect="nats that the channels move the trait farther than the best of the others",
    measure=measure,
    strong=0.5,
)

if __name__ == "__main__":
    run(CLAIM)
