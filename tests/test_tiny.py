"""The tiny random models, and the memory that tests find poisoned."""

import pytest
import torch

from heedful import models
from heedful.core.errors import FieldError, ModelError


@pytest.mark.parametrize("kind", models.kinds())
@pytest.mark.usefixtures("poison")
def test_tiny_runs_and_attends(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    with torch.no_grad():
        out = model(**models.tiny_inputs(model), output_attentions=True)
    assert torch.isfinite(out[0]).all()
    if kind == "clip":
        out = out.vision_model_output
    maps = out.get("attentions") or out.decoder_attentions
    assert len(maps) == 2
    last = maps[0][..., -1, :].clamp_min(1e-9)  # [b h k]: the row that sees most keys
    entropy = -(last * last.log()).sum(-1).mean()
    assert entropy < 0.85 * torch.tensor(last.shape[-1]).log()


def test_tiny_is_a_function_of_its_seed() -> None:
    state = torch.get_rng_state()
    one, same, other = (models.tiny(seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_tiny_takes_overrides() -> None:
    model = models.tiny("llava", text_config={"num_key_value_heads": 1}, dtype=torch.bfloat16)
    assert model.config.text_config.num_key_value_heads == 1
    assert model.config.text_config.hidden_size == 32
    assert model.dtype == torch.bfloat16
    assert models.tiny("gpt2", num_hidden_layers=1).config.n_layer == 1


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: models.tiny("gtp2"), ModelError, "Did you mean gpt2"),
        (lambda: models.tiny("llama", num_heads=2), ModelError, "no config field 'num_heads'"),
        (lambda: models.tiny("llama", std=0.0), FieldError, "must be above 0"),
        (lambda: models.tiny_inputs(models.tiny(), length=0), FieldError, "1 or more"),
        (lambda: models.tiny_inputs(models.tiny("llava"), length=5), FieldError, "4 image tokens"),
    ],
)
def test_tiny_says_what_is_wrong(call, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.usefixtures("poison")
def test_poison_bites() -> None:
    assert torch.empty(8).isnan().all()
    assert torch.ones(2).new_empty(4).isnan().all()
    assert torch.empty_like(torch.ones(3)).isnan().all()
