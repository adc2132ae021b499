"""k_j <- F (k_j + r * u_j |G|), u = k / |k|: keys of an image meet G = sum u u^T of a text's keys, and these those."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from heedful.authoring import Call, Layer, Method, Paper, RoleName, Site, at

IMAGE, TEXT = KINDS = range(2)
AWAY = 1e-6  # from zero, what a key is moved by before its length is taken; the authors' code


class MODA(Method):
    """Keys of an image are told in the space of the text's keys, and the other way round, before queries ask them.

    For models trained with it. A run names the image, `roles={"image": spans}`. What spans each space is settled where
    an image is first read, by all that is read with it; texts without one stay as they are.
    """

    paper = Paper(
        "P276",
        "MODA: MOdular Duplex Attention for Multimodal Perception, Cognition, and Emotion Understanding",
        "Zhicheng Zhang, Wuyou Xia, Chenxi Zhao, Zhou Yan, Xiaoqiang Liu, Yongjie Zhu, Wenyu Qin, Pengfei Wan, "
        "Di Zhang, Jufeng Yang",
        2025,
        "2507.04635",
        "ICML 2025",
        differs=(
            "This is the paper's duplex alignment; its masks with pseudo scores for each kind, which are not in the "
            "authors' code either, are left out.",
            "G is the paper's, of keys with keys, and both kinds are aligned; the authors' code has keys with values, "
            "and aligns images alone.",
            "F begins as the identity, so that a model begins as it was; the authors draw it.",
            "Tokens that are written later are aligned with what was read; the authors' code aligns nothing while it "
            "writes.",
        ),
    )
    one_text = True
    causal = False  # keys of an image are told by what is read behind it
    chunk_invariant = False  # by what is read in one call
    role: RoleName = "image"  # names the tokens of images
    ratio: float = 0.0  # r at the start, alike for all channels; the authors: 0

    @classmethod
    def example(cls) -> MODA:
        return cls(ratio=1.0)

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        d = layer.head_dim
        return {"ratio": torch.full((len(KINDS), d), self.ratio), "fuse": torch.eye(d).repeat(len(KINDS), 1, 1)}

    def idle(self, call: Call) -> bool:
        return call.cross or self.role not in call.roles

    @at(Site.KEY)
    def align(self, key: Tensor, call: Call) -> Tensor:
        ratio, fuse = (call.params[name] for name in ("ratio", "fuse"))
        x = key.to(torch.promote_types(key.dtype, ratio.dtype))
        image = call.marked(self.role)[..., None]  # [b|1 g|1 k 1]
        unit = normalize(x + AWAY, dim=-1)
        spaces, shown = self.spaces(unit, image, call)
        told = [(x + ratio[kind] * (unit @ spaces[:, :, 1 - kind])) @ fuse[kind].mT for kind in KINDS]
        found = torch.where(image, told[IMAGE], told[TEXT])
        return torch.where(shown, found, x).to(key.dtype)

    def spaces(self, unit: Tensor, image: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """What the keys of each kind span, `[b g 2 d d]`; and which texts have an image, `[b g 1 1]`."""
        known: Tensor | None = call.state.cache.get("spaces")
        if known is not None and bool(_with_image(known).all()):
            return known, _with_image(known)
        padding = call.mask.padding
        text = ~image if padding is None else ~image & padding.at(call.keys.index)[..., None]
        kinds = [unit * kind for kind in (image, text)]
        spaces = normalize(torch.stack([x.mT @ x for x in kinds], 2), dim=-1)
        if known is not None:
            spaces = torch.where(_with_image(known)[..., None], known, spaces)
        if bool(image.any()):
            call.state.cache["spaces"] = spaces
        return spaces, _with_image(spaces)


def _with_image(spaces: Tensor) -> Tensor:
    """An image spans something."""
    return spaces[:, :, IMAGE].amax((-1, -2), keepdim=True) > 0


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, MODA(ratio=0.5), roles={"image": ((2, 6),)}) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
