"""What methods remembered of what an encoder made, wherever that is handed: later, in other rows, and to whom."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from heedful import attach, models
from heedful.adapters import carried
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import RefusedModel
from heedful.core.method import Method
from heedful.core.sites import Site, at
from heedful.methods import FoPru, TrimmedLlama

from .samples import PAPER, Scale

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_what_was_remembered_of_an_encoder_that_generate_asked_before_is_known_behind_it() -> None:
    """It has the encoder look by itself, and calls the model with what came of that."""
    llava = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(llava, length=22, batch=2)
    roles = {"image": ((1, 17),), "patches": ((1, 17),)}
    asked = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    with attach(llava, FoPru(layer=0), roles=roles) as run:
        for _ in range(2):  # images are looked at anew
            wanted = run(**inputs).logits[:, -1]
            found = run.generate(**inputs, max_new_tokens=2, min_new_tokens=2, **asked)
            assert close_model(found.logits[0], wanted)
            longer = torch.cat([inputs["input_ids"], found.sequences[:, 22:23]], 1)
            assert close_model(found.logits[1], run(**{**inputs, "input_ids": longer}).logits[:, -1])
        with run.paused():
            plain = llava(**inputs).logits[:, -1]
            looked = llava.get_image_features(2 * inputs["pixel_values"], return_dict=True)
            text = {"input_ids": inputs["input_ids"] % 120}  # none stands for an image
            unseen = llava(**text).logits[:, -1]
        assert not close_model(plain, wanted)
        run(**inputs)  # what was chosen here is of no other look
        with pytest.raises(RefusedModel, match="nothing that the encoder gave under this run"):
            run(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": looked})
        llava.get_image_features(inputs["pixel_values"])  # nor of a text that has no image
        assert close_model(run(**text).logits[:, -1], unseen)


class Heard(Method):
    """Remembers how often an encoder attended, and tells it to cross-attention."""

    paper = PAPER

    @at(Site.PATTERN)
    def hear(self, weights: torch.Tensor, call: Call) -> torch.Tensor:
        kept = call.state.forward
        if not call.cross and not call.causal:
            kept["times"] = kept.get("times", 0) + 1
        return weights / (1 + kept.get("times", 0)) if call.cross else weights


@torch.no_grad()
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_what_was_remembered_of_a_text_is_known_to_a_decoder_that_writes_of_it(kind: str, copies: int) -> None:
    model = models.tiny(kind)
    ids = models.tiny_inputs(model)["input_ids"]
    asked = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3, "min_new_tokens": 3}
    with attach(model, Heard()) as run:  # generate repeats what an encoder made for each copy, as it does for beams
        for _ in range(2):
            written = run.generate(input_ids=ids, do_sample=copies > 1, num_return_sequences=copies, **asked)
        given = {"input_ids": ids.repeat_interleave(copies, 0), "decoder_input_ids": written.sequences[:, :-1]}
        wanted = run(**given).logits
    assert close_model(torch.stack(written.logits, 1), wanted)
    assert not close_model(wanted, model(**given).logits)


@torch.no_grad()
def test_of_several_looks_that_one_is_remembered_which_a_call_is_handed() -> None:
    llava = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(llava, length=22, batch=2)
    pixels, ids = inputs.pop("pixel_values"), inputs["input_ids"]
    roles = {"image": ((1, 17),), "patches": ((1, 17),)}
    with attach(llava, FoPru(layer=0), roles=roles) as run:
        wanted = [run(**inputs, pixel_values=x).logits for x in (pixels, pixels.flip(0))]
        looks = [llava.get_image_features(x, return_dict=True) for x in (pixels, pixels.flip(0))]
        for look, logits in zip(looks, wanted, strict=True):  # while both are held
            assert close_model(run(input_ids=ids, mm_encoder_outputs={"image": look}).logits, logits)
        assert not close_model(*wanted)
        looks = [llava.get_image_features(x, return_dict=True) for x in (pixels, pixels.flip(0))]
        with pytest.raises(RefusedModel, match=r"looked more than once, and of each time FoPru\(.*cannot be told"):
            run(input_ids=ids, mm_encoder_outputs=dict(zip(("image", "video"), looks, strict=True)))
        copied = copy.deepcopy(looks[1])  # known by what it holds
        assert close_model(run(input_ids=ids, mm_encoder_outputs={"image": copied}).logits, wanted[1])


class Told(Heard):
    """Remembers a number of each text, of its encoder, and tells it to cross-attention."""

    @at(Site.PATTERN)
    def hear(self, weights: torch.Tensor, call: Call) -> torch.Tensor:
        kept = call.state.forward
        if not call.cross and not call.causal:
            kept.setdefault("layers", []).append({"of": weights.amax((1, 2, 3)), "width": weights.shape[-1]})
        if not call.cross or "layers" not in kept:
            return weights
        (_, last), number = kept["layers"], torch.arange(1, 1 + weights.shape[-1])
        return weights / (1 + last["of"][:, None, None, None] * number / last["width"])


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize("kind", ["t5", "bart", "whisper"])
def test_each_beam_is_told_what_was_remembered_of_its_own_text(kind: str, beams: int) -> None:
    model = models.tiny(kind)
    name = model.main_input_name
    given = models.tiny_inputs(model)[name]
    given = torch.stack([given[0], given[0].roll(1, -1)])
    asked: dict[str, Any] = dict(max_new_tokens=4, min_new_tokens=4, num_beams=beams, num_return_sequences=beams)
    asked |= {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    with attach(model, Told()) as run:
        found = run.generate(**{name: given}, **asked).sequences_scores
        alone = [run.generate(**{name: x[None]}, **asked).sequences_scores for x in given]
        if kind != "whisper":  # whose generate wants the sound itself
            first, second = (model.get_encoder()(x[None]) for x in given)
            run(**{name: given}, decoder_input_ids=torch.ones(2, 1, dtype=torch.long))
            again = [run.generate(encoder_outputs=look, **asked).sequences_scores for look in (second, first)]
            assert close_model(torch.cat(again[::-1]), found)
    assert close_model(found, torch.cat(alone))
    plain = model.generate(**{name: given}, **asked).sequences_scores
    assert not close_model(plain, found)


@torch.no_grad()
def test_what_an_encoder_made_is_known_wherever_it_is_handed() -> None:
    model, ids = models.tiny("bart"), IDS
    begun = {"decoder_input_ids": ids[:, :3] + 1}
    with attach(model, Told()) as run:
        wanted = run(input_ids=ids, **begun).logits
        look = model.get_encoder()(ids).last_hidden_state
        run(input_ids=ids.flip(0), **begun)
        with run.paused():
            model(input_ids=ids, **begun)
        assert close_model(run(encoder_outputs=(look,), **begun).logits, wanted)
        flipped = run(encoder_outputs=(look[[1, 0, 1]],), decoder_input_ids=begun["decoder_input_ids"][[1, 0, 1]])
        assert close_model(flipped.logits, wanted[[1, 0, 1]])
        alone = model.get_decoder()(input_ids=begun["decoder_input_ids"], encoder_hidden_states=look)
        assert close_model(model.lm_head(alone.last_hidden_state) + model.final_logits_bias, wanted)
        whole = run(input_ids=ids, **begun)  # which gives what its encoder gave
        for made in (whole.encoder_last_hidden_state, look.clone()):
            assert close_model(run(encoder_outputs=(made,), **begun).logits, wanted)
        with pytest.raises(RefusedModel, match="nothing that the encoder gave under this run"):
            run(encoder_outputs=(look + 1,), **begun)
        del look, made, whole, flipped  # the last gives what its encoder gave, too
        run(input_ids=ids, **begun)
        with run.paused():
            elsewhere = model.get_encoder()(ids + 1).last_hidden_state
        with pytest.raises(RefusedModel, match="nothing that the encoder gave under this run"):
            run(encoder_outputs=(elsewhere,), **begun)


@torch.no_grad()
@pytest.mark.parametrize("alone", [True, False])
def test_a_copy_of_what_nobody_has_any_more_is_known_or_refused(alone: bool) -> None:
    model, begun = models.tiny("bart"), IDS[:, :3] + 1

    def encoded(ids: torch.Tensor) -> torch.Tensor:
        if alone:
            return model.get_encoder()(ids).last_hidden_state.clone()
        return run(input_ids=ids, decoder_input_ids=begun).encoder_last_hidden_state.clone()

    def written(look: torch.Tensor, rows: list[int]) -> torch.Tensor:
        return run(encoder_outputs=(look[rows].clone(),), decoder_input_ids=begun[rows]).logits

    with attach(model, Told()) as run:
        wanted = run(input_ids=IDS, decoder_input_ids=begun).logits
        kept = encoded(IDS)
        for rows in ([0, 1], [1], [0], [1, 0, 1]):  # step after step, and of each text in turn
            assert close_model(written(kept, rows), wanted[rows])
        model.get_decoder()(input_ids=begun, encoder_hidden_states=kept.clone())  # which is no encoder's look
        assert close_model(written(kept, [0, 1]), wanted)
        for i in range(5):
            encoded(IDS + 1 + i)
        assert len(run.state.looks) == 1  # of the others nobody has anything
        with pytest.raises(RefusedModel, match="and of the last call"):
            written(kept, [0, 1])


@torch.no_grad()
def test_what_a_decoder_remembers_is_of_no_later_call() -> None:
    """Its whole model gives what the encoder made, from which the next call goes on."""
    model, begun = models.tiny("bart"), {"decoder_input_ids": IDS[:, :3] + 1}
    with attach(model, TrimmedLlama(share=0.1)) as run:
        whole = run(input_ids=IDS, **begun)
        other = {"decoder_input_ids": begun["decoder_input_ids"] + 7}
        made = (whole.encoder_last_hidden_state,)
        assert close_model(run(encoder_outputs=made, **other).logits, run(input_ids=IDS, **other).logits)
        run(encoder_outputs=(made[0] + 1,), **other)  # nothing is remembered of the encoder, so that nothing is lost


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 3])
def test_each_beam_sees_what_was_chosen_of_its_own_image(beams: int) -> None:
    llava = models.tiny("llava", vision_config={"image_size": 16}, image_seq_length=16)
    inputs = models.tiny_inputs(llava, length=22, batch=2)
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape)
    asked: dict[str, Any] = dict(max_new_tokens=4, min_new_tokens=4, num_beams=beams, num_return_sequences=beams)
    asked |= {"do_sample": False, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    with attach(llava, FoPru(layer=0), roles={"image": ((1, 17),), "patches": ((1, 17),)}) as run:
        found = run.generate(**inputs, **asked).sequences_scores
        alone = [{name: x[i : i + 1] for name, x in inputs.items()} for i in range(2)]
        assert close_model(found, torch.cat([run.generate(**one, **asked).sequences_scores for one in alone]))
        looks = llava.get_image_features(inputs["pixel_values"], return_dict=True)
        run(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": looks, "video": None})
        looks.pooler_output = [looks.pooler_output[i] for i in (0, 1, 0, 1)]
        ids = inputs["input_ids"].repeat(2, 1)
        with pytest.raises(RefusedModel, match=r"handed 4 images of the 2 that an encoder looked at, .* one image"):
            run(input_ids=ids, mm_encoder_outputs={"image": looks})


@torch.no_grad()
def test_nothing_is_looked_at_where_nothing_is_remembered_and_a_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, "_marks", asked := Mock(wraps=carried._marks))
    model, times = models.tiny("bart"), {}
    for method in (Scale(), Told()):
        asked.reset_mock()
        with attach(model, method) as run:
            run.generate(input_ids=IDS, num_beams=2, max_new_tokens=6, min_new_tokens=6)
        times[type(method)] = asked.call_count
    assert times == {Scale: 0, Told: 2}
