"""The profile of every head against sums over dense maps, with padding, in tiles, and what it tells."""

from functools import partial

import pytest
import torch
from torch import Tensor

import heedful
from heedful import catalogue, models
from heedful.adapters.cache_name import CACHE
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError
from heedful.core.figures import Curves, HeadMap, Listing
from heedful.methods.observe.attention_profile import BINS, EDGES, PARTS, AttentionProfile, Profile, _curves, _words
from tests import readers
from tests.readers import ids, padded

MARKED = ((0, 1), (4, 6), (11, 12))  # holds the first token, which must not count
METHOD = AttentionProfile(local=3)
found = partial(readers.found, method=METHOD, roles={"delimiters": MARKED})


def by_hand(maps: Tensor, causal: bool) -> dict[str, Tensor]:
    """Every part from maps `[b h n n]`, one query-key pair after the other."""
    n = maps.shape[-1]
    marked = [k for start, stop in MARKED for k in range(start, stop) if k]
    out = {name: torch.zeros(maps.shape[1], dtype=torch.float64) for name in PARTS}
    out["bins"] = torch.zeros(2, maps.shape[1], BINS, dtype=torch.float64)
    seen = 0
    for text in maps.double():
        for q in range(n):
            out["entropy"] += torch.special.entr(text[:, q]).sum(-1)
            out["peak"] += text[:, q].amax(-1)
            out["first"] += text[:, q, 0]
            for k in range(q + 1 if causal else n):
                seen += 1
                w, d = text[:, q, k], q - k
                out["delimiters"] += w * (k in marked)
                out["fair"] += float(k in marked)
                if k == 0:
                    continue
                out["self"] += w * (d == 0)
                out["previous"] += w * (d == 1)
                out["next"] += w * (d == -1)
                out["near"] += w * (0 < abs(d) <= 3)
                out["far"] += w * (abs(d) > 3)
                out["bins"][int(d < 0), :, max(i for i in range(BINS) if EDGES[i] <= abs(d))] += w
    count = len(maps) * n
    return {name: x / (seen if name == "fair" else count) for name, x in out.items()}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_is_what_the_maps_add_up_to(kind: str) -> None:
    model = models.tiny(kind, attn_implementation="eager")
    inputs = models.tiny_inputs(model, batch=2, length=21)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    profile = found(model, inputs)
    for layer, x in enumerate(maps):
        wanted = by_hand(x, kind == "llama")
        for name in PARTS:
            assert close(profile.parts[name][layer].float(), wanted[name].float()), name
        assert close(profile.distances[layer].float(), wanted["bins"].float())
    assert (profile.map("next") > 0).any() == (kind == "bert")
    total = sum(profile.map(part) for part in ("first", "self", "near", "far"))
    assert close(total.float(), torch.ones_like(total).float())


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    model = models.tiny("llama")
    short, long = ids(13, 1), ids(19, 2)
    apart = found(model, {"input_ids": short}, {"input_ids": long})
    same(found(model, padded(short, long, left)), apart)


@pytest.mark.parametrize("kind", ["mistral", "bert", "gpt2"])
def test_tiles_and_pieces_do_not_matter(kind: str) -> None:
    model = models.tiny(kind)
    inputs = models.tiny_inputs(model, length=23)
    whole = found(model, inputs, backend="reference")
    for rows in (1, 5):
        same(found(model, inputs, tile_rows=rows, backend="tiled"), whole)


def test_a_text_in_pieces_is_the_text() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, METHOD, roles={"delimiters": MARKED}) as run, torch.no_grad():
        cache = run(input_ids=ids(20)[:, :8], use_cache=True)[CACHE]
        run(input_ids=ids(20)[:, 8:], **{CACHE: cache}, use_cache=True)
    same(run[METHOD], found(model, {"input_ids": ids(20)}))


