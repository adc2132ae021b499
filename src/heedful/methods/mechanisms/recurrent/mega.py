"""Out = u (silu(W_x m + W_h (r attend(m, v))) - x): m a damped moving average of x, of which a single head looks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from heedful.authoring import Call, FieldError, Layer, Method, Paper, Site, SiteError, at
from heedful.core.state import ByIndex, Until

CHUNK = 64  # tokens whose averages are taken at once


class Mega(Method):
    """Moving averages tell what is near, one gated head what is far. For models trained with it."""

    paper = Paper(
        "P087",
        "Mega: Moving Average Equipped Gated Attention",
        "Xuezhe Ma, Chunting Zhou, Xiang Kong, Junxian He, Liangke Gui, Graham Neubig, Jonathan May, Luke Zettlemoyer",
        2023,
        "2209.10655",
        "ICLR 2023",
        differs=(
            "For causal models: averages run one way, and softmax weighs, not Laplace's function; texts are not cut "
            "into chunks that see themselves alone.",
            "The update gate weighs the difference to what the block is handed, which the model's norm has seen, where "
            "the authors' has the stream itself. The model's own projections stay in it, unused.",
            "The learned bias of a distance is shared by all of `reach` tokens and more; the authors' ends there.",
            "Weights are drawn by a generator seeded by the layer's number; nothing is dropped in training.",
        ),
    )
    shared: int = 64  # z, channels that queries and keys are made of; the paper's language models: 128 to 256
    averages: int = 16  # of each channel; the authors' code: 16 for language
    reach: int = 128  # distances with a bias of their own

    def __post_init__(self) -> None:
        for name in ("shared", "averages", "reach"):
            if getattr(self, name) < 1:
                raise FieldError(self, name, getattr(self, name), "must be 1 or more", getattr(Mega, name))

    @classmethod
    def example(cls) -> Mega:
        return cls(8, 3, 5)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(layer.number)
        e, z, n = layer.width, self.shared, self.averages

        def drawn(*shape: int, spread: float = 0.02) -> Tensor:
            return spread * torch.randn(shape, generator=random)

        signs = torch.ones(n).index_fill(0, torch.arange(1, n, 2), -1.0)
        return {
            "value": drawn(2 * e, e), "value_bias": torch.zeros(2 * e),
            "base": drawn(z + 4 * e, e), "base_bias": torch.zeros(z + 4 * e),
            "out": drawn(e, 2 * e), "out_bias": torch.zeros(e),
            "turn": drawn(2, z), "turn_bias": torch.zeros(2, z), "distance": drawn(self.reach),
            "damping": drawn(e, n, spread=0.2), "decay": drawn(e, n, spread=0.2), "expand": signs + drawn(e, n),
            "shrink": drawn(e, n, spread=1.0), "skip": drawn(e, spread=1.0),
        }  # fmt: skip

    @at(Site.BLOCK)
    def attend(self, hidden: Tensor, call: Call) -> Tensor:
        if not call.mask.causal:
            raise SiteError(f"layer {call.layer}: Mega's averages need a causal call; restrict it with .on(layers=...)")
        p, e = call.params, hidden.shape[-1]
        x = hidden.to(p["base"].dtype)
        text = call.is_text[:, 0].expand(x.shape[:2])
        _goes_on(call, len(x), x.shape[1])
        value = silu(linear(x, p["value"], p["value_bias"]))
        averaged = silu(_averaged(x * text[..., None], call) + x * p["skip"])
        update, inner, direct = linear(averaged, p["base"], p["base_bias"]).split([e, self.shared + 2 * e, e], -1)
        seen, reset = silu(inner).split([self.shared, 2 * e], -1)
        query, key = ((seen * w + b) for w, b in zip(p["turn"], p["turn_bias"], strict=True))
        mixed = self._looks(query, key, value, text, call)
        new = silu(direct + linear(mixed * reset, p["out"], p["out_bias"]))
        return update.sigmoid() * (new - x)

    def _looks(self, query: Tensor, key: Tensor, value: Tensor, text: Tensor, call: Call) -> Tensor:
        """What one head makes of the values so far, `[b n 2e]`."""
        for name, own in (("key", key), ("value", value), ("text", text)):
            before = call.state.cache.get(name)
            call.state.cache[name] = ByIndex(own if before is None else torch.cat([before, own], 1), 1)
        key, value, text = (call.state.cache[name] for name in ("key", "value", "text"))
        total, n = key.shape[1], query.shape[1]
        place = torch.arange(total, device=query.device)
        back = place[total - n :, None] - place  # [n k]
        scores = query @ key.mT / math.sqrt(self.shared) + call.params["distance"][back.clamp(0, self.reach - 1)]
        hidden = (back < 0) | ~text[:, None]
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).masked_fill(hidden, 0.0) @ value


def _goes_on(call: Call, texts: int, n: int) -> None:
    """See to it that the state is that of the tokens before, and say of how many it will be."""
    first = call.queries.first or 0
    end = call.state.cache.get("end")
    if first and (end is None or bool(end.ne(first).any())):
        raise SiteError(
            f"layer {call.layer}: Mega goes on from token {first}, and its averages are not of the tokens before; was "
            "the cache cut back or made without it? Read the text again from its start"
        )
    call.state.cache["end"] = Until(torch.full((texts,), first + n, device=call.queries.index.device))


def _averaged(x: Tensor, call: Call) -> Tensor:
    """The damped averages of each channel up to each token, mixed, `[b n e]`; their state is `[b e averages]`."""
    p = call.params
    weight, keep = p["damping"].sigmoid(), 1 - p["damping"].sigmoid() * p["decay"].sigmoid()  # [e a]
    into, out = weight * p["expand"], p["shrink"] / math.sqrt(p["shrink"].shape[1])
    size = min(CHUNK, x.shape[1])
    powers = (torch.arange(size + 1, device=x.device) * keep.log()[..., None]).exp()  # [e a size + 1]
    kernel = ((into * out)[..., None] * powers[..., :-1]).sum(1)  # [e size]: by distance
    ago = torch.arange(size, device=x.device)[:, None] - torch.arange(size, device=x.device)
    band = kernel[:, ago.clamp(min=0)].tril()  # [e size size]
    state = call.state.cache.get("averages")
    state = x.new_zeros(len(x), *keep.shape) if state is None else state
    found = []
    for piece in x.split(size, 1):
        m = piece.shape[1]
        near = torch.einsum("eij,bje->bie", band[:, :m, :m], piece)
        far = torch.einsum("bea,ea,eai->bie", state, out, powers[..., 1 : m + 1])
        found.append(near + far)
        fresh = torch.einsum("bje,ea,eaj->bea", piece, into, powers[..., :m].flip(-1))
        state = state * powers[..., m] + fresh
    call.state.cache["averages"] = state
    return torch.cat(found, 1)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, Mega()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()})
