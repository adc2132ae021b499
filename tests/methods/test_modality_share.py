"""Attention by kind of token against sums over dense maps, while reading and while writing."""

from functools import partial

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.call import Call
from heedful.core.errors import FieldError, StatisticError
from heedful.core.positions import Positions
from heedful.core.summary import Summary
from heedful.methods.observe.modality_share import ModalityShare, Shares
from tests import readers
from tests.readers import ids, padded

METHOD = ModalityShare(("image", "audio"))
ROLES = {"image": ((2, 6), (9, 11)), "audio": ((5, 8),)}  # they share a token
found = partial(readers.found, method=METHOD, roles=ROLES)


def same(a: Shares, b: Shares) -> None:
    assert list(a.attention) == list(b.attention)
    for mine, theirs in ((a.attention, b.attention), (a.tokens, b.tokens)):
        for kind, x in theirs.items():
            assert close(mine[kind].float(), x.float()), kind


def kinds(n: int) -> dict[str, Tensor]:
    out = {kind: torch.zeros(n, dtype=torch.bool) for kind in ROLES}
    for kind, spans in ROLES.items():
        for start, stop in spans:
            out[kind][start:stop] = True
    return out | {"text": ~(out["image"] | out["audio"])}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_what_the_maps_add_up_to(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=2, length=14)
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True).attentions).double()  # [l b h q k]
    shares = found(model, inputs)
    seen = torch.ones(14, 14).tril() if kind == "llama" else torch.ones(14, 14)
    for name, mark in kinds(14).items():
        share = (maps * mark).sum((1, 3, 4)) / maps.sum((1, 3, 4))
        tokens = (seen * mark).sum() / seen.sum()
        assert close(shares.attention[name].float(), share.float()), name
        assert close(shares.tokens[name].float(), tokens.expand(share.shape)), name
        assert close(shares.aei(name).float(), (share.mean(1) / tokens).float())
    # the indices by the paper's formulas: what a token of each kind gets
    each = {name: (maps.mean(2) * mark).sum((1, 2, 3)) / (seen * mark).sum() for name, mark in kinds(14).items()}
    assert close(shares.mdi("image").float(), (each["text"] / each["image"]).float())
    got, there, mdi = shares.overall("audio")
    assert mdi == pytest.approx(float(each["text"].mean() / each["audio"].mean()), rel=1e-5)
    assert got / there == pytest.approx(float(shares.aei("audio").mean()), rel=1e-5)


