"""RXNMapper out of its package: the model with layers of its own, its tokens, and the head that maps atoms."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM, AlbertModel

import heedful
from heedful import Site, models
from heedful.core.errors import ModelError
from heedful.explaining import activations
from heedful.models import packages, rxnmapper

# of the package's own documentation: a thiol takes the place of the fluorine beside a pyridine's nitrogen
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
MAPPED = (
    "CN(C)C=O.F[c:5]1[n:6][cH:7][cH:8][cH:9][c:10]1[F:11].O=C([O-])[O-].[CH3:1][CH:2]([CH3:3])[SH:4].[K+].[K+]"
    ">>[CH3:1][CH:2]([CH3:3])[S:4][c:5]1[n:6][cH:7][cH:8][cH:9][c:10]1[F:11]"
)
# the same by places among tokens, read off the two: from each atom of the product to that of the reactants
ATOMS = {40: 1, 41: 2, 43: 4, 45: 6, 46: 24, 48: 23, 49: 22, 50: 21, 51: 20, 52: 18, 54: 17}
PACKAGES_OWN = (  # what the package cuts SMILES by
    r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)


@pytest.fixture(scope="module")
def reactions() -> models.Loaded:
    return models.reactions()


def test_one_head_maps_the_atoms_of_a_product(reactions: models.Loaded) -> None:
    maps = heedful.patterns(reactions, REACTION)
    assert maps.tensor.shape == (12, 8, 56, 56)
    tokens = reactions.tokenizer.tokenize(REACTION, add_special_tokens=True)
    for product, reactant in ATOMS.items():
        assert tokens[product].upper() == tokens[reactant].upper()
    atoms, theirs = list(ATOMS), torch.tensor(list(ATOMS.values()))
    right = (maps.tensor[:, :, atoms].argmax(-1) == theirs).float().mean(-1)  # [layer h]
    assert right[rxnmapper.ATOM_MAP] == 1.0
    right[:, rxnmapper.ATOM_MAP[1]] = 0.0  # layers have the same weights, so this head maps atoms in several
    assert right.max() < 0.5


def test_without_that_head_it_is_another_layer_that_changes(reactions: models.Loaded) -> None:
    layer, head = rxnmapper.ATOM_MAP
    whole = heedful.patterns(reactions, REACTION).tensor
    with torch.no_grad(), heedful.ablate(reactions.model, [(layer, head)]):
        inner = reactions.model(**reactions.tokenizer(REACTION, return_tensors="pt"), output_hidden_states=True)
    with torch.no_grad():
        plain = reactions.model(**reactions.tokenizer(REACTION, return_tensors="pt"), output_hidden_states=True)
    same = [torch.equal(a, b) for a, b in zip(inner.hidden_states, plain.hidden_states, strict=True)]
    assert same == [True] * (layer + 1) + [False] * (len(whole) - layer)


def shared() -> AlbertForMaskedLM:
    """The model as the package has it: one layer, which runs twelve times."""
    stored, told = (packages.installed("rxnmapper", file) or Path() for file in ("pytorch_model.bin", "config.json"))
    fields = json.loads(told.read_text())
    model = AlbertForMaskedLM(AlbertConfig(**{key: fields[key] for key in AlbertConfig().to_dict() if key in fields}))
    weights = torch.load(stored, map_location="cpu", weights_only=True)
    assert not model.load_state_dict(weights, strict=False).missing_keys
    return model.eval()


def test_layers_told_apart_compute_what_one_did(reactions: models.Loaded) -> None:
    ids = reactions.tokenizer(REACTION, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(reactions.model(ids).logits, shared()(ids).logits)
    assert (reactions.name, reactions.model.training) == ("RXNMapper", False)
    assert models.load("rxnmapper").name == models.load("reactions").name == reactions.name


def test_maps_of_one_layer_that_runs_often_are_refused(reactions: models.Loaded) -> None:
    with pytest.raises(ModelError, match=r"albert_layers\.0\.attention runs several times in one forward"):
        heedful.patterns(shared(), REACTION, tokenizer=reactions.tokenizer)


def test_what_stands_in_one_layer_that_runs_often_is_refused() -> None:
    config = AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8
    )
    with pytest.raises(ModelError, match=r"albert_layers\.0\.attention runs several times in one forward"):
        activations(AlbertModel(config).eval(), torch.arange(9), Site.HEAD_OUTPUT)
    config.num_hidden_groups = 2
    assert list(activations(AlbertModel(config).eval(), torch.arange(9), Site.HEAD_OUTPUT)) == [0, 1]


def test_it_cuts_smiles_as_the_package_does(reactions: models.Loaded) -> None:
    tokenizer = reactions.tokenizer
    twice = "".join(2 * sign for sign in ("Br", "Cl", *"BCNOSPFIbcnosp().=#-+\\/:~@?*$059", ">>", "%12"))
    for text in (REACTION, MAPPED, twice, "N#C[C@@H]1CC%12.Br/C=C\\Cl~[Na+]>>*C$C", "B(O)O.IP(=O)S.c1nosp1>C>C:C@?"):
        own = re.findall(PACKAGES_OWN, text)
        assert "".join(own) == text
        ids = tokenizer(text).input_ids
        known = tokenizer.get_vocab()
        assert ids == [known["[CLS]"], *(known.get(token, known["[UNK]"]) for token in own), known["[SEP]"]]
    assert tokenizer.decode(tokenizer(REACTION).input_ids, skip_special_tokens=True) == REACTION
    assert tokenizer.tokenize("C is no water") == ["C", "[UNK]", "s", "[UNK]", "n", "o", "[UNK]"]
    assert tokenizer.model_max_length == 512


def small() -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights of a small ALBERT, and what is told beside them."""
    told = dict(num_hidden_layers=3, num_attention_heads=2, hidden_act="gelu", layer_norm_eps=1e-12, pad_token_id=0)
    sizes = dict(vocab_size=11, embedding_size=6, hidden_size=8, intermediate_size=10, max_position_embeddings=9)
    torch.manual_seed(0)
    model = AlbertForMaskedLM(AlbertConfig(**told, **sizes))
    for x in model.parameters():
        torch.nn.init.normal_(x)
    return model.state_dict() | {"albert.pooler.weight": torch.ones(8, 8)}, told


def test_what_is_wrong_with_weights_is_told() -> None:
    weights, told = small()
    assert rxnmapper.model_of(weights, told, "x.bin").config.num_hidden_groups == 3
    lost = {key: x for key, x in weights.items() if "query.bias" not in key}
    longer = weights | {"albert.embeddings.LayerNorm.bias": torch.ones(7)}
    for wrong, beside in ((lost, told), (longer, told), (weights, {}), ({}, told)):
        with pytest.raises(ModelError, match=r"x\.bin: its weights are not those of an ALBERT"):
            rxnmapper.model_of(wrong, beside, "x.bin")
