"""What the tests of heads that go through a source share."""

from __future__ import annotations

import pytest
import torch

from heedful import attach, models
from heedful.adapters.cache_name import CACHE
from heedful.authoring import Method, SiteError
from heedful.conformance.tolerances import close_model

ONLY = tuple(f"model.decoder.layers.{i}.encoder_attn" for i in range(2))


def goes_on_in_a_model(method: Method) -> None:
    """Step by step as at once, padding being no part of the source and each text in its own place; of a cache that was
    cut back it says so."""
    model = models.tiny("bart").eval()
    ids = torch.arange(3, 19)[None]
    target = ids[:, 2:9]
    padded = torch.cat([ids, torch.full((1, 5), 1)], 1)
    mask = (torch.arange(21) < 16)[None].long()
    with attach(model, method, only=ONLY) as run, torch.no_grad():
        alone = run(input_ids=ids, decoder_input_ids=target).logits
        beside = run(input_ids=padded, attention_mask=mask, decoder_input_ids=target).logits
        assert close_model(beside, alone)
        sources, targets = (torch.cat([x.flip(1), x]) for x in (ids, target))
        other = run(input_ids=sources[:1], decoder_input_ids=targets[:1]).logits
        cache, parts = None, []
        for piece in targets.split((4, 1, 2), 1):
            out = run(input_ids=sources, decoder_input_ids=piece, use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            parts.append(out.logits)
        assert close_model(torch.cat(parts, 1), torch.cat([other, alone]))
        cache.crop(-2)
        with pytest.raises(SiteError, match=r"layer 0: goes on within a text, and does not know where"):
            run(input_ids=sources, decoder_input_ids=targets[:, 5:], **{CACHE: cache})
