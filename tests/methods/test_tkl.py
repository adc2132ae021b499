"""TKL against the authors' chunks, cut out with what is around them."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.authoring import FieldError
from heedful.conformance.bare import Bare
from heedful.conformance.tolerances import close, close_model
from heedful.methods import TKL
from tests.by_hand import causal_map, heads_of, in_pieces, llama_states

TEXT = torch.ones(2, 19, dtype=torch.bool)
TEXT[0, :3] = False
IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["reference", "tiled", "native"])
@pytest.mark.parametrize(("size", "overlap"), [(4, 1), (5, 0), (3, 4), (30, 2), (1, 1)])
def test_chunks_are_attention_of_their_own(size: int, overlap: int, backend: str) -> None:
    bare = Bare(dtype=torch.float32 if backend == "native" else torch.float64, rules=())
    found, _ = bare.run(TKL(size, overlap), backend)
    for h in range(4):
        for start in range(0, 19, size):
            around = slice(max(0, start - overlap), min(19, start + size + overlap))
            q, k, v = bare.q[0, h, start : start + size], bare.k[0, h // 2, around], bare.v[0, h // 2, around]
            assert close(found[0, h, start : start + size], (q @ k.T / 8**0.5).softmax(-1) @ v)


def test_chunks_are_counted_from_where_a_text_begins() -> None:
    bare = Bare(text=TEXT)
    found, _ = bare.run(TKL(4, 1), "reference")
    alone, _ = Bare(text=TEXT).run(TKL(40), "reference")
    assert close(found[0, :, 3:7], alone[0, :, 3:7])
    for row in range(7, 19):
        assert not close(found[0, :, row], alone[0, :, row])


def test_in_a_causal_model_at_once_and_in_pieces() -> None:
    model = models.tiny("llama").eval()
    want = llama_states(
        model,
        IDS,
        lambda _, q, k, v, turn: heads_of(causal_map(turn(q), turn(k), lambda i, j: i // 4 * 4 - 2 <= j <= i), v),
    )
    with attach(model, TKL(4, 2)) as run, torch.no_grad():
        found = run(IDS).logits
        assert close_model(found, model.lm_head(want))
        assert close_model(in_pieces(run, IDS, (5, 1, 6))[0], found)


def test_another_sequence_is_left_alone() -> None:
    model = models.tiny("bart")
    only = ("model.decoder.layers.0.encoder_attn",)
    with pytest.warns(UserWarning, match="changed nothing"), attach(model, TKL(2, 0), only=only) as run:
        assert float(run.difference(input_ids=IDS, decoder_input_ids=IDS[:, :5])) == 0


def test_errors() -> None:
    assert (TKL().chunk, TKL().overlap) == (40, 5)
    with pytest.raises(FieldError, match=r"TKL.chunk = 0: must be 1 or more"):
        TKL(0)
    with pytest.raises(FieldError, match=r"TKL.overlap = -1: must be 0 or more"):
        TKL(4, -1)
