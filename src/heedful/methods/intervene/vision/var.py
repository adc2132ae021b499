"""Sinks keep a share beta of their weight; marked tokens that are no sinks get the rest, in heads that look at them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import FitContext, Readings
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveFloat, RoleName, Share
from heedful.core.sites import Site, at, reads
from heedful.core.state import ByIndex
from heedful.core.stats import Mean
from heedful.kit.batches import at_least_one, read


def _shares(stream: Tensor) -> Tensor:
    """Each dimension's size over the token's root mean square, `[b n e]`."""
    wide = stream.detach().float()
    return wide.abs() * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)


class VAR(Method):
    """Takes weight from sinks, found by massive dimensions of the residual stream, and gives it to a marked span.

    A layer's sinks are those of the stream that the layer before it leaves, so the first layer in scope is left alone;
    the authors act from the third layer to the last but one: `.on(layers=range(1, depth - 1))`. `fit` finds the massive
    dimensions of a model on the first tokens of any texts.
    """

    paper = Paper(
        "P016",
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        "Seil Kang, Jinyeong Kim, Junhyeok Kim, Seong Jae Hwang",
        2025,
        "2503.03321",
        "ICLR 2025",
        differs=(
            "Any marked span may stand for the image.",
            "The authors' code leaves a layer alone in which no marked token is a sink; here a span without sinks has "
            "a sink share of 0, and the text's own sinks feed it.",
            "A token that the model adds may be a sink too; the authors look at those of the prompt.",
        ),
    )
    role: RoleName = "marked"  # the spans that stand for the image
    # a dimension over the token's root mean square, above which the token is a sink; the paper: 20
    tau: PositiveFloat = 20.0
    rho: Share = 0.5  # share of a head's weight on the span that may lie on sinks, at most; the authors' code: 0.5
    least: Share = 0.2  # weight that a head's row gives to the span at least; the authors' code: 0.2
    beta: Share = 0.6  # share of a sink's weight that it keeps; the paper's p: 0.6
    # massive dimensions of the stream; None: any may be one
    dims: Annotated[tuple[NonNegativeInt, ...], MinLen(1)] | None = None

    @classmethod
    def neutral(cls) -> VAR:
        return cls(beta=1.0)

    @classmethod
    def example(cls) -> VAR:
        return cls(tau=2.5, least=0.0, rho=1.0)

    def idle(self, call: Call) -> bool:
        return self.beta == 1

    @at(Site.PATTERN)
    def redistribute(self, pattern: Tensor, call: Call) -> Tensor:
        layer, sinks = call.state.forward.get("sinks", (None, None))  # [b n], by index
        if sinks is None or layer != call.below or call.cross:
            return pattern
        stops = [max((stop for _, stop in region), default=0) for region in call.regions(self.role)]
        after = torch.tensor(stops, device=pattern.device)[:, None, None, None]
        marked = call.spread(call.marked(self.role))[:, :, None]
        place = call.pairs.k_index[:, :, 0].clamp(max=sinks.shape[1] - 1).expand(len(sinks), -1, -1)
        sunk = sinks[:, None].expand(-1, place.shape[1], -1).gather(-1, place)[:, :, None]  # [b h|1 1 k]
        span = pattern.masked_fill(~marked, 0.0).sum(-1, keepdim=True)
        free = pattern.masked_fill(~marked | sunk, 0.0)
        rest = free.sum(-1, keepdim=True)
        freed = (1 - self.beta) * pattern.masked_fill(~sunk, 0.0).sum(-1, keepdim=True)
        looks = (span >= self.least) & (span - rest <= self.rho * span) & (rest > 0) & (call.pairs.q >= after)
        given = freed / rest.masked_fill(rest == 0, 1.0) * free
        return torch.where(looks, pattern.where(~sunk, self.beta * pattern) + given, pattern)

    @reads(Site.RESIDUAL)
    def find_sinks(self, stream: Tensor, call: Call) -> None:
        """Leave the stream's sinks, of this call's tokens and those before, for the next layer."""
        found = self.massive(stream)
        if start := call.queries.first or 0:
            before = call.state.cache.get("sinks", found[:, :0])
            found = torch.cat([torch.nn.functional.pad(before, (0, start - before.shape[1])), found], 1)
        call.state.cache["sinks"] = ByIndex(found, 1)
        call.state.forward["sinks"] = call.layer, found

    def massive(self, stream: Tensor) -> Tensor:
        """Which tokens of a stream are sinks, `[b n]`."""
        shares = _shares(stream)
        return (shares if self.dims is None else shares[..., list(self.dims)]).amax(-1) > self.tau

    def fit(self, context: FitContext, batches: Iterable[Mapping[str, Any]]) -> VAR:
        """The dimensions in which first tokens are above tau, on average, in at least half of the layers."""
        shares = read(context, _FirstToken(), at_least_one(self, batches))
        found = ((shares > self.tau).double().mean(0) >= 0.5).nonzero().flatten().tolist()
        if not found:
            top = float(shares.amax(-1).median())
            rule = f"no dimension of a first token lies above it in half of the layers; its largest is about {top:.3g}"
            raise FieldError(self, "tau", self.tau, rule, round(0.8 * top, 2))
        return replace(self, dims=tuple(found))


class _FirstToken(Method):
    """Each dimension's size in a text's first token, over the token's root mean square."""

    @reads(Site.RESIDUAL)
    def first(self, stream: Tensor, call: Call) -> Mean | None:
        at = (call.q_pos[:, 0] == 0) & call.is_text[:, 0]  # [b|1 n]
        shares = _shares(stream)[at.expand(stream.shape[:2])]
        return Mean.of(shares.sum(0), len(shares)) if len(shares) else None

    def answer(self, readings: Readings) -> Tensor:
        """`[layers e]`."""
        return torch.stack(readings.values_by_layer)


if __name__ == "__main__":
    from heedful import attach, fit, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The code is red. The code is blue. So the code is", return_tensors="pt")
    method = fit(VAR(), model, [text])
    print(method)
    for roles in ({"marked": ((0, 5),)}, {"marked": ((5, 10),)}):
        with torch.no_grad(), attach(model, method.on(layers=range(1, 29)), roles=roles) as run:
            top = run(**text).logits[0, -1].softmax(-1).topk(3)
        print(roles, [(tokenizer.decode(i), round(float(p), 3)) for p, i in zip(*top, strict=True)])
