"""A model that reads a prompt and goes on from it, whatever acts on it: a stack, or a step beside the attention."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from heedful.adapters.cache_name import CACHE, cache_of
from heedful.adapters.wrapped import device_of, unwrapped
from heedful.api import arrange, attach, operate, reader
from heedful.core.asked import asks
from heedful.core.errors import FieldError, RefusedModel, SiteError, shape_of
from heedful.core.kinds.decode import NOTHING, Decode
from heedful.core.kinds.tokens import Prompt, Tokens
from heedful.core.kinds.weights import Surgery
from heedful.core.method import Part, Stack, as_stack, clash
from heedful.core.ranges import PositiveInt
from heedful.drawing import Guided, begin, drawn, guide_of
from heedful.engine.run import Run
from heedful.looking import LOOKS, THINGS, WORD_PLACES, word_places
from heedful.shown import Shown

Contender = Part | Stack | Tokens | Decode | Surgery  # whatever can be tried on a model
ALONE = Shown()  # a text with nothing beside it
FED = {"text": "input_ids", "sound": "decoder_input_ids"}  # what a model calls the tokens of a prompt


class TextModel(ABC):
    """Reads a prompt, and goes on from it token by token. A context manager: it leaves the model as it was."""

    run: Run | None = None  # where a stack acts
    rows: int = 1  # of a batch, all of the same text
    shown: Shown = ALONE  # what is read beside the prompt, from the next one on

    @abstractmethod
    def read(self, prompt: Prompt, cut: int | None = None, every: bool = False) -> Tensor:
        """Logits `[n v]` after each token from number `cut - 1` on, or `[1 v]` after the last one unless `every`.

        With `cut` the first so many tokens are read in a call of their own.
        """

    @property
    def active(self) -> bool:
        """Whether what is tried has changed anything so far; a run calls itself active once every part has."""
        return self.run is not None and bool(self.run.state.changed)

    @property
    def reason(self) -> str:
        """Why nothing has changed so far, where that is known."""
        if self.run is None or self.active:
            return ""
        return "; ".join(filter(None, map(self.run.reason, self.run.stack.methods)))

    @abstractmethod
    def go_on(self, token: int) -> Tensor:
        """Logits `[v]` after one more token."""

    def looked(self) -> tuple[Tensor, Tensor]:
        """Where the prompt's last token looks in its picture; of a scene from where words are looked at, and boxes."""
        if self.run is None:
            raise FieldError("text_model()", "shown", self.shown, "does not say that looks are told", "looks=True")
        found: Tensor = self.run[LOOKS][0]
        self.run.state.statistics.clear()
        return found, torch.empty(0)

    @property
    @abstractmethod
    def caches(self) -> tuple[Any, ...]:
        """What the model keeps of the text so far."""

    @abstractmethod
    def branch(self) -> AbstractContextManager[None]:
        """A `with` after which it goes on from where it stood before."""

    def close(self) -> None:
        """Leave the model as it was."""
        if self.run is not None:
            self.run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Single(TextModel):
    """A model as it is, or under a run."""

    def __init__(self, model: Any, run: Run | None = None, shown: Shown = ALONE) -> None:
        if shown.reads == "text":
            require_causal(model)
        self.model, self.run, self.shown = model, run, shown
        self.device = device_of(model)
        takes = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: Any = None
        self._heard: dict[str, Any] = {}  # what the encoder made of a sound

    @torch.no_grad()
    def _feed(self, tokens: Iterable[int], every: bool) -> Tensor:
        if self.shown.reads == "image":
            return class_logits(self.model(**self._beside()), self.shown)
        ids = torch.tensor([list(tokens)] * self.rows, device=self.device)
        more = {**({} if every else self._last), **(self._beside() if self._cache is None else self._heard)}
        seen = self.model(**{FED[self.shown.reads]: ids, CACHE: self._cache}, use_cache=True, **more)
        self._cache = cache_of(seen)
        if self.shown.reads == "sound":
            self._heard = {"encoder_outputs": BaseModelOutput(seen.encoder_last_hidden_state)}
        return seen.logits[0] if every else seen.logits[0, -1:]

    def _beside(self) -> dict[str, Any]:
        """What is read beside the prompt, once for each row."""

        def placed(x: Tensor) -> Tensor:
            x = x.to(self.device, self.model.dtype if x.is_floating_point() else x.dtype)
            return torch.cat([x] * self.rows)

        return {name: placed(x) if isinstance(x, Tensor) else x for name, x in self.shown.inputs.items()}

    def read(self, prompt: Prompt, cut: int | None = None, every: bool = False) -> Tensor:
        self._cache = None
        if self.run is not None:
            self.run.forget()
            self.run.roles = prompt.roles
        if cut is None:
            return self._feed(prompt.tokens, every)
        first = self._feed(prompt.tokens[:cut], False)
        rest = self._feed(prompt.tokens[cut:], every)
        return torch.cat([first, rest]) if every else rest

    def go_on(self, token: int) -> Tensor:
        return self._feed((token,), False)[0]

    @property
    def caches(self) -> tuple[Any, ...]:
        return () if self._cache is None else (self._cache,)

    @contextmanager
    def branch(self) -> Iterator[None]:
        before, self._cache = self._cache, copy.deepcopy(self._cache)
        try:
            with nullcontext() if self.run is None else self.run.branch():
                yield
        finally:
            self._cache = before


