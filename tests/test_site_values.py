"""What stands at a site of a text, against what the model's own modules are handed; and put into another run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import heedful
from heedful import Site, models
from heedful.authoring import Fitted
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close
from heedful.conformance.torch_model import TinyTorch
from heedful.core.errors import FieldError
from heedful.explaining import activations, patching
from heedful.methods import Patch, TempScale
from tests.tasks.beside import llava
from tests.test_logits import IDS

OTHER = IDS.flip(0)


def entering(model: Any, module: nn.Module, ids: Tensor) -> Tensor:
    """What a module is called with."""
    seen: list[Any] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, named: seen.append([*args, *named.values()][0]), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=ids[None])
    handle.remove()
    found: Tensor = seen[0]
    return found


def test_they_are_what_the_models_modules_hand_on() -> None:
    model: Any = models.tiny("llama")
    before, layer = fingerprint(model), model.model.layers[1]
    heads = activations(model, IDS, Site.HEAD_OUTPUT)
    assert list(heads) == [0, 1]
    wanted = entering(model, layer.self_attn.o_proj, IDS)
    assert torch.equal(heads[1], wanted.unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2))
    assert torch.equal(activations(model, IDS, Site.RESIDUAL, layers=0)[0], entering(model, layer, IDS))
    assert torch.equal(activations(model, IDS, Site.HIDDEN, layers=[1])[1], entering(model, layer.self_attn, IDS))
    batch = {"input_ids": torch.stack([IDS, OTHER])}
    assert activations(model, batch, Site.OUTPUT)[0].shape == (2, len(IDS), model.config.hidden_size)
    given = torch.ones(1, 5, model.config.hidden_size)
    kept = activations(model, {"inputs_embeds": given}, Site.EMBEDDING)[0]
    assert torch.equal(kept, given)
    assert kept.data_ptr() != given.data_ptr(), "what is kept does not change with what was given"
    assert fingerprint(model) == before


def test_several_sites_are_read_in_one_forward() -> None:
    model: Any = models.tiny("llama")
    asked: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: asked.append(1))
    sites = [Site.KEY, Site.EMBEDDING, Site.RESIDUAL, Site.HEAD_OUTPUT]
    found = activations(model, IDS, sites, layers=[0, 1])
    assert len(asked) == 1
    assert list(found) == sites
    assert list(activations(model, IDS, [Site.KEY], layers=1)[Site.KEY]) == [1]
    handle.remove()
    for site in sites:
        alone = activations(model, IDS, site)
        assert list(found[site]) == list(alone)
        assert all(torch.equal(found[site][layer], alone[layer]) for layer in alone)


def test_several_texts_are_a_batch_padded_on_the_right() -> None:
    loaded = llava()
    model, words = models.tiny("llama"), loaded.tokenizer
    both = activations(model, [IDS, OTHER[:5].tolist()], Site.RESIDUAL)
    for layer, alone in activations(model, OTHER[:5], Site.RESIDUAL).items():
        assert both[layer].shape[:2] == (2, len(IDS))
        assert close(both[layer][1:, :5], alone)
        assert close(both[layer][:1], activations(model, IDS, Site.RESIDUAL)[layer])
    [*_, told] = activations(loaded, ["w1 w2 w3", "w4 w5"], Site.OUTPUT).values()
    [*_, wanted] = activations(loaded, words.tokenizer("w4 w5").input_ids, Site.OUTPUT).values()
    assert close(told[1:, : wanted.shape[1]], wanted)
    rows = [[5, 6], [7, 8]]
    assert torch.equal(*(activations(model, x, Site.OUTPUT)[0] for x in (rows, torch.tensor(rows))))
    halves = activations(models.tiny("t5"), [IDS, OTHER[:5]], Site.RESIDUAL)
    alone = activations(models.tiny("t5"), OTHER[:5], Site.RESIDUAL)
    assert list(halves) == list(alone)
    assert all(close(halves[layer][1:, :5], alone[layer]) for layer in alone)


def test_several_images_are_a_batch() -> None:
    model, pixels = models.tiny("vit"), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = activations(model, list(pixels), Site.HEAD_OUTPUT)[1]
    assert torch.equal(found, activations(model, pixels, Site.HEAD_OUTPUT)[1])
    with pytest.raises(FieldError, match=r"\(3, 8, 8\), \(3, 4, 8\).*are of one size"):
        activations(model, [pixels[0], pixels[1, :, :4]], Site.OUTPUT)


def test_models_of_plain_torch_are_given_their_first_argument() -> None:
    model = TinyTorch().eval()
    before = fingerprint(model)
    heads = activations(model, IDS[None], Site.HEAD_OUTPUT)
    assert list(heads) == [0, 1, 2]
    wanted = entering(model, model.layers[2].attn.proj, IDS)  # type: ignore[union-attr, arg-type]
    assert torch.equal(heads[2].transpose(1, 2).flatten(2), wanted)
    named = activations(model, {"input_ids": IDS[None]}, Site.HEAD_OUTPUT, layers=2)
    assert list(named) == [2]
    assert torch.equal(named[2], heads[2])
    assert fingerprint(model) == before
    for given in ({"ids": IDS[None]}, "words", [IDS, OTHER]):
        with pytest.raises(FieldError, match="what TinyTorch is called with, by name: input_ids"):
            activations(model, given, Site.HEAD_OUTPUT)

    class Ready(TinyTorch):
        def forward(self, input_ids: Tensor = IDS[None], **_: Any) -> Any:
            return super().forward(input_ids)

    with pytest.raises(FieldError, match=r"text = 'words': must hold what Ready is called with"):
        activations(Ready(), "words", Site.HEAD_OUTPUT)


def test_they_are_read_under_a_stack() -> None:
    model = models.tiny("llama")
    plain, under = (activations(model, IDS, Site.HEAD_OUTPUT, layers=0, stack=x)[0] for x in (None, TempScale(0.5)))
    assert not torch.equal(plain, under)
    scaled = heedful.edit(Site.QUERY, lambda q, call: 2 * q)
    torch.testing.assert_close(activations(model, IDS, Site.HEAD_OUTPUT, layers=0, stack=scaled)[0], under)


def test_words_are_asked_of_the_tokenizer_that_a_processor_holds() -> None:
    loaded, words = llava(), "w1 w2 w3"
    [*_, wanted] = activations(loaded.model, loaded.tokenizer.tokenizer(words).input_ids, Site.OUTPUT).values()
    for model, tokenizer in ((loaded, None), (loaded.model, loaded.tokenizer)):
        [*_, found] = activations(model, words, Site.OUTPUT, tokenizer=tokenizer).values()
        assert torch.equal(found, wanted)


def test_a_heads_output_put_into_another_text_is_patching() -> None:
    model = models.tiny("llama")
    there = activations(model, IDS, Site.HEAD_OUTPUT, layers=1)
    put = Patch(Fitted({"1": there[1]})).on(layers=1, heads=2)
    with torch.no_grad(), heedful.attach(model, put) as run:
        patched = float(run(input_ids=OTHER[None]).logits[0, -1, 3])
    clean, corrupt = (float(model(input_ids=ids[None]).logits[0, -1, 3].detach()) for ids in (IDS, OTHER))
    wanted = patching(model, IDS[None], OTHER[None], lambda logits: logits[:, -1, 3], layers=[1]).share[1, 2]
    assert (patched - corrupt) / (clean - corrupt) == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.parametrize(
    ("site", "more", "why"),
    [
        (
            Site.PATTERN,
            {},
            r"activations\(\)\.site = .*heedful\.patterns\(\) reads PATTERN; must be one or more of EMBEDDING, HIDDEN",
        ),
        (Site.MASK, {}, "must be one or more of EMBEDDING"),
        ([Site.KEY, Site.MASK], {}, "must be one or more of EMBEDDING"),
        ([], {}, "must be one or more of EMBEDDING"),
        (Site.RESIDUAL, {"layers": 7}, "must be below 2, the layers served"),
        ("residual", {}, "must be Site"),
    ],
)
def test_what_cannot_be_kept_is_refused(site: Any, more: dict[str, Any], why: str) -> None:
    with pytest.raises(FieldError, match=why):
        activations(models.tiny("llama"), IDS, site, **more)