def test_while_writing_it_is_the_measure_of_the_paper() -> None:
    model = models.tiny("llama", attn_implementation="eager")
    roles = ROLES | {"text": ((0, 2), (8, 9), (11, 12))}  # of the prompt alone
    method = METHOD.when("decode")
    with heedful.attach(model, method, roles=roles) as run, torch.no_grad():
        written = run.generate(input_ids=ids(12), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad():
        maps = torch.stack(model(written, output_attentions=True).attentions)[:, 0, :, 12:15]  # the last is not read
    each = {name: maps[..., :12][..., mark].mean((1, 2, 3)) for name, mark in kinds(12).items()}
    assert close(run[method].mdi("image").float(), each["text"] / each["image"])


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(10, 1), ids(16, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    same(found(model, padded(short, long, left)), apart)


def test_tiles_and_pieces_do_not_matter() -> None:
    model = models.tiny("llama")
    whole = found(model, {"input_ids": ids(16)})
    same(found(model, {"input_ids": ids(16)}, tile_rows=3, backend="tiled"), whole)
    with heedful.attach(model, METHOD, roles=ROLES) as run, torch.no_grad():
        cache = run(input_ids=ids(16)[:, :7], use_cache=True)[CACHE]
        run(input_ids=ids(16)[:, 7:], **{CACHE: cache}, use_cache=True)
    same(run[METHOD], whole)


def test_reads_named_spans_alone() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, METHOD, roles={"delimiters": ((0, 3),)}) as run:
        run(input_ids=ids(12))
        with pytest.raises(StatisticError):
            run[METHOD]
    one = found(model, {"input_ids": ids(12)}, roles={"image": ((0, 3),)})
    assert list(one.attention) == ["image", "text"]
    t5 = models.tiny("t5")
    assert len(found(t5, models.tiny_inputs(t5, length=12)).layers) == 4  # of six layers two look across


def test_tells_what_a_reader_wants_to_know() -> None:
    attention = {"image": torch.tensor([[0.1, 0.3], [0.2, 0.6]]), "text": torch.tensor([[0.9, 0.7], [0.8, 0.4]])}
    tokens = {"image": torch.full((2, 2), 0.6), "text": torch.full((2, 2), 0.4)}
    told = METHOD.describe(Shares((0, 4), attention, tokens))
    assert [figure.key for figure in told.figures] == ["share_image", "share_text", "efficiency"]
    assert torch.equal(told.figures[0].values, attention["image"])
    assert told.figures[2].lines["image"].tolist() == pytest.approx([0.2 / 0.6, 0.4 / 0.6])
    assert [(role.name, list(role.heads)) for role in told.roles] == [("looks at image tokens", [(4, 1)])]
    wanted = "30% of attention goes to image tokens, which are 60% of what there is to see; a text token gets 3.5 times"
    assert told.findings[0].text.startswith(wanted)
    alone = found(models.tiny("llama"), {"input_ids": ids(12)}, roles={"image": ((0, 12),)})
    assert METHOD.describe(alone).findings[0].text.endswith("100% of what there is to see.")
    assert "image: 100% of attention" in str(alone)


@pytest.mark.parametrize("value", [(), ("image", "image"), ("image", "text")])
def test_says_what_is_wrong(value: tuple[str, ...]) -> None:
    with pytest.raises(FieldError, match="kinds"):
        ModalityShare(value)


def test_key_heads_that_hold_other_tokens_are_each_their_own() -> None:
    """After a cache was cut by head, the same column is another token in another key head."""
    position = torch.tensor([[[0, 1, 3], [0, 2, 3]]])
    keys = Positions(position, position)
    call = Call(0, 1, "layer", 4, 2, Positions.row(3, 1), keys, 1.0, roles={"image": ((1, 2),)})
    received = torch.tensor([[[0.5, 0.2, 0.3], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.3, 0.3, 0.4]]])
    mean = ModalityShare(kinds=("image",)).share(Summary(received=received, seen=torch.ones(1, 4, 3)), call)
    # of image, text and all: token 1 stands in the first two heads' second column alone
    assert close(mean.total.float(), torch.tensor([[0.2, 0.8, 1.0], [0.6, 0.4, 1.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]))
    assert mean.count.tolist() == [[1, 2, 3], [1, 2, 3], [0, 3, 3], [0, 3, 3]]


def test_what_stands_in_no_span_has_the_name_that_is_asked_for() -> None:
    model = models.tiny("vit", image_size=20)  # a class token and 5 x 5 patches
    maps = heedful.patterns(model, torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))).tensor
    method = ModalityShare(("cls", "register", "border"), "middle")
    with heedful.attach(model, method) as run, torch.no_grad():
        run(pixel_values=torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)))
    inner = [1 + 5 * i + j for i in range(1, 4) for j in range(1, 4)]
    assert list(run[method].attention) == ["cls", "border", "middle"]
    assert close(run[method].attention["middle"], maps[..., inner].sum(-1).mean(-1))
    assert close(run[method].tokens["border"], torch.full((2, 4), 16 / 26))
    each = maps[..., inner].mean((1, 2, 3)) / maps[..., 0].mean((1, 2))
    assert close(run[method].mdi("cls"), each)
    told = method.describe(run[method])
    assert "; a middle token gets" in told.findings[1].text
    assert {role.name for role in told.roles} == {"looks at class tokens", "looks at border tokens"}
    assert "of attention goes to class tokens" in told.findings[0].text
    with pytest.raises(FieldError, match="'middle' aside"):
        ModalityShare(("cls", "middle"), "middle")