class Operated(Single):
    """A copy of a model with edited weights."""

    def __init__(self, model: Any, surgery: Surgery, only: Any = None, shown: Shown = ALONE) -> None:
        super().__init__(operate(model, surgery, only=only), shown=shown)
        self.run = attach(self.model, LOOKS, only=only) if shown.looks else None
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        self._same = all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    @property
    def active(self) -> bool:
        return not self._same


class Arranged(Single):
    """A model that reads a prompt as a step on prompts would have it."""

    def __init__(self, model: Any, step: Tokens, only: Any = None, shown: Shown = ALONE) -> None:
        super().__init__(model, shown=shown)
        self.step, self.only = step, only
        self._changed = False

    @property
    def active(self) -> bool:
        return self._changed

    def read(self, prompt: Prompt, cut: int | None = None, every: bool = False) -> Tensor:
        new = arrange(self.model, prompt, self.step, only=self.only)
        self._changed |= new.tokens != prompt.tokens
        if every and new.tokens != prompt.tokens:
            raise FieldError(self.step, "prompt", "graded by its own tokens", "must be asked something", "options")
        return super().read(new, cut if len(new) == len(prompt) else None, every)


class Combined(TextModel):
    """Several runs over variants of the prompt, whose logits a decoding step makes into one."""

    def __init__(self, model: Any, step: Decode, only: Any = None, shown: Shown = ALONE) -> None:
        if shown.reads == "text":
            require_causal(model)
        self.model, self.step, self.only, self.shown = model, step, only, shown
        self._ready = step
        self._parts: dict[str, tuple[Single, Run]] = {}

    @property
    def active(self) -> bool:
        return any(text_model.active for text_model, _ in self._parts.values())

    def read(self, prompt: Prompt, cut: int | None = None, every: bool = False) -> Tensor:
        if every:
            raise FieldError(self.step, "prompt", "graded by its own tokens", "must be asked something", "options")
        self.close()
        self._parts = {}
        self._ready = self.step.ready(prompt, reader(self.model, self.only, self.shown.inputs))
        variants = self._ready.variants(prompt)
        if not variants:
            raise FieldError(self.step, "variants", {}, "must name one run or more", {"prompt": (prompt, Stack())})
        for name, (_, stack) in variants.items():
            run = attach(self.model, stack, only=self.only)
            self._parts[name] = Single(self.model, run, self.shown), run
            self._parts[name][0].rows = self.rows
            run.pause()

        def begin(name: str, text_model: Single) -> Tensor:
            shown = variants[name][0]
            return text_model.read(shown, cut if len(shown) == len(prompt) else None)[0]

        return self._each(begin)[None]

    def go_on(self, token: int) -> Tensor:
        return self._each(lambda _, text_model: text_model.go_on(token))

    def _each(self, act: Callable[[str, Single], Tensor]) -> Tensor:
        logits, read = {}, {}
        for name, (text_model, run) in self._parts.items():
            run.resume()
            run.state.statistics.clear()  # readers tell of this forward, and of none before it
            logits[name], read[name] = act(name, text_model), run.answers()
            run.pause()
        mixed, want = self._ready.combine(logits, read), next(iter(logits.values())).shape
        if not isinstance(mixed, Tensor) or mixed.shape != want:
            raise SiteError(f"{self.step!r}: combine must return logits {tuple(want)}, got {shape_of(mixed)}")
        return mixed

    @property
    def caches(self) -> tuple[Any, ...]:
        return tuple(cache for text_model, _ in self._parts.values() for cache in text_model.caches)

    @contextmanager
    def branch(self) -> Iterator[None]:
        with ExitStack() as all_of_them:
            for text_model, _ in self._parts.values():
                all_of_them.enter_context(text_model.branch())
            yield

    def close(self) -> None:
        for text_model, _ in self._parts.values():
            text_model.close()


