"""heedful.arrange and heedful.decode on tiny models: what they do, what they leave alone, what they refuse."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import heedful
from heedful import Prompt, Stack, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Decode, Readings, Tokens
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, RefusedModel, SiteError, StatisticError
from heedful.core.kinds.decode import NOTHING_READ, Read
from heedful.core.kinds.tokens import Reader
from tests.samples import PAPER, Scale, Shares, Zero


class Plain(Decode):
    """What the model says by itself."""

    paper = PAPER

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        return {"prompt": (prompt, Stack())}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return logits["prompt"]


class Contrast(Decode):
    """The prompt against the prompt without its context, each with its own attention."""

    paper = PAPER
    weight: float = 0.5

    def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
        ((start, stop),) = prompt.spans("context")
        bare = Prompt(prompt.tokens[:start] + prompt.tokens[stop:])
        return {"with": (prompt, Stack()), "without": (bare, Stack((Scale(0.5),)))}

    def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
        return (1 + self.weight) * logits["with"] - self.weight * logits["without"]


class Reverse(Tokens):
    """The spans backwards, and what was read of the prompt kept for the test to see."""

    paper = PAPER
    role: str = "parts"
    seen: list = None  # type: ignore[assignment]

    def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
        self.seen.append(read(prompt, Shares()))
        return prompt.reordered(self.role, tuple(range(len(prompt.spans(self.role))))[::-1])


@pytest.fixture(scope="module")
def model():
    return models.tiny("llama", num_hidden_layers=3)


def numbers(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, 127, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def state(model) -> tuple:
    return model.config._attn_implementation, [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    ]


# decode


def test_decode_without_a_change_is_the_model_itself(model) -> None:
    tokens = numbers(9)
    ids = torch.tensor([tokens])
    own = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert heedful.decode(model, Prompt(tokens), Plain(), new_tokens=8) == tuple(own[0, 9:].tolist())


def test_decode_combines_runs_of_unlike_prompts_and_stacks(model) -> None:
    tokens = numbers(12)
    prompt = Prompt(tokens, {"context": ((2, 8),)})
    before = state(model)
    found = heedful.decode(model, prompt, Contrast(), new_tokens=6)
    assert state(model) == before

    one, other, wanted = list(tokens), list(tokens[:2] + tokens[8:]), []
    for _ in range(6):  # the same without a cache, from the whole text each time
        with torch.no_grad():
            full = model(torch.tensor([one])).logits[0, -1]
            with heedful.attach(model, Scale(0.5)) as run:
                bare = run(torch.tensor([other])).logits[0, -1]
        token = int((1.5 * full - 0.5 * bare).argmax())
        wanted.append(token)
        one.append(token)
        other.append(token)
    assert found == tuple(wanted)
    assert found != heedful.decode(model, prompt, Plain(), new_tokens=6)


def test_decode_hands_each_step_logits_of_one_token(model) -> None:
    shapes = []

    class Look(Plain):
        paper = PAPER

        def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
            shapes.append({name: tuple(x.shape) for name, x in logits.items()})
            return logits["prompt"]

    heedful.decode(model, Prompt(numbers(5)), Look(), new_tokens=3)
    assert shapes == [{"prompt": (128,)}] * 3


def test_decode_hands_over_what_was_read_of_each_token_alone(model) -> None:
    seen = []

    class Look(Plain):
        paper = PAPER

        def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
            halved = Stack((Scale(0.5), Shares().on(layers=1)))
            return {"prompt": (prompt, Stack((Shares(),))), "halved": (prompt, halved)}

        def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
            seen.append({name: dict(found) for name, found in read.items()})
            return logits["prompt"]

    tokens = numbers(5)
    more = heedful.decode(model, Prompt(tokens), Look(), new_tokens=3)
    with heedful.attach(model, Shares()) as run:
        for i, found in enumerate(seen):
            assert list(found) == ["prompt", "halved"]
            assert list(found["prompt"]) == [Shares()]
            assert list(found["halved"]) == [Shares().on(layers=1)]
            run.reset()
            with run.paused():
                cache = model(torch.tensor([tokens + more[: i - 1]]))[CACHE] if i else None
            run(torch.tensor([tokens if not i else more[i - 1 : i]]), **{CACHE: cache})
            _close(found["prompt"][Shares()], run[Shares()])
    assert len(seen) == 3


def _close(found: Readings, wanted: Readings) -> None:
    assert list(found) == list(wanted)
    assert all(close_model(found[layer].value.float(), wanted[layer].value.float()) for layer in found)


def test_decode_stops_at_a_token(model) -> None:
    prompt = Prompt(numbers(9))
    whole = heedful.decode(model, prompt, Plain(), new_tokens=8)
    stopped = heedful.decode(model, prompt, Plain(), new_tokens=8, stop=whole[0])
    assert stopped == whole[:1]
    assert len(heedful.decode(model, prompt, Plain(), new_tokens=3, stop=-1)) == 3


def test_decode_gives_variants_their_roles(model) -> None:
    class Roles(Plain):
        paper = PAPER

        def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
            return {"prompt": (prompt, Stack((Scale(0.5) | _NeedsRole()).parts))}

    class _NeedsRole(Shares):
        paper = PAPER

        def finish(self, statistic, call):
            marked = call.marked("context")
            assert marked.sum() == 2
            return statistic

    assert heedful.decode(model, Prompt(numbers(6), {"context": ((1, 3),)}), Roles(), new_tokens=2)
    with pytest.raises(FieldError, match="no spans named 'context'"):
        heedful.decode(model, Prompt(numbers(6)), Roles(), new_tokens=2)


@pytest.mark.parametrize("fault", ["variants", "attach", "forward", "combine"])
def test_decode_leaves_the_model_as_it_was_after_a_fault(model, fault: str) -> None:
    class Faulty(Plain):
        paper = PAPER

        def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
            if fault == "variants":
                raise KeyError(fault)
            bad = {"attach": Scale().on(layers=99), "forward": Scale().on(heads=99)}.get(fault, Scale())
            return {"prompt": (prompt, Stack()), "bad": (prompt, Stack((bad,)))}

        def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
            raise KeyError(fault)

    before = state(model)
    with pytest.raises((KeyError, FieldError, SiteError)):
        heedful.decode(model, Prompt(numbers(5)), Faulty())
    assert state(model) == before
    assert heedful.decode(model, Prompt(numbers(5)), Plain(), new_tokens=1)


def test_decode_says_what_is_wrong(model) -> None:
    class Empty(Plain):
        paper = PAPER

        def variants(self, prompt: Prompt) -> Mapping[str, tuple[Prompt, Stack]]:
            return {}

    class Short(Plain):
        paper = PAPER

        def combine(self, logits: Mapping[str, Tensor], read: Read = NOTHING_READ) -> Tensor:
            return logits["prompt"][:5]

    prompt = Prompt(numbers(5))
    with pytest.raises(FieldError, match=r"new_tokens = 0: must be 1 or more"):
        heedful.decode(model, prompt, Plain(), new_tokens=0)
    with pytest.raises(FieldError, match="must name one run or more"):
        heedful.decode(model, prompt, Empty())
    with pytest.raises(SiteError, match=r"must return logits \(128,\), got \(5,\)"):
        heedful.decode(model, prompt, Short())
    for kind in ("bert", "t5"):
        with pytest.raises(RefusedModel, match="no causal language model"):
            heedful.decode(models.tiny(kind), prompt, Plain())
    with pytest.raises(RefusedModel, match="not a transformers model"):
        heedful.decode(torch.nn.Linear(2, 2), prompt, Plain())


# arrange


def test_arrange_reads_and_reorders(model) -> None:
    tokens = numbers(12)
    prompt = Prompt(tokens, {"parts": ((1, 3), (3, 7), (8, 9)), "question": ((9, 12),)})
    before, step = state(model), Reverse(seen=[])
    new = heedful.arrange(model, prompt, step)
    assert state(model) == before
    assert new.tokens == tokens[:1] + tokens[8:9] + tokens[3:7] + tokens[7:8] + tokens[1:3] + tokens[9:]
    assert new.roles["parts"] == ((1, 2), (2, 6), (7, 9))
    assert new.roles["question"] == ((9, 12),)
    with heedful.attach(model, Shares()) as run, torch.no_grad():
        run(torch.tensor([tokens]))
    assert all(close_model(step.seen[0][n].value, run[Shares()][n].value) for n in range(3))


def test_arrange_reads_a_part_of_a_model() -> None:
    model, step = models.tiny("llava"), Reverse(seen=[])
    heedful.arrange(model, Prompt(numbers(6), {"parts": ((0, 2), (2, 5))}), step, only="model.language_model")
    assert len(step.seen[0]) == 2


def test_arrange_leaves_the_model_as_it_was_after_a_fault(model) -> None:
    before = state(model)
    with pytest.raises(FieldError, match="no spans named 'parts'"):
        heedful.arrange(model, Prompt(numbers(6)), Reverse(seen=[]))
    assert state(model) == before

    class ReadsNothing(Reverse):
        paper = PAPER

        def arrange(self, prompt: Prompt, read: Reader) -> Prompt:
            return read(prompt, Zero())

    with pytest.raises((FieldError, StatisticError), match="nothing"):
        heedful.arrange(model, Prompt(numbers(6)), ReadsNothing(seen=[]))
    assert state(model) == before


# prompts


def test_prompts_say_what_is_wrong() -> None:
    with pytest.raises(FieldError, match="one token id or more"):
        Prompt(())
    for span in ((0, 7), (3, 3), (-1, 2)):
        with pytest.raises(FieldError, match="within the 6 tokens"):
            Prompt(numbers(6), {"parts": (span,)})
    prompt = Prompt(numbers(6), {"parts": ((0, 2), (2, 5)), "across": ((1, 4),)})
    with pytest.raises(FieldError, match="no spans named 'prats'"):
        prompt.spans("prats")
    for order in ((0,), (0, 0), (0, 1, 2)):
        with pytest.raises(FieldError, match="each of 2 spans once"):
            prompt.reordered("parts", order)
    with pytest.raises(FieldError, match="must lie outside"):
        prompt.reordered("parts", (1, 0))
    for spans in (((2, 5), (0, 2)), ((0, 3), (2, 5))):
        with pytest.raises(FieldError, match="one after the other"):
            Prompt(numbers(6), {"parts": spans}).reordered("parts", (1, 0))


def test_prompts_keep_their_length_and_their_tokens() -> None:
    prompt = Prompt(numbers(9), {"parts": ((0, 1), (1, 5), (6, 9))})
    assert len(prompt) == 9
    assert prompt.reordered("parts", (0, 1, 2)) == prompt
    there = prompt.reordered("parts", (2, 0, 1))
    assert sorted(there.tokens) == sorted(prompt.tokens)
    assert there.reordered("parts", (1, 2, 0)) == prompt
