"""VFlowOpt: are patches better chosen under settings that leave the last token as it was?"""

from __future__ import annotations

from dataclasses import replace

from claims._fewer_seen import PICTURES, SHARE, _Drawn
from claims._pictures import PATCH
from claims._sight import ROLES, SHOWN, asked, log_probability, model, share_right, told
from claims.ledger import Claim, run
from heedful import fit
from heedful.methods import VFlowOpt

NOISE, SHOWS = 0.0, 40  # a patch has four pixels: with noise all of them have the same entropy


def measure(seed: int) -> tuple[float, dict[str, float]]:
    shown, item = asked(500 + seed, SHOWS, NOISE), asked(seed, PICTURES, NOISE)
    method = VFlowOpt(SHOWN, SHARE, seed=seed)
    found = fit(method, model(), [{**shown.inputs, "roles": ROLES}])
    pixels, numbers = item.inputs["pixel_values"], {"threshold": found.threshold, "alpha": found.alpha}
    ways = {"all": None, "searched": found, "attention": method, "both": replace(method, alpha=0.5)}
    for name, way in ways.items():
        logits = told(item.inputs, way.of(pixels, PATCH) if way else None)
        numbers[f"log-probability, {name}"] = log_probability(logits, item.answers)
        numbers[f"right, {name}"] = share_right(logits, item.answers)
    logits = told(item.inputs, _Drawn(SHOWN, SHARE, seed=seed))
    numbers["log-probability, drawn"] = log_probability(logits, item.answers)
    best = max(numbers[f"log-probability, {name}"] for name in ("attention", "both", "drawn"))
    return numbers["log-probability, searched"] - best, numbers


CLAIM = Claim(
    key="P137",
    method="VFlowOpt",
    says="Settings that change a model's last token least choose patches from which it answers better.",
    paper_number="none given in the abstract: a tenth of the patches answer about as well as all",
    setup=f"A vision-language model of LLaVA's class with 0.3M parameters, {PICTURES} pictures of two things a seed, "
    f"without noise, and a question about one of them; {SHARE:.0%} of the patches, chosen in the layer of the encoder "
    f"that the language model reads. 24 settings are tried on {SHOWS} other pictures. Against attention alone, with "
    "the threshold at the mean; half the weight for entropy; and as many patches drawn at random: whichever is best. "
    "Cut to fewer pictures and five seeds after a first look at one, for cost.",
    effect="log-probability of the right answer, above the best of settings that are not searched",
    measure=measure,
)

if __name__ == "__main__":
    run(CLAIM)
