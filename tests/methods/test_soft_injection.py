"""SoftInjection: heads at the last prompt token move towards a task embedding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from heedful import attach, fit, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Fitted
from heedful.conformance.tolerances import close, close_model
from heedful.core.errors import FieldError
from heedful.methods.intervene.language.soft_injection import SoftInjection, _Gates


def _task(seed: int = 0, layers: int = 2) -> Fitted:
    draw = torch.Generator().manual_seed(seed)
    tensors = {f"t.{i}": torch.randn(4, 8, generator=draw) for i in range(layers)}
    return Fitted(tensors | {f"a.{i}": torch.rand(4, generator=draw) for i in range(layers)})


def _by_hand(model: torch.nn.Module, task: Fitted, **inputs: Tensor) -> Tensor:
    """The same edit with plain hooks on the output projections, for texts without padding."""
    handles = []
    for i, layer in enumerate(model.get_submodule("model.layers")):  # type: ignore[arg-type]

        def mix(_: torch.nn.Module, args: tuple[Tensor], i: int = i) -> tuple[Tensor]:
            heads = args[0].unflatten(-1, (4, 8)).clone()
            gate = task[f"a.{i}"][:, None]
            heads[:, -1] = (1 - gate) * heads[:, -1] + gate * task[f"t.{i}"]
            return (heads.flatten(-2),)

        handles.append(layer.get_submodule("self_attn.o_proj").register_forward_pre_hook(mix))
    try:
        return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


def test_the_formula_and_padding() -> None:
    model, task = models.tiny("llama"), _task()
    ids = models.tiny_inputs(model, batch=1)["input_ids"]
    pad = torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        wanted = _by_hand(model, task, input_ids=ids)
        assert not close_model(model(input_ids=ids).logits[:, -1], wanted[:, -1])
        with attach(model, SoftInjection(task)) as run:
            assert close_model(run(input_ids=ids).logits, wanted)
            for parts in ((pad, ids), (ids, pad)):
                whole = torch.cat(parts, 1)
                found = run(input_ids=whole, attention_mask=(whole > 0).long()).logits
                assert close_model(found[whole > 0][None], wanted)


def test_only_the_last_prompt_token_is_edited_and_decoding_not_at_all() -> None:
    model = models.tiny("llama")
    ids = models.tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        native = model(input_ids=ids[:, :-1]).logits
        with attach(model, SoftInjection(_task())) as run:
            first = run(input_ids=ids[:, :-1], use_cache=True)
            second = run(input_ids=ids[:, -1:], **{CACHE: copy.deepcopy(first[CACHE])})
        wanted = model(input_ids=ids[:, -1:], **{CACHE: first[CACHE]})
    assert close_model(first.logits[:, :-1], native[:, :-1])
    assert not close_model(first.logits[:, -1], native[:, -1])
    assert close_model(second.logits, wanted.logits)


def test_one_gate_for_all_and_a_gate_of_one() -> None:
    model, task = models.tiny("llama"), _task()
    ids = models.tiny_inputs(model)["input_ids"]
    ones = Fitted({name: torch.ones_like(x) if name[0] == "a" else x for name, x in task.items()})
    with torch.no_grad():
        with attach(model, SoftInjection(task, gate=1.0)) as run:
            found = run(input_ids=ids).logits
        assert close_model(found, _by_hand(model, ones, input_ids=ids))


def test_a_fit_learns_a_task() -> None:
    model = models.tiny("llama")
    shots, bare = models.tiny_inputs(model, batch=3, length=18), models.tiny_inputs(model, batch=4, length=6, seed=1)
    target = torch.tensor([7, 7, 7, 7])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    method = fit(SoftInjection(steps=15), model, [shots, {**bare, "target": target}])
    assert method == fit(SoftInjection(steps=15), model, [shots, {**bare, "target": target}])
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    task = method.task
    assert task is not None
    assert all(bool(((x > 0) & (x < 1)).all()) for name, x in task.items() if name[0] == "a")
    seen: list[Tensor] = []
    hook = model.get_submodule("model.layers.0.self_attn.o_proj").register_forward_pre_hook(
        lambda _, args: seen.append(args[0][:, -1].unflatten(-1, (4, 8)).mean(0))
    )
    with torch.no_grad():
        model(**shots)
        hook.remove()
        assert close(task["t.0"], seen[0])
        native = model(**bare).logits[:, -1]
        with attach(model, method) as run:
            found = run(**bare).logits[:, -1]
    cross = torch.nn.functional.cross_entropy
    assert float(cross(found, target)) < float(cross(native, target))


def test_a_fit_finds_the_last_token_beside_padding() -> None:
    model = models.tiny("llama")
    shots, bare = models.tiny_inputs(model, batch=2), models.tiny_inputs(model, batch=2, length=6, seed=1)
    target, pad = torch.tensor([7, 9]), torch.zeros(2, 3, dtype=torch.long)
    fits = []
    for parts in ((bare["input_ids"],), (pad, bare["input_ids"]), (bare["input_ids"], pad)):
        ids = torch.cat(parts, 1)
        batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "target": target}
        fits.append(fit(SoftInjection(steps=2), model, [shots, batch]).task)
    for other in fits[1:]:
        assert all(close_model(other[name], x) for name, x in fits[0].items())


def test_neutral_is_the_model_itself_bit_for_bit() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    inputs = models.tiny_inputs(model)
    zero = Fitted({name: torch.zeros_like(x) if name[0] == "a" else x for name, x in _task().items()})
    with torch.no_grad():
        native = model(**inputs).logits
        for method in (SoftInjection.neutral(), SoftInjection(zero)):
            with pytest.warns(match="changed nothing"), attach(model, method, backend="reference") as run:
                assert torch.equal(run(**inputs).logits, native)


def test_errors_say_what_to_do() -> None:
    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with pytest.raises(FieldError, match=r"must be fitted with heedful\.fit"), attach(model, SoftInjection()) as run:
        run(**inputs)
    for wrong in (_task(layers=3), Fitted({f"{n}.{i}": torch.zeros(9, 64) for n in "ta" for i in range(2)})):
        with pytest.raises(FieldError, match="was fitted to another model"), attach(model, SoftInjection(wrong)) as run:
            run(**inputs)
    with pytest.raises(FieldError, match='some without "target", some with'):
        fit(SoftInjection(), model, [inputs])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"gate": 1.5}, r"SoftInjection\.gate = 1\.5"),
        ({"steps": 0}, r"SoftInjection\.steps = 0"),
        ({"rate": 0.0}, r"SoftInjection\.rate"),
    ],
)
def test_wrong_fields_are_refused(settings: dict[str, float], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        SoftInjection(**settings)


def test_gates_learn_from_a_half_on() -> None:
    model, task = models.tiny("llama"), _task()
    ids = models.tiny_inputs(model)["input_ids"]
    halves = Fitted({name: torch.full_like(x, 0.5) if name[0] == "a" else x for name, x in task.items()})
    with torch.no_grad():
        wanted = _by_hand(model, halves, input_ids=ids)
        with attach(model, _Gates(task)) as run:
            assert close_model(run(input_ids=ids).logits, wanted)
