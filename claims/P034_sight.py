"""ModalityShare on pictures: does text rule over an image's tokens, and less so when the image is compressed?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from claims._fewer_seen import NOISE
from claims._seeing import BEFORE, BEHIND, LANGUAGE, SEEN, joined, shown
from claims._sight import IMAGE, PATCHES, SHOWN, asked
from claims._sight import model as small
from claims.ledger import Claim, run
from heedful import attach
from heedful.adapters.cache_name import CACHE, cache_of
from heedful.authoring import Call
from heedful.core.method import Stack
from heedful.kit.picked import PickedPatches, best
from heedful.methods import ModalityShare
from heedful.methods.observe.modality_share import Shares

PICTURES, WRITTEN, SHARE = 8, 8, 0.25
READER = ModalityShare().when("decode")


class _ByClass(PickedPatches):
    """The authors' compression: the patches stay that the encoder's class token gives most to."""

    def choose(self, weights: Tensor, call: Call) -> Tensor:
        where = self.patches(call)
        return best(weights[:, :, 0, where].sum(1), math.ceil(self.share * (where.stop - where.start)))


@torch.no_grad()
def shares(seed: int, *compression: PickedPatches) -> Shares:
    """What the model looks at while it writes."""
    item = shown(seed, PICTURES, BEFORE, BEHIND)
    with attach(joined(seed), Stack((*compression, READER)), roles=item.roles) as attached:
        read = attached(**item.inputs, use_cache=True, logits_to_keep=1)
        for _ in range(WRITTEN):
            read = attached(input_ids=read.logits[:, -1:].argmax(-1), **{CACHE: cache_of(read)})
        return attached[READER]  # type: ignore[no-any-return]


@torch.no_grad()
def trained_from_nothing(seed: int) -> Shares:
    """What the small model looks at where it answers a question, its prompt's last token."""
    item, roles = asked(seed, PICTURES, NOISE), {"image": IMAGE, "text": ((0, 1), (1 + PATCHES, 2 + PATCHES))}
    ids, pixels = item.inputs["input_ids"], item.inputs["pixel_values"]
    with attach(small(), READER, roles=roles) as attached:
        read = attached(input_ids=ids[:, :-1], pixel_values=pixels, use_cache=True)
        attached(input_ids=ids[:, -1:], **{CACHE: cache_of(read)})
        return attached[READER]  # type: ignore[no-any-return]


def measure(seed: int) -> tuple[float, dict[str, float]]:
    ways = {
        "whole image": shares(seed),
        "compressed": shares(seed, _ByClass(SHOWN, SHARE)),
        "the small model": trained_from_nothing(seed),
    }
    numbers = {}
    for name, found in ways.items():
        numbers[f"MDI, {name}"] = found.overall("image")[2]
        numbers[f"share of attention on the image, {name}"] = found.overall("image")[0]
    for stage, layers in zip(("early", "middle", "late"), ways["whole image"].mdi("image").chunk(3), strict=True):
        numbers[f"MDI, whole image, {stage} layers"] = float(layers.mean())
    # how far from 1, which is balance, either way
    whole, less = (abs(math.log(numbers[f"MDI, {name}"])) for name in ("whole image", "compressed"))
    return whole - less, numbers


CLAIM = Claim(
    key="P034_sight",
    method="ModalityShare",
    says="Models look far more at a text token than at a token of an image, because the latter are many and redundant; "
    "compressing them brings the dominance index near 1.",
    paper_number="token compression brings LLaVA-7B's MDI from 10.23 to 0.86",
    setup=f"{SEEN}; {PICTURES} pictures a seed between two texts, {PATCHES} tokens of which most are alike. Attention "
    f"of {WRITTEN} written tokens to the prompt's text and to the image; the first token, on which many heads park, is "
    f"text. As the authors compress, {SHARE:.0%} of the patches stay, those that the encoder's class token gives most "
    "to. Only the way towards 1 is judged. In the small model that was trained from nothing, in the details, text does "
    f"not rule, so it is no ground for this: all {len(LANGUAGE)} layers are the language model's that learned from "
    "text.",
    effect="distance of ln MDI from 0, whole image minus compressed one",
    measure=measure,
    seeds=8,
    strong=0.5,
)


if __name__ == "__main__":
    run(CLAIM)
