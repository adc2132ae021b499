"""Keys of the query's block and of those before it: a denoiser that reads block by block and can cache what is done."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from heedful.authoring import (
    Call,
    Causal,
    FieldError,
    Mask,
    Method,
    Paper,
    PositiveInt,
    RoleName,
    Rule,
    Site,
    SiteError,
    at,
)
from heedful.core.positions import Pairs
from heedful.kit.chunks import Chunk


@dataclass(frozen=True)
class _Copied(Rule):
    """Blocks of `size` tokens, where the first `noisy` places of a row are a copy of those behind them."""

    size: int
    noisy: int

    def keeps(self, pairs: Pairs) -> Tensor:
        q, k = pairs.q // self.size, pairs.k // self.size
        from_noisy, to_noisy = pairs.q_index < self.noisy, pairs.k_index < self.noisy
        own = from_noisy & to_noisy & (k == q)
        return own | (~to_noisy & ((k < q) | (~from_noisy & (k == q))))


class EfficientDLM(Method):
    """Both ways within a block, and back alone between blocks. For causal models that are taught to denoise.

    A run of training that names the role `noisy`, the first half of its tokens, has each noisy block see itself and
    the clean blocks before it, in the second half. Both halves want the same `position_ids`, and no padding before.
    """

    paper = Paper(
        "P002",
        "Efficient-DLM: From Autoregressive to Diffusion Language Models, and Beyond in Speed",
        "Yonggan Fu, Lexington Whalen, Zhifan Ye, Xin Dong, Shizhe Diao, Jingyu Liu, Chengyue Wu, Hao Zhang, Enze Xie, "
        "Song Han, Maksim Khadkevich, Jan Kautz, Yingyan Celine Lin, Pavlo Molchanov",
        2025,
        "2512.14067",
        differs=(
            "The attention pattern alone: which tokens are masked in training, where the authors mask later ones more "
            "often, and how tokens are sampled is up to the user.",
            "Blocks are counted from where a text begins, and so a prompt's last tokens may share a block with the "
            "answer's first, which they do not see once they are cached.",
        ),
    )
    causal = False  # tokens see the rest of their block
    chunk_invariant = False  # of their block, what is there when they are read
    block: PositiveInt = 16  # tokens of a block; the authors study from 4 to 64 and more
    noisy: RoleName = "noisy"  # names the noisy copy of a text that stands before it, in training

    @classmethod
    def neutral(cls) -> EfficientDLM:
        return cls(1)

    @classmethod
    def example(cls) -> EfficientDLM:
        return cls(4)

    def idle(self, call: Call) -> bool:
        return call.cross or (self.block == 1 and call.mask.causal and self.noisy not in call.roles)

    @at(Site.MASK)
    def open(self, mask: Mask, call: Call) -> Mask:
        noisy = self._copied(call)
        if not noisy and call.queries.packed:
            raise SiteError(
                f"{self!r}, layer {call.layer}: takes a row for one text, and several are packed into one row; give "
                f"each a row of its own, padded, or name the first of two copies {self.noisy!r}"
            )
        rule = _Copied(self.block, noisy) if noisy else Chunk(self.block, before=None)
        return Mask((*(other for other in mask.rules if not isinstance(other, Causal)), rule))

    def _copied(self, call: Call) -> int:
        """How many places of a row are the noisy copy."""
        if self.noisy not in call.roles:
            return 0
        spans = call.region(self.noisy)
        stop = spans[0][1] if len(spans) == 1 and spans[0][0] == 0 else 0
        if not 0 < stop < len(call.queries) or bool(call.q_pos[..., [0, stop]].any()):
            rule = f"{self.noisy!r} names the first half of a row, behind which positions begin again at 0; it is"
            raise FieldError("attach()", "roles", tuple(spans), rule, {self.noisy: ((0, 64),)})
        return stop


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, EfficientDLM(4)) as run:
        print(run.difference(**inputs))
