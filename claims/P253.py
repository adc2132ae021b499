"""ReplyLanguage: does a move of middle attention outputs give a question about a picture its own language back?"""

from __future__ import annotations

import random
import statistics
from itertools import product
from typing import Any

import torch

from claims._seeing import LANGUAGE, SEEN, Shown, joined, language_model, shown
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.core.method import Scoped, Stack
from heedful.methods import ReplyLanguage

# what is asked for, in English and in French
THINGS = (
    "cat un chat", "dog un chien", "horse un cheval", "bird un oiseau", "fish un poisson", "mouse une souris",
    "cow une vache", "sheep un mouton", "lion un lion", "bear un ours", "wolf un loup", "fox un renard",
    "house une maison", "door une porte", "table une table", "chair une chaise", "bed un lit", "lamp une lampe",
    "window une fenêtre", "garden un jardin", "tree un arbre", "flower une fleur", "leaf une feuille",
    "river une rivière", "mountain une montagne", "lake un lac", "forest une forêt", "bridge un pont",
    "road une route", "street une rue", "city une ville", "village un village", "castle un château",
    "church une église", "school une école", "shop un magasin", "boat un bateau", "car une voiture",
    "train un train", "plane un avion", "book un livre", "letter une lettre", "pen un stylo", "key une clé",
    "knife un couteau", "spoon une cuillère", "glass un verre", "plate une assiette", "bottle une bouteille",
    "cake un gâteau", "bread un pain", "cheese un fromage", "pear une poire", "lemon un citron",
    "strawberry une fraise", "tomato une tomate", "hat un chapeau", "coat un manteau", "shirt une chemise",
    "shoe une chaussure", "dress une robe", "ring une bague", "clock une horloge", "candle une bougie",
    "mirror un miroir", "rug un tapis", "violin un violon", "guitar une guitare", "drum un tambour",
    "ball un ballon", "doll une poupée", "kite un cerf-volant", "star une étoile", "cloud un nuage",
    "stone une pierre", "ladder une échelle", "hammer un marteau", "box une boîte", "bag un sac",
    "basket un panier",
)  # fmt: skip
SAID = (  # what the fit reads: of one meaning, and not of the form that is asked about
    ("I saw a {} this morning, and it was beautiful.", "J'ai vu {} ce matin, et c'était très beau."),
    ("She bought a {} for her brother yesterday.", "Elle a acheté {} pour son frère hier."),
    ("We have wanted a {} for a long time.", "Nous voulons {} depuis longtemps."),
)
ASKED = (  # a question, and replies to it
    (
        ("Is there a {} in the picture?", "Y a-t-il {} dans l'image ?"),
        ("Yes, there is a {} in the picture.", "Oui, il y a {} dans l'image."),
    ),
    (
        ("Why would I need a {}?", "Pourquoi aurais-je besoin d'{} ?"),
        ("A {} is very useful.", "C'est très utile, {}."),
    ),
)
FITTED, TRIED = 8, 4  # things of a seed that the fit reads, and others that are asked about
BEFORE, BEHIND = "<|im_start|>user\n", "\n{}<|im_end|>\n<|im_start|>assistant\n"
THIRDS = {"first": LANGUAGE[:10], "middle": LANGUAGE[10:20], "last": LANGUAGE[20:]}
DRAWS = 2
PLAIN = Stack()


def own_things(seed: int) -> list[tuple[str, str]]:
    """In English without an article and in French with one; no two seeds share any."""
    count = FITTED + TRIED
    every = random.Random(0).sample(THINGS, len(THINGS))[count * seed : count * (seed + 1)]
    return [(english, french) for english, _, french in (thing.partition(" ") for thing in every)]


def fitted(model: object, things: list[tuple[str, str]]) -> ReplyLanguage:
    tokenizer = language_model().tokenizer
    batches = [
        {**tokenizer(pair[i].format(thing[i]), return_tensors="pt"), "positive": bool(i)}
        for pair in SAID
        for thing in things
        for i in (0, 1)
    ]
    return fit(ReplyLanguage(), model, batches)