def test_decoding_and_other_texts_are_left_out() -> None:
    model = models.tiny("llama")
    with heedful.attach(model, METHOD, roles={"delimiters": MARKED}) as run:
        run.generate(input_ids=ids(9), max_new_tokens=3, do_sample=False)
    same(run[METHOD], found(model, {"input_ids": ids(9)}))
    t5 = models.tiny("t5")
    assert len(found(t5, models.tiny_inputs(t5, length=8)).distances) == 4  # of six layers two look across


def same(a: Profile, b: Profile) -> None:
    for name in PARTS:
        assert close(a.map(name).float(), b.map(name).float()), name
    for layer, x in b.distances.items():
        assert close(a.distances[layer].float(), x.float())


def made(rows: dict[int, list[dict[int, float]]]) -> Profile:
    """A profile of heads that give these shares to these distances, and the rest to the first token."""
    distances = {n: torch.zeros(2, len(heads), BINS, dtype=torch.float64) for n, heads in rows.items()}
    for n, heads in rows.items():
        for h, shares in enumerate(heads):
            for d, share in shares.items():
                distances[n][int(d < 0), h, abs(d)] = share
    rest = {n: 1 - x.sum((0, 2)) for n, x in distances.items()}
    return Profile({name: dict(rest) for name in PARTS}, distances)


def test_finds_offset_heads_and_groups() -> None:
    profile = made({0: [{1: 0.7}, {1: 0.6, 2: 0.1}, {-2: 0.9}], 4: [{0: 0.55}, {3: 0.3, 5: 0.3}, {-2: 0.89}]})
    assert profile.offsets(0.5) == {
        (0, 2): (-2, pytest.approx(0.9)),
        (4, 2): (-2, pytest.approx(0.89)),
        (0, 0): (1, pytest.approx(0.7)),
        (0, 1): (1, pytest.approx(0.6)),
        (4, 0): (0, pytest.approx(0.55)),
    }
    heads, apart = profile.divergence()
    assert heads[3] == (4, 0)
    p, q = torch.tensor([0.3, 0.7, 0.0]), torch.tensor([0.45, 0.0, 0.55])  # first token, one back, itself
    m = (p + q) / 2
    wanted = sum((x * (x / m).log()).nan_to_num().sum() for x in (p, q)) / 2
    assert float(apart[0, 3]) == pytest.approx(float(wanted), abs=1e-6)
    assert profile.groups(0.06)[:2] == [[(0, 0), (0, 1)], [(0, 2), (4, 2)]]
    assert sorted(len(group) for group in profile.groups(1e-6)) == [1] * 6
    assert len(profile.groups(0.99)) == 1
    line = made({0: [{1: share} for share in (0.0, 0.25, 0.5, 0.75, 1.0)]})  # each is near its neighbours alone
    assert line.groups(0.11) == [[(0, 1), (0, 2), (0, 0)], [(0, 3), (0, 4)]]


def test_tells_what_a_reader_wants_to_know() -> None:
    profile = made({0: [{1: 0.7}, {1: 0.6}], 4: [{-2: 0.9}, {4: 0.95}]})
    profile.parts["peak"][4] = torch.tensor([0.3, 0.05])
    profile.parts["entropy"] = {0: torch.tensor([8.0, 8.0]).log(), 4: torch.tensor([2.0, 2.0]).log()}
    told = AttentionProfile().describe(profile)
    kinds = {figure.key: figure for figure in told.figures}
    assert isinstance(kinds["entropy"], HeadMap)
    assert kinds["previous"].layers == [0, 4]
    assert isinstance(kinds["offsets"], Listing)
    assert list(kinds["offsets"].rows[0]) == ["4.1", "the token 4 back", "95%"]
    assert list(kinds["offsets"].rows[1]) == ["4.0", "the token 2 ahead", "90%"]
    curves = kinds["distances"]
    assert isinstance(curves, Curves)
    assert list(curves.x) == [1, 2, 3, 4]
    assert curves.lines["layer 0"].tolist() == pytest.approx([0.65, 0, 0, 0])
    roles = {role.name: list(role.heads) for role in told.roles}
    assert roles["previous-token head"] == [(0, 0), (0, 1)]
    assert roles["broad attention"] == [(4, 1)]
    texts = [finding.text for finding in told.findings]
    assert texts[0].startswith("Of all attention 21% goes to the first token")
    assert texts[1].endswith("25% of heads give no token more than 10%.")
    assert "one fixed distance: 2 to the previous token, 1 to" in texts[2]
    assert "layer 0 looks at about 8 tokens at once, one of layer 4 at about 2" in texts[1]
    assert told.findings[1].weight == pytest.approx(0.1 + 0.3 * (1 - 2 / 8))
    assert {name for finding in told.findings for name in finding.methods} <= set(catalogue.entries())


