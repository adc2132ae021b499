"""ReplyLanguage: does a move of middle attention outputs give a question about a picture its own language back?"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from claims._loaded import default
from claims._seeing import LANGUAGE, SEEN, Shown, joined, shown
from claims.ledger import Claim, run
from heedful import attach, fit
from heedful.authoring import Fitted
from heedful.core.method import Scoped, Stack
from heedful.methods import ReplyLanguage

# what is asked for, in English, in French and in German, after a verb
THINGS = (
    "cat un chat eine Katze", "dog un chien einen Hund", "horse un cheval ein Pferd", "bird un oiseau einen Vogel",
    "fish un poisson einen Fisch", "mouse une souris eine Maus", "cow une vache eine Kuh", "sheep un mouton ein Schaf",
    "lion un lion einen Löwen", "bear un ours einen Bären", "wolf un loup einen Wolf", "fox un renard einen Fuchs",
    "house une maison ein Haus", "door une porte eine Tür", "table une table einen Tisch",
    "chair une chaise einen Stuhl", "bed un lit ein Bett", "lamp une lampe eine Lampe",
    "window une fenêtre ein Fenster", "garden un jardin einen Garten", "tree un arbre einen Baum",
    "flower une fleur eine Blume", "leaf une feuille ein Blatt", "river une rivière einen Fluss",
    "mountain une montagne einen Berg", "lake un lac einen See", "forest une forêt einen Wald",
    "bridge un pont eine Brücke", "road une route eine Straße", "street une rue eine Gasse",
    "city une ville eine Stadt", "village un village ein Dorf", "castle un château ein Schloss",
    "church une église eine Kirche", "school une école eine Schule", "shop un magasin einen Laden",
    "boat un bateau ein Boot", "car une voiture ein Auto", "train un train einen Zug", "plane un avion ein Flugzeug",
    "book un livre ein Buch", "letter une lettre einen Brief", "pen un stylo einen Stift",
    "key une clé einen Schlüssel", "knife un couteau ein Messer", "spoon une cuillère einen Löffel",
    "glass un verre ein Glas", "plate une assiette einen Teller", "bottle une bouteille eine Flasche",
    "cake un gâteau einen Kuchen", "bread un pain ein Brot", "cheese un fromage einen Käse",
    "pear une poire eine Birne", "lemon un citron eine Zitrone", "strawberry une fraise eine Erdbeere",
    "tomato une tomate eine Tomate", "hat un chapeau einen Hut", "coat un manteau einen Mantel",
    "shirt une chemise ein Hemd", "shoe une chaussure einen Schuh", "dress une robe ein Kleid",
    "ring une bague einen Ring", "clock une horloge eine Uhr", "candle une bougie eine Kerze",
    "mirror un miroir einen Spiegel", "rug un tapis einen Teppich", "violin un violon eine Geige",
    "guitar une guitare eine Gitarre", "drum un tambour eine Trommel", "ball un ballon einen Ball",
    "doll une poupée eine Puppe", "kite un cerf-volant einen Drachen", "star une étoile einen Stern",
    "cloud un nuage eine Wolke", "stone une pierre einen Stein", "ladder une échelle eine Leiter",
    "hammer un marteau einen Hammer", "box une boîte eine Kiste", "bag un sac eine Tasche",
    "basket un panier einen Korb",
)  # fmt: skip
SAID = (  # what the fit reads: of one meaning, and not of the form that is asked about
    (
        "I saw a {} this morning, and it was beautiful.",
        "J'ai vu {} ce matin, et c'était très beau.",
        "Ich habe heute Morgen {} gesehen, und es war sehr schön.",
    ),
    (
        "She bought a {} for her brother yesterday.",
        "Elle a acheté {} pour son frère hier.",
        "Sie hat gestern {} für ihren Bruder gekauft.",
    ),
    (
        "We have wanted a {} for a long time.",
        "Nous voulons {} depuis longtemps.",
        "Wir wollten schon lange {} haben.",
    ),
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
FRENCH, GERMAN = 1, 2  # places of a language in what is said


def own_things(seed: int) -> list[tuple[str, str, str]]:
    """In English without an article, and in French and German with one; no two seeds share any."""
    count = FITTED + TRIED
    every = random.Random(0).sample(THINGS, len(THINGS))[count * seed : count * (seed + 1)]
    return [(a, f"{b} {c}", f"{d} {e}") for a, b, c, d, e in map(str.split, every)]


def fitted(model: object, things: list[tuple[str, str, str]], language: int) -> ReplyLanguage:
    """Vectors from English to a language."""
    tokenizer = default().tokenizer
    batches = [
        {**tokenizer(same[i].format(thing[i]), return_tensors="pt"), "positive": i == language}
        for same in SAID
        for thing in things
        for i in (0, language)
    ]
    return fit(ReplyLanguage(), model, batches)


def along(method: ReplyLanguage, others: Mapping[str, Tensor]) -> ReplyLanguage:
    """A control: in each layer another vector, made as long as the method's."""
    mine = method.vectors or {}
    return ReplyLanguage(
        vectors=Fitted({name: others[name] * x.norm() / others[name].norm() for name, x in mine.items()})
    )


def drawn(method: ReplyLanguage, by: torch.Generator) -> ReplyLanguage:
    """In each layer a random vector of the same length."""
    mine = method.vectors or {}
    return along(method, {name: torch.randn(x.shape, generator=by, dtype=x.dtype) for name, x in mine.items()})


def log_chance(model: Any, question: str, answer: str, picture: int | None, what: Scoped | Stack) -> float:
    """Of an answer to a question, behind a picture that a seed draws, or behind none."""
    tokenizer, prompt = default().tokenizer, BEHIND.format(question)
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
    vectors, german = (fitted(model, things[:FITTED], language) for language in (FRENCH, GERMAN))
    by = torch.Generator().manual_seed(seed)
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
    tell("towards German", along(vectors, german.vectors or {}).on(layers=THIRDS["middle"]))
    for i in range(DRAWS):
        tell(f"random {i + 1}", drawn(vectors, by).on(layers=THIRDS["middle"]))
    random_ones = statistics.fmean(numbers[f"over English, random {i + 1}"] for i in range(DRAWS))
    best = max(numbers["over English, as it is"], numbers["over English, towards German"], random_ones)
    return numbers["over English, middle layers"] - best, numbers


CLAIM = Claim(
    key="P253",
    method="ReplyLanguage",
    says="Middle attention layers, moved towards the query's language, make a model that sees a picture reply in it.",
    paper_number="none in the abstract: intervening on intermediary attention layers can reduce the bias",
    setup=f"{SEEN}; it knows French badly. {TRIED * len(ASKED)} questions in French a seed, each behind a picture, "
    "with a reply of one meaning in French and in English: by how many nats is that in French likelier? Vectors of "
    f"{len(SAID) * FITTED} sentences in each language about other things, without pictures, added at their whole "
    "length in the middle third of the layers, against none, against vectors from the same sentences in English to "
    f"German, and against {DRAWS} random ones, all of the same length in each layer, whichever is best. No two seeds "
    "share a thing. It is a choice between two replies, and no more: by itself either becomes less likely under any "
    "vector of this length, that in French by ten nats with these and by five with random ones. Details: the same "
    "without a picture, the other thirds of the layers, and how likely the reply in French is by itself. Strength and "
    "layers were looked at before, on two things that no seed has: +3.1 with these; German was added afterwards.",
    effect="nats by which a reply in French gains on one in English, over no edit, German or random vectors",
    measure=measure,
    strong=1.0,
)

if __name__ == "__main__":
    run(CLAIM)
