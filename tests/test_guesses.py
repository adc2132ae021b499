"""Assisted and prompt-lookup decoding, in which a model reads guessed tokens several at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heedful import attach
from heedful.core.errors import GuessedWarning, RefusedModel, SiteError
from heedful.methods import ACT, SinkRate
from heedful.methods.sparse.cache.knorm import KNorm
from heedful.tiny import tiny, tiny_inputs

from .samples import Scale

pytestmark = pytest.mark.filterwarnings("ignore:this run changed nothing")


@pytest.mark.parametrize("budget", [6, 64])
@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_guessed_tokens_and_a_cache_that_drops_entries_do_not_go_together(how: str, budget: int) -> None:
    model, prompt = tiny("llama").eval(), torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    guess = {how: tiny("llama", num_hidden_layers=1).eval() if how == "assistant_model" else 4}
    with attach(model, KNorm(budget)) as run:
        if budget == 64:
            assert torch.equal(run.generate(prompt, **told, **guess), run.generate(prompt, **told))
            return
        with pytest.raises(RefusedModel, match="generate one after another, or leave the CACHE edit out"):
            run.generate(prompt, **told, **guess)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_guessed_tokens_are_of_neither_phase(how: str, phase: str) -> None:
    """They are read several at once, so that other tokens would be generated than one by one."""
    model, prompt = tiny("llama").eval(), torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    guess = {how: tiny("llama", num_hidden_layers=1).eval() if how == "assistant_model" else 4}
    with attach(model, Scale(3.0).when(phase)) as run:
        with pytest.raises(SiteError, match="acts in one phase, and assisted and prompt-lookup decoding have guesses"):
            run.generate(prompt, **told, **guess)
        run.generate(prompt, **told)
        cache = run(prompt, logits_to_keep=2).past_key_values  # without a cache of earlier tokens it is a prompt
        with pytest.raises(SiteError, match=r"the last 2 tokens here may be guesses \(logits_to_keep=2\).* or read a"):
            run(prompt[:, :2], past_key_values=cache, logits_to_keep=2)
    with attach(model, Scale(3.0)) as run:
        assert torch.equal(run.generate(prompt, **told, **guess), run.generate(prompt, **told))


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_guessed_tokens_are_no_chunk_of_a_prompt(how: str) -> None:
    """What is made of a call's own rows would be made of guesses, and of those that are taken back too."""
    model, prompt = tiny("llama").eval(), torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    guess = {how: tiny("llama", num_hidden_layers=1).eval() if how == "assistant_model" else 4}
    with attach(model, ACT(0.4)) as run:
        with pytest.raises(SiteError, match=r"several are read at once, and assisted .*, or leave ACT out"):
            run.generate(prompt, **told, **guess)
        run.generate(prompt, **told)


@pytest.mark.parametrize("how", ["assistant_model", "prompt_lookup_num_tokens"])
def test_who_reads_guessed_tokens_is_told_that_some_are_taken_back(how: str) -> None:
    model, prompt = tiny("llama").eval(), torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    guess = {how: tiny("llama", num_hidden_layers=1).eval() if how == "assistant_model" else 4}
    with attach(model, Scale(3.0) | SinkRate().on(layers=1)) as run:
        with pytest.warns(GuessedWarning, match=r"^SinkRate\(.*\)\.on\(layers=\[1\]\) counts guessed tokens too"):
            found = run.generate(prompt, **told, **guess)
        assert torch.equal(found, run.generate(prompt, **told))


@pytest.mark.parametrize("what", [Scale(3.0).when("decode"), ACT(0.4).on(layers=2)], ids=repr)
def test_guesses_are_known_in_models_that_give_all_logits(what: Any) -> None:
    model, asked = tiny("t5"), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = tiny_inputs(model)["input_ids"][:1]
    with attach(model, what) as run:
        with pytest.raises(SiteError, match="assisted and prompt-lookup decoding have guesses read at once"):
            run.generate(ids, **asked, assistant_model=tiny("t5"))
        run.generate(ids, **asked)
        run(input_ids=ids, decoder_input_ids=ids[:, :4], use_cache=True)
    with attach(assistant := tiny("t5"), what):  # it guesses, and reads none
        model.generate(ids, **asked, assistant_model=assistant)
