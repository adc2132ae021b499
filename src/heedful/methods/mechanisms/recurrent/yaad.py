"""M = a M - n k (e if |e| <= d else d sign(e)), e = k M - v: a memory that learns by Huber's loss; heads read q M."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from heedful.authoring import Call, Layer, Method, Paper, PositiveFloat, Site, at
from heedful.kit.running import Running, grouped, wide

KEEPS = 4.0  # what a gate's sigmoid begins with: 98 % of a memory stays


class Yaad(Method):
    """A memory of fixed size learns each key's value, and is moved little by a value out of the ordinary."""

    paper = Paper(
        "P058",
        "It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
        "Optimization",
        "Ali Behrouz, Meisam Razaviyayn, Peilin Zhong, Vahab Mirrokni",
        2025,
        "2504.13173",
        differs=(
            "Of the paper's three models this is Yaad; Moneta and Memora are left out.",
            "The memory is a matrix for each key head, where the paper's is a net of two layers; each token learns "
            "from the memory before it, as the formula says, and not from that before its chunk.",
            "A head has one gate for how much stays, one for how fast it learns and one bound, told by its key and "
            "value, so that the memory can be made again of a cache; the paper's are for each channel, told by the "
            "token.",
            "No convolution stands before queries, keys and values, and no norm and gate behind the heads.",
            "Written from the paper's formulas as others restate them; the authors' code was not at hand.",
        ),
    )
    sharp: PositiveFloat = 10.0  # the sign of x is tanh(sharp x); the paper: large

    def parameters(self, layer: Layer) -> dict[str, Tensor]:
        start = torch.tensor([KEEPS, 0.0, 0.0]).expand(layer.kv_heads, 3)
        return {
            "by_key": torch.zeros(layer.kv_heads, layer.head_dim, 3),
            "by_value": torch.zeros(layer.kv_heads, layer.value_dim, 3),
            "start": start.clone(),
        }

    @at(Site.MIX, before_rotary=True)
    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], call: Call) -> Tensor:
        q, k, v = wide(*qkv)
        return _Memory(call, k).read(normalize(q, dim=-1), normalize(k, dim=-1), v, call, self.sharp).to(qkv[2].dtype)


class _Memory(Running):
    """What keys and values come to, `[b g d dv]`, one after another."""

    def read(self, q: Tensor, k: Tensor, v: Tensor, call: Call, sharp: float) -> Tensor:
        """What each query `[b h n d]` finds in the memory of the keys that it sees, `[b h n dv]`."""
        k, v = self.cut(k), self.cut(v)
        p = {name: x.to(k.dtype) for name, x in call.params.items()}
        stays, learns, bound = (k @ p["by_key"] + v @ p["by_value"] + p["start"][:, None]).split(1, -1)
        stays, learns = 1 - self.hide(1 - stays.sigmoid()), self.hide(learns.sigmoid())
        bound = softplus(bound)
        memory = self._before("memory", None)
        memory = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if memory is None else memory
        queries, found = q.split(self.chunk, 2), list[Tensor]()
        rows, columns = k.split(1, 2), (-learns * k).mT.split(1, 3)  # of what is learned, times the slope
        values, stay, bounds = v.split(1, 2), stays.split(1, 2), bound.split(1, 2)
        seen = list[Tensor]()
        for i, key in enumerate(rows):
            error = key @ memory - values[i]
            far = torch.linalg.vector_norm(error, dim=-1, keepdim=True) > bounds[i]
            slope = torch.where(far, bounds[i] * (sharp * error).tanh(), error)
            memory = stay[i] * memory + columns[i] * slope
            if self.causal and i >= self._past:
                seen.append(memory)
                if len(seen) == queries[len(found)].shape[2]:
                    found.append(_each(queries[len(found)], torch.stack(seen, 2)))
                    seen = []
        self._keep("memory", memory)
        return torch.cat(found, 2) if self.causal else grouped(q, memory)


def _each(q: Tensor, memory: Tensor) -> Tensor:
    """What each query `[b h n d]` finds in a memory of its own `[b g n d dv]`."""
    asked = q.unflatten(1, (memory.shape[1], -1)).transpose(2, 3)  # [b g n heads d]
    return (asked @ memory).transpose(2, 3).flatten(1, 2)


if __name__ == "__main__":
    from heedful import attach, models

    model = models.tiny("llama")
    inputs = models.tiny_inputs(model)
    with attach(model, Yaad()) as run:
        run(**inputs, labels=inputs["input_ids"]).loss.backward()
        print({name: tuple(p.shape) for name, p in run.state_dict().items()}, run.activity())
