"""What explanations that follow a text from layer to layer share: all rows of a layer, before the next one begins."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call, Phase
from heedful.core.errors import FieldError
from heedful.core.method import Method


class LayerByLayer(Method, abstract=True):
    """Keeps something for each row of a layer's tiles, and gives it whole to the layer above."""

    chunk_invariant = False  # a text that comes in pieces is refused

    def idle(self, call: Call) -> bool:
        return call.phase is Phase.DECODE

    def keep(self, tile: Tensor, call: Call) -> None:
        """Hold what a tile's rows come to, `[b r ...]`."""
        call.state.forward["tiles"][call.rows.start] = tile

    def below(self, call: Call) -> Tensor | None:
        """What was kept in the layer below, `[b n ...]`; None in the first layer."""
        held = call.state.forward
        if held.get("layer") != call.layer:
            if "tiles" in held:
                if call.below is None:
                    rule = f"begins another list of layers than layer {held['layer']} is of; attach to one part"
                    raise FieldError(self, "layers", call.layer, rule, "attach(..., only='model.language_model')")
                if held["layer"] != call.below:
                    good = f".on(layers=range({call.layer}, {call.depth}))"
                    raise FieldError(
                        self, "layers", call.layer, f"must follow layer {held['layer']} without a gap", good
                    )
                held["below"] = torch.cat([x for _, x in sorted(held["tiles"].items())], 1)
            held["layer"], held["tiles"] = call.layer, {}
        elif call.rows.start in held["tiles"]:
            rule = f"{call.name} runs twice in one forward, which nothing can follow; attach to another part"
            raise FieldError(self, "layers", call.layer, rule, "attach(..., only='model.language_model')")
        return held.get("below")

    def of_tile(self, below: Tensor, weights: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """What the layer below has for the keys and for the rows of a tile with weights `[b r k]`."""
        keys, own = below[:, call.cols], below[:, call.rows]
        if keys.shape[:2] != (len(weights), weights.shape[2]) or own.shape[1] != weights.shape[1]:
            rule = f"{call.name} reads other tokens than the layer before; attach to one part, with the usual cache"
            raise FieldError(self, "layers", call.layer, rule, "attach(..., only='model.encoder')")
        return keys, own

    def require_whole(self, call: Call) -> None:
        """Refuse what cannot be followed: another sequence's keys, and a text in pieces."""
        if call.cross:
            rule = f"{call.name} attends to another sequence; attach to one of the two with only=..."
            good = f"attach(model, {type(self).__name__}(), only='encoder')"
            raise FieldError(self, "layers", call.layer, rule, good)
        if call.queries.first != call.rows.start:
            rule = "the text comes in pieces and is needed whole; give it in one forward without a filled cache"
            raise FieldError(self, "rows", call.rows, rule, "model(input_ids)")
