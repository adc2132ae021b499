"""Blocks by cos(k_block, sum_j w_j q_j), w_j ~ mean_c (q_jc - m_c)^2 / v_c: queries unlike the others ask for all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from heedful.core.call import Call
from heedful.core.errors import FieldError
from heedful.core.paper import Paper
from heedful.core.ranges import NonNegativeInt, PositiveInt
from heedful.kit.budget import Budget
from heedful.methods.sparse.decode._chunks import ChunkChoice, means

FLOOR = 0.01  # of the channels' mean variance, added to each; the authors'


class ActQKV(ChunkChoice):
    """Each chunk of queries is asked for by one probe, and sees the blocks of keys that are most like it."""

    paper = Paper(
        "P295",
        "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference",
        "Qingfa Xiao, Jiachuan Wang, Haoyang Li, Cheng Deng, Jiaqi Tang, Shuangyin Li, Yongqi Zhang, Jun Wang, "
        "Lei Chen",
        2025,
        "2502.13542",
        differs=(
            "Read from the authors' code and a summary of the paper. Means and variances are those of the chunk; the "
            "authors' code carries them on from chunk to chunk, and through all layers.",
            "A block is told by the mean of its keys; the authors take that of the four that drew most attention.",
            "As many blocks in every layer: their cut-off by the entropy of a layer's scores is not here, nor is the "
            "weight of a question that is known beforehand.",
            "Queries and keys come with the rotary embedding, and the cache stays where it is.",
            "A chunk of one query, as a new token is, has it for its probe.",
        ),
    )
    one_text = True
    budget: Budget = 2048  # tokens seen, a share never fewer than sinks and window; the authors: about 2048
    sinks: NonNegativeInt = 64  # first tokens that are always seen; the authors: 64
    window: int = 512  # newest tokens that are always seen, the chunk's included; the authors: 512
    chunk: PositiveInt = 256  # queries of a prompt that are asked for together; the authors: 256
    block: PositiveInt = 64  # tokens that are chosen together; the authors: 32 or 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < self.block:
            rule = f"must hold a block of {self.block}, or it is told by tokens to come"
            raise FieldError(self, "window", self.window, rule, self.block)

    @classmethod
    def neutral(cls) -> ActQKV:
        return cls(budget=1.0)

    @classmethod
    def example(cls) -> ActQKV:
        return cls(budget=6, sinks=1, window=2, chunk=2, block=2)

    def best(self, query: Tensor, key: Tensor, call: Call, member: Tensor, always: Tensor, most: Tensor) -> Tensor:
        probe = means(query, self._weights(query.detach().float(), member))  # [b h c d]
        text = call.k_pos[:, 0] >= 0
        if call.keys.is_filled is not None:
            text = text & call.keys.is_filled[:, 0]
        number = (call.k_pos[:, 0] // self.block).where(text, 0)  # [b|1 k]
        inside = (one_hot(number) * text[..., None]).to(probe.dtype)  # [b|1 k m]
        scores = self._likeness(probe, key.detach().float(), inside)
        open_ = ~always[:, 0] & text[:, None]  # [b|1 c k]
        blocks = (open_.to(probe.dtype) @ inside).expand(*scores.shape[:2], -1)  # tokens that a chunk would gain
        order = scores.masked_fill(blocks == 0, -torch.inf).argsort(-1, descending=True)
        fits = blocks.gather(-1, order).cumsum(-1) <= most
        taken = torch.zeros_like(fits).scatter(-1, order, fits) & (blocks > 0)
        return taken.gather(-1, number[:, None].expand(*taken.shape[:2], -1)) & open_

    @staticmethod
    def _weights(query: Tensor, member: Tensor) -> Tensor:
        """How unlike a chunk's other queries each is, in variances of their channels, in shares `[b c q]`."""
        x = query.transpose(1, 2).flatten(2)  # [b q h*d]
        share = member / member.sum(-1, keepdim=True).clamp(min=1)  # [b|1 c q]
        mean = share @ x
        variance = (share @ x.square() - mean.square()).clamp(min=0)  # [b c h*d]
        precision = 1 / (variance + FLOOR * variance.mean(-1, keepdim=True)).clamp(min=1e-12)
        far = precision @ x.square().mT - 2 * (precision * mean) @ x.mT + (precision * mean.square()).sum(-1, True)
        far = far.clamp(min=0) * member
        total = far.sum(-1, keepdim=True)
        return torch.where(total > 1e-6 * x.shape[-1], far / total.clamp(min=1e-30), share)

    @staticmethod
    def _likeness(probe: Tensor, key: Tensor, inside: Tensor) -> Tensor:
        """The cosine of each chunk's probe with the mean key of each block, all heads in a row, `[b c m]`."""
        total = inside.mT[:, None] @ key  # [b g m d]
        spread = total.repeat_interleave(probe.shape[1] // key.shape[1], 1)
        rows = (x.transpose(1, 2).flatten(2) for x in (probe, spread))
        one, other = (normalize(x, dim=-1) for x in rows)
        return one @ other.mT


if __name__ == "__main__":
    from heedful import attach, models

    model, tokenizer, _ = models.default()
    text = tokenizer("The sun rises in the east and sets in the west. " * 20, return_tensors="pt")
    with attach(model, ActQKV(64, sinks=4, window=16, chunk=16, block=8)) as run:
        print(tokenizer.decode(run.generate(**text, max_new_tokens=20, do_sample=False)[0, -20:]))
        print(run.activity())
