"""Patches of one group, `stride` of them along each axis, see the window around the group's middle, and no more."""

from __future__ import annotations

from typing import Annotated

from annotated_types import MinLen

from heedful.authoring import Call, FieldError, Mask, Method, Paper, PositiveInt, Site, at
from heedful.methods.mechanisms.local._neighbours import require_room, within


class GeneralizedNeighborhoodAttention(Method):
    """Windows that move in steps: by 1 they slide patch by patch, by their own size they are blocks side by side.

    The grid is that of the role `patches`, of one axis, two, or three with time first. Groups that fill whole tiles of
    a kernel leave no tile half empty, which is what strides are for.
    """

    paper = Paper(
        "P252",
        "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
        "Ali Hassani, Fengzhe Zhou, Aditya Kane, Jiannan Huang, Chieh-Yun Chen, Min Shi, Steven Walton, "
        "Markus Hoehnerbach, Vijay Thakkar, Michael Isaev, Qinsheng Zhang, Bing Xu, Haicheng Wu, Wen-mei Hwu, "
        "Ming-Yu Liu, Humphrey Shi",
        2025,
        "2504.16922",
        differs=(
            "The mask alone, which any backend may skip by: tokens stay in the order in which the model has them, and "
            "the authors' kernel, its tiles of several axes and their simulator of its speed are not here.",
            "Axes along which later patches stay unseen are not here.",
            "Tokens outside the grid see everything and are seen by all.",
            "A grid with a side below `size * dilation` is refused, as the authors' library does.",
        ),
    )
    subjects = ("image",)
    every_token = True
    # patches along each axis of the window; the paper varies it
    size: Annotated[tuple[PositiveInt, ...], MinLen(1)] = (16, 16)
    stride: tuple[int, ...] = (1, 1)  # patches along each axis that share a window; 1: NAT's, `size`: blocks
    dilation: tuple[PositiveInt, ...] = (1, 1)  # patches from one of the window to the next; 1 in the paper's runs

    def __post_init__(self) -> None:
        for name in ("stride", "dilation"):
            if len(getattr(self, name)) != len(self.size):
                rule = f"must have a number for each of the {len(self.size)} axes of `size`"
                raise FieldError(self, name, getattr(self, name), rule, (1,) * len(self.size))
        if not all(1 <= s <= w for s, w in zip(self.stride, self.size, strict=True)):
            rule = f"must lie from 1 to the window's size along each axis, which is {self.size}"
            raise FieldError(self, "stride", self.stride, rule, (1,) * len(self.size))

    @classmethod
    def example(cls) -> GeneralizedNeighborhoodAttention:
        return cls((2, 3), (2, 2))

    @at(Site.MASK)
    def narrow(self, mask: Mask, call: Call) -> Mask:
        require_room(self, self.size, call, self.size, self.dilation, (2,) * len(self.size))
        return within(mask, call, self.size, self.stride, self.dilation)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("vit", image_size=32)
    inputs = models.tiny_inputs(model)
    for stride in ((1, 1), (2, 2), (4, 4)):
        with attach(model, GeneralizedNeighborhoodAttention((4, 4), stride)) as run:
            print(stride, run.difference(**inputs))
