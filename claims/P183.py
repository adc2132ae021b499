"""The visual sentinel: does a slot that the decoder fills itself tell which words need the image, and which do not?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from claims.ledger import Claim, run
from heedful import Method
from heedful.authoring import Call
from heedful.methods import PointerNetwork, VisualSentinel
from heedful.nn import Attention

THINGS, OTHERS, REGIONS, NAMED = 8, 12, 6, 4  # words that name things, other words, regions, things that are named
START = THINGS + OTHERS
WIDTH, SEEN, BATCH, STEPS, RATE, TRIED = 64, 32, 32, 250, 3e-3, 512
BLUR = 0.5  # deviation of the noise on what is seen of a region


LOOKS: list[Tensor] = []  # what the slot got in the last forwards, `[b n]` each


class _Watched(VisualSentinel):
    def weights(self, q: Tensor, k: Tensor, sentinel: Tensor, call: Call) -> Tensor:
        found = super().weights(q, k, sentinel, call)
        LOOKS.append(found[:, 0, :, -1].detach())
        return found


class _Empty(_Watched):
    """The control: the slot holds the same for every token."""

    def sentinel(self, call: Call) -> Tensor:
        return super().sentinel(replace(call, hidden=torch.ones_like(call.hidden)))  # type: ignore[arg-type]


WAYS: dict[str, Method] = {"sentinel": _Watched(WIDTH), "empty slot": _Empty(WIDTH), "none": PointerNetwork(WIDTH)}


class _World:
    """What things look like, and which two words follow each: drawn once a seed."""

    def __init__(self, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.looks = torch.randn(THINGS, SEEN, generator=random)
        self.after = torch.randint(THINGS, THINGS + OTHERS, (THINGS, 2), generator=random)

    def drawn(self, random: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
        """Images `[b regions seen]`, and captions `[b n]`: the things of the first regions, each with its two words."""
        things = torch.randint(THINGS, (rows, REGIONS), generator=random)
        image = self.looks[things] + BLUR * torch.randn(rows, REGIONS, SEEN, generator=random)
        named = things[:, :NAMED]
        return image, torch.cat([named[..., None], self.after[named]], -1).flatten(1)


class _Captioner(nn.Module):
    """A recurrent net that looks at regions by one head."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.words, self.regions = nn.Embedding(START + 1, WIDTH), nn.Linear(SEEN, WIDTH)
        self.places = nn.Parameter(torch.randn(REGIONS, WIDTH))
        self.writer = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.attention, self.out = Attention(WIDTH, 1, method, batch_first=True), nn.Linear(WIDTH, START)

    def forward(self, image: Tensor, caption: Tensor) -> Tensor:
        """Logits `[b n words]`; each word is told those that should have been written before it."""
        before = torch.cat([torch.full_like(caption[:, :1], START), caption[:, :-1]], 1)
        state, _ = self.writer(self.words(before))
        seen = self.regions(image) + self.places
        mixed, _ = self.attention(state, seen, seen, need_weights=False)
        return self.out(state + mixed)


def told(method: Method, seed: int) -> dict[str, float]:
    """The loss on fresh images, by kind of word, and what the slot gets there."""
    torch.manual_seed(seed)
    model, world, random = _Captioner(method), _World(seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    for _ in range(STEPS):
        image, caption = world.drawn(random, BATCH)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(image, caption).flatten(0, 1), caption.flatten()).backward()
        optimiser.step()
        rates.step()
    LOOKS.clear()
    with torch.no_grad():
        image, caption = world.drawn(torch.Generator().manual_seed(10_000 + seed), TRIED)
        loss = nn.functional.cross_entropy(model(image, caption).mT, caption, reduction="none")
    kinds = {"things": caption < THINGS, "other words": caption >= THINGS}
    found = {f"loss on {kind}": float(loss[of].mean()) for kind, of in kinds.items()}
    slots = {f"slot on {kind}": float(LOOKS[0][of].mean()) for kind, of in kinds.items()} if LOOKS else {}
    return found | slots


def measure(seed: int) -> tuple[float, dict[str, float]]:
    found = {f"{name}, {way}": x for way, method in WAYS.items() for name, x in told(method, seed).items()}
    apart = {way: found[f"slot on other words, {way}"] - found[f"slot on things, {way}"] for way in list(WAYS)[:2]}
    return apart["sentinel"] - apart["empty slot"], found


CLAIM = Claim(
    key="P183",
    method="VisualSentinel",
    says="A slot beside the regions that the decoder fills from its own memory learns when not to look: at words that "
    "follow from those before.",
    paper_number="none given: the sentinel's weight is shown word by word, high on words such as 'of' and 'to' and low "
    "on names of things (figures)",
    setup=f"Images of {REGIONS} blurred things out of {THINGS}, captions that name {NAMED} of them in order, each with "
    f"two words that follow from its name; a recurrent net of one head, {WIDTH} wide, {STEPS} steps of {BATCH}, "
    "each word told the right ones before it. Controls: a slot that holds the same for every token, and no slot. How "
    "much more the slot gets on words that follow than on names; losses by kind of word are among the details.",
    effect="slot's weight on words that follow, less that on names, less the same of an empty slot",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
