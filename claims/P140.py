"""MAPS: do heads found from weights alone matter for their operation more than others of the same layers?"""

from __future__ import annotations

import random

import torch

from claims._loaded import default
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.core.figures import Head
from heedful.core.method import Stack
from heedful.methods.explain.maps import MAPS
from heedful.methods.explain.patch import Patch

HEADS, DRAWS = 20, 3  # heads to silence, as many random ones, drawn so many times

CAPITALS = """France Paris Italy Rome Japan Tokyo Egypt Cairo Russia Moscow Germany Berlin Spain Madrid England
London Norway Oslo Sweden Stockholm Poland Warsaw Greece Athens China Beijing India Delhi Iran
Tehran Iraq Baghdad Syria Damascus Cuba Havana Peru Lima Kenya Nairobi Turkey Ankara Austria Vienna
Ireland Dublin Hungary Budapest Portugal Lisbon Denmark Copenhagen Finland Helsinki Canada Ottawa
Ukraine Kiev Afghanistan Kabul Lebanon Beirut Thailand Bangkok Chile Santiago Taiwan Taipei Scotland
Edinburgh Belgium Brussels Colombia Bogota Philippines Manila Indonesia Jakarta Vietnam Hanoi"""
LANGUAGES = """France French Italy Italian Japan Japanese Russia Russian Germany German Spain Spanish England
English Norway Norwegian Sweden Swedish Poland Polish Greece Greek China Chinese Turkey Turkish
Austria German Hungary Hungarian Portugal Portuguese Denmark Danish Finland Finnish Ukraine
Ukrainian Vietnam Vietnamese Mexico Spanish Brazil Portuguese Egypt Arabic Cuba Spanish Peru Spanish
Chile Spanish Iraq Arabic Syria Arabic Argentina Spanish Colombia Spanish Australia English America
English Israel Hebrew Jordan Arabic Lebanon Arabic Korea Korean Scotland English Morocco Arabic"""
PAST = """write wrote teach taught bring brought buy bought catch caught think thought fight fought find found
give gave take took make made come came know knew grow grew throw threw fly flew see saw eat ate
drink drank sing sang begin began swim swam run ran sit sat speak spoke break broke choose chose
drive drove ride rode rise rose sell sold tell told hold held feel felt keep kept sleep slept leave
left lose lost send sent spend spent build built meet met read read walk walked talk talked call
called ask asked open opened play played work worked move moved live lived love loved help helped"""
LARGER = """big bigger small smaller tall taller short shorter long longer fast faster slow slower strong
stronger weak weaker high higher low lower deep deeper wide wider cheap cheaper rich richer poor
poorer old older young younger new newer cold colder warm warmer hot hotter cool cooler dark darker
light lighter heavy heavier easy easier hard harder happy happier soft softer loud louder clean
cleaner near nearer great greater safe safer large larger smart smarter bright brighter"""
COPIES = """table house river mountain paper window garden letter school market bridge music winter summer
friend doctor city village island forest kitchen bottle pencil mirror engine animal cloud stone
flower horse dinner morning evening money picture story number answer question teacher student
yellow purple orange silver golden simple quick strange ancient modern"""

# name -> the pairs, the k of the authors, and a prompt that asks for the target
TASKS = {
    "capital": (CAPITALS, 10, "The capital of {} is"),
    "language": (LANGUAGES, 10, "The official language of {} is"),
    "past tense": (PAST, 10, " hike-> hiked; go-> went; {}->"),
    "comparative": (LARGER, 10, " lovely-> lovelier; quiet-> quieter; {}->"),
    "copying": (" ".join(w for word in COPIES.split() for w in (word, word)), 1, " walk-> walk; cat-> cat; {}->"),
}


def pairs_of(name: str) -> list[tuple[int, int]]:
    """Those of which both sides are one token."""
    _, tokenizer, _ = default()
    ids = [tokenizer(f" {word}").input_ids for word in TASKS[name][0].split()]
    return [(a[0], b[0]) for a, b in zip(ids[::2], ids[1::2], strict=True) if len(a) == len(b) == 1]


@torch.no_grad()
def accuracy(name: str, pairs: list[tuple[int, int]], heads: list[Head]) -> float:
    """How often the target is the likeliest next token, with these heads silent at the last position."""
    model, tokenizer, _ = default()
    template = TASKS[name][2].replace(" {}", "{}").partition("{}")
    before, after = (tokenizer(text).input_ids for text in (template[0], template[2]))
    ids = torch.tensor([[*before, source, *after] for source, _ in pairs])
    parts = tuple(
        Patch(positions=(ids.shape[1] - 1,)).on(layers=layer, heads=[h for n, h in heads if n == layer])
        for layer in sorted({n for n, _ in heads})
    )
    if not parts:
        logits = model(ids, logits_to_keep=1).logits
    else:
        with attach(model, Stack(parts)) as attached:
            logits = attached(input_ids=ids, logits_to_keep=1).logits
    return float((logits[:, -1].argmax(-1) == torch.tensor([target for _, target in pairs])).float().mean())


def others(heads: list[Head], count: int, draw: random.Random) -> list[Head]:
    """As many heads of the same layers that are not among them, as far as there are."""
    found: list[Head] = []
    for layer in sorted({n for n, _ in heads}):
        mine = [h for n, h in heads if n == layer]
        free = [h for h in range(count) if h not in mine]
        found += [(layer, h) for h in draw.sample(free, min(len(free), len(mine)))]
    return found


def measure(seed: int) -> tuple[float, dict[str, float]]:
    draw, numbers, gains = random.Random(seed), {}, []
    for name, (_, k, _) in TASKS.items():
        pairs = pairs_of(name)
        draw.shuffle(pairs)
        half = len(pairs) // 2
        scores = fit(MAPS(tuple(pairs[:half]), name, k), default().model, ()).scores
        order = scores.flatten().argsort(descending=True, stable=True).tolist()[:HEADS]
        heads = [divmod(i, scores.shape[1]) for i in order if scores.flatten()[i] > 0]
        rest = pairs[half:]
        found = accuracy(name, rest, heads)
        control = [accuracy(name, rest, others(heads, scores.shape[1], draw)) for _ in range(DRAWS)]
        gains.append(sum(control) / DRAWS - found)
        numbers[f"{name}: best score"] = float(scores.max())
        numbers[f"{name}: accuracy, all heads"] = accuracy(name, rest, [])
        numbers[f"{name}: without those found"] = found
        numbers[f"{name}: without others"] = sum(control) / DRAWS
    return sum(gains) / len(gains), numbers


CLAIM = Claim(
    key="P140",
    method="MAPS",
    says="Heads that implement an operation by their parameters are causally linked to the model's predictions: "
    "without them it fails where without others it does not.",
    paper_number="none in the abstract",
    setup="SmolLM2-135M, five operations (capital, language, past tense, comparative, copying); heads scored on half "
    f"of the pairs and the {HEADS} best silenced at the last token for the other half, another half a seed; against as "
    f"many other heads of the same layers, {DRAWS} draws.",
    effect="accuracy that other heads of the same layers leave, less what those found leave, mean of five operations",
    measure=measure,
    strong=0.1,
)


if __name__ == "__main__":
    run(CLAIM)