class Drawer(TextModel):
    """A diffusion model that is told a prompt. The picture is read place by place, as a text is token by token.

    What a judge says of the first place stands behind the prompt, and of each further one behind the one before,
    whatever token it is given.
    """

    def __init__(self, model: Any, what: Contender | None, shown: Shown, **how: Any) -> None:
        if isinstance(what, Tokens | Surgery):
            rule = "acts on texts or on weights, and a scene is drawn under what acts on attention"
            raise FieldError("compare()", "methods", what, rule, "TempScale(0.5)")
        self.model, self.shown, self.device = model, shown, device_of(model)
        beside = Stack((WORD_PLACES,)) if shown.looks else Stack()
        self._guide, self._guided = None, None
        if isinstance(what, Decode):
            self._guided = Guided(model, what, beside, **how)
        elif what is not None or shown.looks:
            parts = as_stack(what or Stack())
            self._guide, self.run = guide_of(parts), attach(model, Stack((*parts, *beside)), **how)
        # what was made and of which words, what the judge says of it, [places things], and how far that is read
        self._made, self._prompt, self._said, self._place = torch.empty(0), Prompt((0,)), torch.empty(0), 0

    @property
    def active(self) -> bool:
        return super().active if self._guided is None else self._guided.active

    def read(self, prompt: Prompt, cut: int | None = None, every: bool = False) -> Tensor:
        draws = self.shown.draws
        if draws is None or every:
            raise FieldError("text_model()", "shown", self.shown, "must say how a scene is drawn and judged", "a Scene")
        acts = self._guided or self.run
        begin(acts, prompt, {**prompt.roles, **draws.roles})
        noise = torch.cat([draws.noise.to(self.device)] * self.rows)
        self._made, self._prompt = drawn(self.model, acts, self._guide, draws, noise), prompt
        self._said, self._place = draws.judge(self._made)[0], 0
        return self._said[:1]

    def looked(self) -> tuple[Tensor, Tensor]:
        run = self.run if self._guided is None else self._guided.first
        if run is None or self.shown.draws is None or self.shown.draws.boxes is None:
            return super().looked()
        boxes = self.shown.draws.boxes(self._made)[0]
        words = word_places(run[WORD_PLACES], boxes.shape[1] / boxes.shape[2], run.layer_names)
        return torch.stack([words[start:stop].sum(0) for start, stop in self._prompt.spans(THINGS)]), boxes

    def close(self) -> None:
        super().close()
        if self._guided is not None:
            self._guided.close()

    def go_on(self, token: int) -> Tensor:
        self._place += 1
        return self._said[self._place]

    @property
    def caches(self) -> tuple[Any, ...]:
        return ()

    @contextmanager
    def branch(self) -> Iterator[None]:
        before = self._place
        try:
            yield
        finally:
            self._place = before


def require_causal(model: Any) -> None:
    """Refuse a model that cannot go on from a prompt."""
    inner = unwrapped(model)
    if not inner.can_generate() or inner.config.is_encoder_decoder:
        raise RefusedModel(f"a prompt has to be continued, and {type(inner).__name__} is no causal language model")


def class_logits(seen: Any, shown: Shown) -> Tensor:
    """The logits `[1 classes]` of a picture, by the model's own head or by the one that it was given."""
    logits: Tensor = seen.logits if shown.head is None else shown.head(features(seen.last_hidden_state))
    return logits[:1]


def features(states: Tensor) -> Tensor:
    """What an encoder knows of each picture `[b 2e]`: its first token, which may be of the class, and the mean."""
    return torch.cat([states[:, 0], states.mean(1)], -1).float()


def text_model(model: nn.Module, what: Contender | None = None, shown: Shown = ALONE, **how: Any) -> TextModel:
    """The model under whatever is to be tried on it; None for the model as it is. `how` goes to `attach`."""
    only = how.get("only")
    if shown.draws is not None:
        return Drawer(model, what, shown, **how)
    if shown.looks:
        return _looking(model, what, shown, **how)
    if what is None:
        return Single(model, shown=shown)
    if isinstance(what, Tokens):
        return Arranged(model, what, only, shown)
    if isinstance(what, Decode):
        return Combined(model, what, only, shown)
    if isinstance(what, Surgery):
        return Operated(model, what, only, shown)
    if shown.reads == "text":
        require_causal(model)
    return Single(model, attach(model, what, **how), shown)


def _looking(model: nn.Module, what: Contender | None, shown: Shown, **how: Any) -> TextModel:
    """The same, told where it looks."""
    if isinstance(what, Tokens | Decode):
        rule = "where a prompt's last token looks is told under methods on attention and surgeries alone"
        raise FieldError("compare()", "methods", what, rule, "TempScale(0.5)")
    if isinstance(what, Surgery):
        return Operated(model, what, how.get("only"), shown)
    parts = [] if what is None else what.parts if isinstance(what, Stack) else [what]
    for part in parts:
        if clash(part, LOOKS):
            rule = "leaves no map of single tokens, off which it is read where a prompt's last token looks in a picture"
            raise FieldError("compare()", "methods", part, rule, "TempScale(0.5)")
    return Single(model, attach(model, Stack((*parts, LOOKS)), **how), shown)


@torch.no_grad()
@asks
def decode(
    model: nn.Module, prompt: Prompt, step: Decode, *, new_tokens: PositiveInt = 20, stop: int | None = None,
    only: str | Iterable[str] | None = None, inputs: Mapping[str, Any] = NOTHING,
) -> tuple[int, ...]:  # fmt: skip
    """Greedy continuation of a prompt from logits that a decoding step combines.

    `inputs` are what the model takes beside the prompt's tokens, such as `pixel_values`.
    """
    out: list[int] = []
    with Combined(model, step, only, Shown(inputs)) as mixed:
        logits = mixed.read(prompt)[0]
        while True:
            out.append(int(logits.argmax()))
            if len(out) == new_tokens or out[-1] == stop:
                return tuple(out)
            logits = mixed.go_on(out[-1])
