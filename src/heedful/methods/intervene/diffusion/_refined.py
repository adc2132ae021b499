"""What methods share that bring together words' maps and the picture's self-attention: both, averaged over layers."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from heedful.core.call import Call
from heedful.core.entry import Readings
from heedful.core.errors import FieldError
from heedful.core.method import Method
from heedful.core.sites import Site, reads
from heedful.core.stats import Cat


class Refined(Method, abstract=True):
    """`run[method]` has what comes of both for each forward. Layers must be of one number of places."""

    whole_map = True
    subjects = ("encoder-decoder",)

    @abstractmethod
    def words(self, mean: Tensor, call: Call) -> Tensor:
        """Maps of places `[b ... n]`, of what places give to words, `[b n k]`."""

    @abstractmethod
    def refined(self, words: Tensor, places: Tensor) -> Tensor:
        """What comes of the maps `[b ... n]` and self-attention `[b n n]`."""

    @reads(Site.PATTERN)
    def look(self, pattern: Tensor, call: Call) -> Cat | None:
        mean = pattern.detach().mean(1)  # [b n k]
        if call.cross:
            mean = self.words(mean, call)
        kept, kind = call.state.forward, "words" if call.cross else "places"
        so_far = kept.get(kind, mean.new_zeros(mean.shape))
        if so_far.shape != mean.shape:
            rule = f"layer {call.layer} has {mean.shape[-1]} places, and layers before it {so_far.shape[-1]}"
            raise FieldError(self, "on", call.layer, rule, ".on(layers=...) with layers of one size")
        kept[kind], kept[f"layers of {kind}"] = so_far + mean, kept.get(f"layers of {kind}", 0) + 1
        if "words" not in kept or "places" not in kept:
            return None
        words, places = (kept[name] / kept[f"layers of {name}"] for name in ("words", "places"))
        found = self.both(words, places)
        # what a layer changes, so that over layers it is the map of their mean, whichever layer is the last
        before, kept["found"] = kept.get("found", 0.0), found
        return Cat.of(f"{call.forward:06d}", found - before)

    def both(self, words: Tensor, places: Tensor) -> Tensor:
        """The same, where both are of as many places."""
        if words.shape[-1] != places.shape[-1]:
            rule = f"cross-attention has {words.shape[-1]} places, and self-attention {places.shape[-1]}"
            raise FieldError(self, "on", words.shape[-1], rule, ".on(layers=...) with layers of one size")
        return self.refined(words, places)

    def answer(self, readings: Readings) -> list[Tensor]:
        """What came of each forward, in their order."""
        found: dict[str, Tensor] = {}
        for stat in readings.values():
            for name, x in stat.tensors().items():
                found[name] = found.get(name, 0.0) + x
        return [found[name] for name in sorted(found)]
