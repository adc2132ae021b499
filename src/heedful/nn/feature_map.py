"""Gates and mixers for convolutional nets: the places of a feature map are tokens on a grid."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from heedful.adapters.carried import shelf_of
from heedful.adapters.compiled import as_written
from heedful.core.asked import asks
from heedful.core.call import Call
from heedful.core.entry import Layer
from heedful.core.errors import FieldError, RefusedModel
from heedful.core.method import Part, Stack, as_stack
from heedful.core.positions import Positions
from heedful.core.regions import Region
from heedful.core.sites import Site
from heedful.engine.attend import replaced
from heedful.engine.attention_call import AttentionCall
from heedful.engine.plan import Plan
from heedful.engine.stages import stage
from heedful.nn.served import Served

SITES = (Site.HIDDEN, Site.BLOCK, Site.OUTPUT)


class FeatureMap(Served):
    """Feature maps `[b channels rows cols]` under a method that acts on tokens, such as ELA or PolarizedSelfAttention.

    It stands behind a convolution as such methods do behind attention, or in place of one. What the method learns is
    the module's own, and `run`, `layer` and `depth` are those of `Attention`.
    """

    @asks
    def __init__(self, channels: int, method: Part | Stack, *, layer: int = 0, depth: int | None = None) -> None:
        super().__init__()
        self.channels, self.layer, self.depth = channels, layer, depth or layer + 1
        self.method = as_stack(method)
        if channels < 1:
            raise FieldError(self, "channels", channels, "must be 1 or more", 64)
        if layer < 0:
            raise FieldError(self, "layer", layer, "must be 0 or more, the number among a model's feature maps", 0)
        if depth is not None and depth <= layer:
            raise FieldError(self, "depth", depth, f"must be above layer {layer}; so many has the model", layer + 1)
        others = [edit for part in self.method.methods for edit in part.edits if edit.site not in SITES]
        if others or any(edit.before_rotary for part in self.method.methods for edit in part.edits):
            rule = "acts inside attention, which a feature map has none of; heedful.nn.Attention takes it"
            raise FieldError(self, "method", self.method, rule, None)
        self._open()

    def size(self) -> Layer:
        """One head as wide as the map."""
        c = self.channels
        return Layer(self.layer, 1, 1, c, c, c, highest=self.depth - 1)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.method!r}"

    @as_written  # the compiler goes around it
    def forward(self, x: Tensor) -> Tensor:
        """The map as the method leaves it, of the same shape."""
        if self.run.model is not self:
            raise RefusedModel("FeatureMap is run in a replica, as DataParallel makes them; use one process a device")
        if x.ndim != 4 or x.shape[1] != self.channels or not x.numel():
            rule = f"must be of ('b', {self.channels}, 'rows', 'cols')"
            raise FieldError(self, "x", tuple(x.shape), rule, (1, self.channels, 7, 7))
        return self._one_forward(lambda: self._made(x)).mT.reshape(x.shape)

    def _made(self, x: Tensor) -> Tensor:
        """What the method makes of the tokens, `[b n channels]`."""
        n, run, state = x.shape[2] * x.shape[3], self.run, self.run.state
        tokens, places = x.flatten(2).mT, Positions.row(0, n, x.device)
        grid = Region(((0, n),), (x.shape[2], x.shape[3]))
        call = Call(
            self.layer, self.depth, run.layer_names[self.layer], 1, 1, places, places, self.channels**-0.5,
            training=self.training, roles={**run.roles, "patches": grid}, hidden=tokens, forward=state.now.number,
            batch=len(x),
        )  # fmt: skip
        state.entered[self.layer] += 1
        state.begin(self.layer, shelf_of(None), self)
        plan = state.plan(call, *SITES) if run.installed() else Plan(())
        job = AttentionCall(plan, state, call)
        tokens = stage(Site.HIDDEN, tokens, job, call)
        call = replace(call, hidden=tokens)
        if blocks := plan.at(Site.BLOCK):
            tokens = replaced(blocks[0], job, call, tokens)
        tokens = stage(Site.OUTPUT, tokens, job, call)
        state.backends[self.layer] = "a feature map"
        state.close_call(plan, call)
        return tokens
