"""AttnRank: is the answer surer where the true document stands in the slot that gets the most attention?"""

from __future__ import annotations

import random

import torch

from claims._loaded import default
from claims.ledger import Claim, run
from claims.P125 import DOCUMENTS, item, sureness
from heedful import Prompt, arrange, fit
from heedful.methods.intervene.language.attn_rank import AttnRank

SHOWN, ITEMS = 8, 6  # prompts to learn the slots from, and others to be asked


def at_slot(prompt: Prompt, place: int, slot: int) -> Prompt:
    """The same prompt with the document of one place in another, the rest in their order."""
    order = [number for number in range(DOCUMENTS) if number != place]
    order.insert(slot, place)
    return prompt.reordered("documents", tuple(order))


@torch.no_grad()
def measure(seed: int) -> tuple[float, dict[str, float]]:
    chance = random.Random(1000 + seed)
    shown = [item(chance, number % DOCUMENTS)[0] for number in range(SHOWN)]
    batches = [{"input_ids": torch.tensor([x.tokens]), "roles": x.roles} for x in shown]
    method = fit(AttnRank(), default().model, batches)
    asked = [item(chance, 0) for _ in range(ITEMS)]
    by_slot = torch.zeros(DOCUMENTS)
    ranked = 0.0
    for prompt, answer, place in asked:
        ranked += sureness(arrange(default().model, prompt, method), answer) / ITEMS  # the true one is first there
        by_slot += torch.tensor([sureness(at_slot(prompt, place, s), answer) for s in range(DOCUMENTS)]) / ITEMS
    attention = torch.tensor(method.attention)
    numbers = {f"attention, slot {slot}": x for slot, x in enumerate(method.attention)}
    numbers |= {f"log-probability, true document in slot {slot}": x for slot, x in enumerate(by_slot.tolist())}
    numbers["log-probability, ranked"] = ranked
    numbers["correlation of slots' attention and log-probability"] = float(
        torch.corrcoef(torch.stack([attention, by_slot]))[0, 1]
    )
    return ranked - float(by_slot.mean()), numbers


CLAIM = Claim(
    key="P101",
    method="AttnRank",
    says="Putting the most relevant items where the model attends most improves its answers.",
    paper_number="none in the abstract",
    setup=f"SmolLM2-135M-Instruct, {DOCUMENTS} one-line documents (who was born where); slots ranked by {SHOWN} "
    f"prompts; {ITEMS} others a seed, their true document known to be the most relevant, against that document in each "
    "slot by turns, which is what a random order gives on average. Prompts are drawn anew for each seed. The first "
    "slot gets the most in all of them, so that an order by relevance alone, the best first, would do as well.",
    effect="log-probability of the answer's first token, ranked minus the mean over all slots",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