def drawn(method: ReplyLanguage, by: torch.Generator) -> ReplyLanguage:
    """The control: in each layer a random vector of the same length."""
    found = {}
    for name, vector in (method.vectors or {}).items():
        along = torch.randn(vector.shape, generator=by, dtype=vector.dtype)
        found[name] = along * vector.norm() / along.norm()
    return ReplyLanguage(vectors=Fitted(found))


def log_chance(model: Any, question: str, answer: str, picture: int | None, what: Scoped | Stack) -> float:
    """Of an answer to a question, behind a picture that a seed draws, or behind none."""
    tokenizer, prompt = language_model().tokenizer, BEHIND.format(question)
    count = len(tokenizer(prompt + answer).input_ids) - len(tokenizer(prompt).input_ids)
    if picture is None:
        item = Shown(dict(tokenizer(BEFORE + prompt + answer, return_tensors="pt")), {}, torch.empty(0))
    else:
        item = shown(picture, 1, BEFORE, prompt + answer)
    inputs = item.inputs
    with attach(model, what, roles=item.roles) as attached, torch.no_grad():
        chances = attached(**inputs, logits_to_keep=count + 1).logits[0, :-1].double().log_softmax(-1)
    return float(chances.gather(-1, inputs["input_ids"][0, -count:, None]).sum())


def measure(seed: int) -> tuple[float, dict[str, float]]:
    model, things = joined(seed), own_things(seed)
    vectors, by = fitted(model, things[:FITTED]), torch.Generator().manual_seed(seed)
    numbers: dict[str, float] = {}

    def tell(name: str, what: Scoped | Stack = PLAIN, seen: bool = True) -> None:
        """Ask everything in French."""
        found = []
        for number, (thing, (question, answer)) in enumerate(product(things[FITTED:], ASKED)):
            picture = 100 * seed + number if seen else None
            asked = question[1].format(thing[1])
            found.append([log_chance(model, asked, answer[i].format(thing[i]), picture, what) for i in (0, 1)])
        numbers[f"over English, {name}"] = statistics.fmean(french - english for english, french in found)
        numbers[f"reply in French, {name}"] = statistics.fmean(french for _, french in found)

    tell("without a picture", seen=False)
    tell("as it is")
    for name, layers in THIRDS.items():
        tell(f"{name} layers", vectors.on(layers=layers))
    for i in range(DRAWS):
        tell(f"random {i + 1}", drawn(vectors, by).on(layers=THIRDS["middle"]))
    random_ones = statistics.fmean(numbers[f"over English, random {i + 1}"] for i in range(DRAWS))
    best = max(numbers["over English, as it is"], random_ones)
    return numbers["over English, middle layers"] - best, numbers


CLAIM = Claim(
    key="P253",
    method="ReplyLanguage",
    says="Middle attention layers, moved towards the query's language, make a model that sees a picture reply in it.",
    paper_number="none in the abstract: intervening on intermediary attention layers can reduce the bias",
    setup=f"{SEEN}; it knows French badly. {TRIED * len(ASKED)} questions in French a seed, each behind a picture, "
    "with a reply of one meaning in French and in English: by how many nats is that in French likelier? Vectors of "
    f"{len(SAID) * FITTED} sentences in each language about other things, without pictures, added at their whole "
    "length in the middle third of the layers, against none and against random vectors of the same length in each "
    f"layer, {DRAWS} of them, whichever is better. No two seeds share a thing. Details: the same without a picture, "
    "the other thirds of the layers, and how likely the reply in French is by itself. Strength and layers were looked "
    "at before, on two things that no seed has: +3.1 with these.",
    effect="nats by which a reply in French gains on one in English, over no edit or random vectors",
    measure=measure,
    strong=1.0,
)

if __name__ == "__main__":
    run(CLAIM)
