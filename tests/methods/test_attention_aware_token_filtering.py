"""Against the encoder run on the kept tokens alone, and against attention rates counted image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import heedful
from heedful import fit, models
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError, InactiveWarning
from heedful.core.fitted import Fitted
from heedful.methods import AttentionAwareTokenFiltering

SIDE = 20  # pixels: a class token and 5 x 5 patches


def images(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def fitted(rate: list[float], mean: list[float] | None = None, share: float = 0.2) -> AttentionAwareTokenFiltering:
    mean = [0.04] * len(rate) if mean is None else mean
    return AttentionAwareTokenFiltering(share, Fitted({"rate": torch.tensor(rate), "mean": torch.tensor(mean)}))


def alone(model, pixels: Tensor, kept: list[int]) -> Tensor:
    """What the class token says of an image whose other patches were taken out before the encoder."""
    vit = model.vit
    x = vit.embeddings(pixels)[:, [0, *(1 + i for i in kept)]]
    for layer in vit.layers if hasattr(vit, "layers") else vit.encoder.layer:
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
    return model.classifier(vit.layernorm(x)[:, 0])


def seen(model, method, pixels: Tensor, **how) -> Tensor:
    with heedful.attach(model, method, **how) as run, torch.no_grad():
        return run(pixel_values=pixels).logits


@torch.no_grad()
def test_is_the_encoder_of_the_kept_tokens() -> None:
    model = models.tiny("vit", image_size=SIDE)
    rate = [0.0] * 25
    for place, value in ((3, 0.9), (7, 0.5), (24, 0.7), (0, 0.6), (11, 0.55), (12, 0.4)):
        rate[place] = value
    found = seen(model, fitted(rate), images())  # a fifth of 25
    assert close_model(found, alone(model, images(), [0, 3, 7, 11, 24]))
    assert not close_model(found, model(pixel_values=images()).logits)


@torch.no_grad()
def test_a_part_of_a_patch_is_a_patch_and_ties_go_by_the_mean() -> None:
    model = models.tiny("vit", image_size=SIDE)
    mean = [0.01] * 25
    mean[8], mean[2] = 0.3, 0.2
    rate = [0.5] * 25
    rate[20] = 0.6
    found = seen(model, fitted(rate, mean, share=0.1), images())  # 2.5 patches: 3
    assert close_model(found, alone(model, images(), [2, 8, 20]))


@torch.no_grad()
def test_what_a_detector_found_stays_in_its_own_image() -> None:
    model = models.tiny("vit", image_size=SIDE)
    method = fitted([1.0] + [0.0] * 24, share=0.04)
    roles = [{"object": ((6, 8),)}, {"object": ((20, 21),)}]  # tokens; the first patch is token 1
    found = seen(model, method, images(2), roles=roles)
    assert close_model(found[:1], alone(model, images(2)[:1], [0, 5, 6]))
    assert close_model(found[1:], alone(model, images(2)[1:], [0, 19]))


def test_rates_are_counted_in_the_first_layer() -> None:
    model = models.tiny("vit", image_size=SIDE)
    batches = [{"pixel_values": images(2)}, {"pixel_values": images(3, 1)}]
    method = heedful.fit(AttentionAwareTokenFiltering(), model, batches)
    high, share = torch.zeros(25).double(), torch.zeros(25).double()
    eager = models.tiny("vit", image_size=SIDE, attn_implementation="eager")
    for batch in batches:
        with torch.no_grad():
            maps = eager(**batch, output_attentions=True).attentions[0].double()
        for image in maps:  # [h n n]
            drawn = torch.tensor([float(image[:, :, 1 + t].mean()) for t in range(25)]).double()
            for t in range(25):
                high[t] += float(drawn[t] > drawn.mean())
            share += drawn / drawn.sum()
    assert close(method.rates["rate"], (high / 5).float())
    assert close(method.rates["mean"], (share / 5).float())
    assert method.share == 0.35
    assert 0 < float(method.rates["rate"].mean()) < 1


def test_a_fit_to_another_size_is_refused() -> None:
    model = models.tiny("vit", image_size=SIDE)
    with pytest.raises(FieldError, match="24 patches, and this one has 25"):
        seen(model, fitted([0.5] * 24), images())
    with pytest.raises(FieldError, match="must be fitted"):
        seen(model, AttentionAwareTokenFiltering(), images())
    with pytest.raises(FieldError, match=r"AttentionAwareTokenFiltering.batches = 0: must be 1 or more"):
        fit(AttentionAwareTokenFiltering(), model, [])


def test_a_fit_to_no_image_is_refused() -> None:
    with pytest.raises(FieldError, match=r"AttentionAwareTokenFiltering\.batches = 0: must be 1 or more"):
        heedful.fit(AttentionAwareTokenFiltering(), models.tiny("vit"), [])


@pytest.mark.parametrize("share", [0.0, 1.1, -1.0])
def test_wrong_shares_are_refused(share: float) -> None:
    with pytest.raises(FieldError, match="must be above 0"):
        AttentionAwareTokenFiltering(share)


@torch.no_grad()
def test_all_patches_are_none_filtered() -> None:
    model = models.tiny("vit", image_size=SIDE)
    with pytest.warns(InactiveWarning, match="which was idle"):
        found = seen(model, AttentionAwareTokenFiltering(1.0), images())
    assert torch.equal(found, model(pixel_values=images()).logits)