def test_says_nothing_of_delimiters_that_nobody_named() -> None:
    model = models.tiny("llama")
    told = METHOD.describe(found(model, {"input_ids": ids(12)}, roles=None))
    assert "delimiters" not in [figure.key for figure in told.figures]
    assert not any("Punctuation" in finding.text for finding in told.findings)
    told = METHOD.describe(found(model, {"input_ids": ids(12)}))
    assert any("Punctuation" in finding.text for finding in told.findings)


def test_delimiters_weigh_by_how_far_from_an_even_spread_they_are_looked_at() -> None:
    for share, fair, weight in ((0.4, 0.1, 0.05 + 0.6 * 3 / 4), (0.1, 0.4, 0.05 + 0.6 * 3 / 4), (0.2, 0.2, 0.05)):
        profile = made({0: [{1: 0.7}, {1: 0.6}]})
        profile.parts["delimiters"], profile.parts["fair"] = ({0: torch.full((2,), x)} for x in (share, fair))
        told = next(x for x in AttentionProfile().describe(profile).findings if "Punctuation" in x.text)
        assert told.weight == pytest.approx(weight)


def test_a_text_of_one_token_can_be_told() -> None:
    profile = found(models.tiny("llama"), {"input_ids": ids(1)})
    assert profile.mean("first") == 1.0
    assert len(METHOD.describe(profile).figures) > 5


@pytest.mark.parametrize(("name", "value"), [("local", 0), ("offset", 1.0), ("broad", 0.0), ("alike", -0.1)])
def test_says_what_is_wrong(name: str, value: float) -> None:
    with pytest.raises(FieldError, match=name):
        AttentionProfile(**{name: value})


def test_an_offset_has_more_than_the_share() -> None:
    assert list(made({0: [{1: 0.5}, {1: 0.75}]}).offsets(0.5)) == [(0, 1)]


def test_offsets_ahead_begin_at_the_next_token() -> None:
    profile = made({0: [{-1: 0.9}, {15: 0.8}, {-15: 0.7}]})
    assert {head: at for head, (at, _) in profile.offsets(0.5).items()} == {(0, 0): -1, (0, 1): 15, (0, 2): -15}
    words = ["the next token", "the token itself", "the previous token", "the token 2 ahead", "the token 3 back"]
    assert [_words(at) for at in (-1, 0, 1, -2, 3)] == words


def test_layers_of_unlike_width_have_one_map() -> None:
    found = made({0: [{1: 0.7}, {1: 0.6}], 1: [{1: 0.5}, {1: 0.4}, {1: 0.3}]}).map("first")
    assert close(found.nan_to_num(-1.0), torch.tensor([[0.3, 0.4, -1.0], [0.5, 0.6, 0.7]], dtype=torch.float64))


def test_curves_are_means_over_a_third_of_the_layers() -> None:
    profile = made({n: [{1: share}, {2: share}] for n, share in enumerate((0.2, 0.4, 0.6, 0.8))})
    curves = _curves(profile)
    assert curves.log_x
    assert curves.log_y
    lines = {name: line.tolist() for name, line in curves.lines.items()}
    assert lines == {
        "layers 0 to 1": pytest.approx([0.15, 0.15]),
        "layer 2": pytest.approx([0.3, 0.3]),
        "layer 3": pytest.approx([0.4, 0.4]),
    }
