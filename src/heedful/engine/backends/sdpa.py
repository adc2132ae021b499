"""torch's scaled_dot_product_attention, for calls in which nobody looks at the map."""

from __future__ import annotations

import torch
from torch import Tensor

from heedful.core.call import Call
from heedful.core.ragged import Ragged
from heedful.core.sites import Site
from heedful.engine.attention_call import AttentionCall
from heedful.engine.backends.tiled import Tiled
from heedful.engine.needs import TRANSFORMED, Needs

INTO_SCORES = frozenset({Site.QUERY, Site.KEY})  # where edits may leave scores that are no numbers
FEW = 64  # keys: more than a CPU's vector has numbers


class Sdpa:
    name = "sdpa"

    def refuses(self, needs: Needs) -> list[str]:
        inside = needs.map_steps + needs.adds + needs.reweights + needs.sum_steps + needs.weighed
        reasons = [f"{step} needs the map, which this kernel never shows" for step in inside]
        reasons += [
            f"{step} narrows the mask, which this kernel takes as an N x N table only" for step in needs.mask_steps
        ]
        if any(isinstance(x, Ragged) for x in needs.tensors):
            reasons.append(
                "heads hold unlike numbers of keys, which this kernel takes as a padded copy and a table only"
            )
        if needs.transformed:
            reasons.append(f"{TRANSFORMED}, for which this kernel has no rules")
        if needs.softcap:
            reasons.append("the model caps its scores, which this kernel cannot")
        if needs.sink:
            reasons.append("the model has learned sink logits, which this kernel cannot add")
        if needs.pattern:
            reasons.append("the whole pattern was asked for (output_attentions), which this kernel never shows")
        return reasons

    def runs(self, needs: Needs) -> str:
        return ""

    def __call__(self, job: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        if job.plan.acts & INTO_SCORES and _lost(q, k):
            return Tiled()(job, q, k, v)
        call = job.call
        flag, keep = _flag_or_table(call)
        mask = keep
        if job.bias is not None:
            mask = job.bias.to(q.dtype)
            if flag:
                flag, keep = False, call.mask.keeps(call.tile(slice(0, q.shape[2]), slice(0, k.shape[2])).pairs)
            if keep is not None:
                mask = mask.masked_fill(~keep, torch.finfo(q.dtype).min)
        heads = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=flag, scale=call.scale, dropout_p=job.dropout,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        if keep is not None:
            heads = heads.masked_fill(~keep.any(-1, keepdim=True), 0.0)
        return heads, None


def _lost(q: Tensor, k: Tensor) -> bool:
    """Whether torch's kernel would make zeros of what is no number: on a CPU, where keys are few."""
    if q.device.type != "cpu" or k.shape[2] >= FEW or torch.compiler.is_exporting():
        return False
    return not bool((q.sum() + k.sum()).isfinite())


def _flag_or_table(call: Call) -> tuple[bool, Tensor | None]:
    """The kernel's causal flag where that says it all, else the table of pairs; neither when all pairs are kept."""
    q, k = call.queries, call.keys
    if k.is_filled is None and call.mask.idle(q, k):
        return False, None
    if call.mask.only_causal and k.is_filled is None and q.first is not None and k.first is not None:
        if len(q) == 1 and q.first >= k.first + len(k) - 1:
            return False, None
        if q.first == k.first and len(q) == len(k):
            return True, None
    return False, call.mask.keeps(call.tile(slice(0, len(q)), slice(0, len(k))).pairs)
