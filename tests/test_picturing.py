"""Words in the pictures that are made of them: against maps computed by hand, on pipelines, as a page and as a verb."""

from __future__ import annotations

import copy
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from claims._pictures import GRID, HEADS, ID, SIDE, WORDS, Denoiser, denoiser, sample
from heedful import Method, Site, attach
from heedful.authoring import Call, Sum, reads
from heedful.cli.app import app
from heedful.conformance.tolerances import close_model
from heedful.core.errors import FieldError, HeedfulError, ModelError
from heedful.core.figures import percent
from heedful.explaining import picturing, word_maps
from heedful.explaining.picturing import REST, WordMaps
from heedful.looking import WordShares

from .samples import PAPER

PROMPT = "red square blue disc dark"


class Words:
    """A tokenizer of the denoiser's words."""

    model_max_length = 5

    def __call__(self, prompt: str, **how: Any) -> Any:
        return SimpleNamespace(input_ids=[ID[word] for word in prompt.split()])

    def decode(self, ids: list[int]) -> str:
        return WORDS[ids[0]]


class Pipe:
    """The shipped denoiser as a pipeline, guided: half of each batch reads no words."""

    def __init__(self) -> None:
        self.transformer = denoiser()
        self.tokenizer = Words()

    def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator, output_type: str) -> Any:
        words = torch.tensor(self.tokenizer(prompt).input_ids)[None]
        table, places = self.transformer.words.weight, self.transformer.places  # a pipeline's text encoder is its own
        both = table[torch.cat([torch.zeros_like(words), words])] + places

        def flow(_: int, x: Tensor, t: Tensor) -> Tensor:
            plain, told = self.transformer(noised=x.expand(2, -1, -1, -1), t=t.expand(2), context=both).chunk(2)
            return plain + 2 * (told - plain)

        made = sample(torch.randn(1, 3, SIDE, SIDE, generator=generator), flow, num_inference_steps)
        return SimpleNamespace(images=(made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


def by_hand(model: Denoiser, pipe: Pipe, steps: int) -> Tensor:
    """Maps of all steps and layers `[steps layers places words]`, from what cross-attention is given."""
    kept: list[Tensor] = []

    def keep(module: Any, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
        q, k = module.q(args[0][1]), module.kv(given["context"][1]).chunk(2, -1)[0]
        heads = [
            (a @ b.T / a.shape[1] ** 0.5).softmax(1) for a, b in zip(q.chunk(HEADS, 1), k.chunk(HEADS, 1), strict=True)
        ]
        kept.append(sum(heads[1:], heads[0]) / HEADS)

    hooks = [block.cross.register_forward_pre_hook(keep, with_kwargs=True) for block in model.blocks]
    with torch.no_grad():
        pipe(PROMPT, steps, torch.Generator().manual_seed(3), "np")
    for hook in hooks:
        hook.remove()
    return torch.stack(kept).unflatten(0, (steps, -1))


def test_maps_are_those_of_the_guided_half() -> None:
    pipe, steps = Pipe(), 3
    wanted = by_hand(pipe.transformer, pipe, steps)
    found = word_maps(pipe, PROMPT, steps=steps, seed=3)[0]
    assert found.words == PROMPT.split()
    torch.testing.assert_close(found.maps, wanted.mean((0, 1)).T.unflatten(1, (GRID, GRID)))
    torch.testing.assert_close(found.steps, wanted.mean((1, 2)))
    torch.testing.assert_close(found.layers, wanted.mean((0, 2)))
    assert found.names == [f"blocks.{n}.cross" for n in range(3)]
    assert found.picture.shape == (3, SIDE, SIDE)
    assert len(found.plot.lit().data) == 6
    assert {"lit", "steps", "layers"} <= set(dir(found.plot))
    assert torch.equal(found["blue"], found.maps[2])
    assert torch.equal(found[-1], found.maps[4])
    with pytest.raises(FieldError, match=r"must be one of \['red', 'square'"):
        found["green"]


class Joint(Pipe):
    """A small random model of Flux's class, where the words and the picture attend to one another in one sequence."""

    def __init__(self) -> None:
        from diffusers import FluxTransformer2DModel

        torch.manual_seed(0)
        self.transformer = FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip
        self.tokenizer_2 = Words()

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator, output_type: str) -> Any:
        x, words = torch.randn(1, 16, 4, generator=generator), torch.randn(1, 5, 8, generator=generator)
        places = torch.tensor([[0, row, column] for row in range(4) for column in range(4)])
        for step in range(num_inference_steps):
            x = self.transformer(
                hidden_states=x, encoder_hidden_states=words, pooled_projections=words[:, 0],
                timestep=torch.tensor([1.0 - step / 9]), img_ids=places, txt_ids=torch.zeros(5, 3),
            ).sample  # fmt: skip
        return SimpleNamespace(images=torch.zeros(1, 8, 8, 3).numpy())


class Whole(Method):
    paper = PAPER

    @reads(Site.PATTERN)
    def look(self, weights: Tensor, call: Call) -> Sum:
        return Sum.of(weights[0].mean(0))


def test_where_words_and_picture_are_one_sequence_the_picture_asks() -> None:
    pipe, whole = Joint(), Whole()
    found = word_maps(pipe, PROMPT, steps=2, seed=3)[0]
    with attach(pipe.transformer, whole, backend="reference") as run:
        pipe(PROMPT, 2, torch.Generator().manual_seed(3), "np")
        wanted = run[whole][0].total[5:, :5] / 2  # the words stand first
    assert found.names == ["transformer_blocks.0.attn"], "a single block does not say where its words are"
    assert found.figures[2].rows == found.names
    torch.testing.assert_close(found.maps, wanted.T.unflatten(1, (4, 4)).float())


class Tall(Joint):
    """The same, as if its sixteen places were a picture four times as high as wide."""

    def __call__(self, *given: Any, **options: Any) -> Any:
        super().__call__(*given, **options)
        return SimpleNamespace(images=torch.zeros(1, 16, 4, 3).numpy())


def test_maps_have_the_proportion_of_the_picture() -> None:
    found = word_maps(Tall(), PROMPT, steps=1)
    assert found[0].maps.shape == (5, 8, 2)
    assert found.facts["picture"] == "4 x 16"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random pipeline with a UNet of two resolutions, as diffusers saves it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = {piece: n for n, piece in enumerate([*letters, *(f"{x}</w>" for x in letters), *marks])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=12,
            bos_token_id=vocabulary[marks[0]], eos_token_id=vocabulary[marks[1]],
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4), text, tokenizer, unet,
        DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    pipe.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_maps_of_unlike_sizes_are_joined_and_what_is_behind_the_words_is_one(saved: Path, tmp_path: Path) -> None:
    pipe = loaded(saved)
    before = pipe("ab c", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np").images[0]
    found = word_maps(pipe, ["ab c", "<i0>"], steps=2, seed=1)
    assert isinstance(found, WordMaps)
    assert len(found) == 2
    one = found[0]
    assert close_model(one.picture, torch.as_tensor(before).permute(2, 0, 1)), "the picture is the pipeline's own"
    assert one.words == ["(start)", "a", "b", "c", "(end)", "(rest)"]
    most, narrow = (finding.text for finding in one.findings())
    around = percent(float(one.maps[[0, 4, 5]].mean((1, 2)).sum()))
    assert re.fullmatch(rf"Of the words in “ab c”, “[abc]” gets most, \d+%; {around} go to what is around them\.", most)
    assert re.match(r"“[abc]” is looked at from the fewest places", narrow), "marks are no words"
    assert all(name.endswith(".transformer_blocks.0.attn2") for name in one.names)
    labels = next(figure.rows for figure in one.figures if figure.key == "layers")
    assert [f"{label}.transformer_blocks.0.attn2" for label in labels] == one.names
    assert found.facts["model"] == saved.name
    assert one.maps.shape[0] == 6
    assert {tuple(x.shape[1:]) for x in (one.steps, one.layers)} == {(6,)}
    assert len(one.steps) == 2
    assert len(one.layers) == len(one.names) == len({*one.names}) > 4
    for x, over in ((one.maps, 0), (one.steps, 1), (one.layers, 1)):
        assert torch.allclose(x.sum(over), torch.ones(()))
    page = found.page(tmp_path / "words.html").read_text()
    assert page.count("data:image/png;base64,") == 7 + 8
    assert "&lt;i0&gt;" in page, "words are escaped"
    assert "<i0>" not in page
    assert "What the DAAM" in page
    assert found._repr_html_().count("<img") == 7 + 8


def test_the_verb_makes_a_page_of_a_file_of_prompts(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\n\nb\n")
    monkeypatch.setattr(picturing, "word_maps", partial(word_maps, steps=2))
    done = CliRunner().invoke(app, ["diagnose", str(saved), "--prompts", "prompts.txt", "--json", "--out", "kept"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [one["prompt"] for one in told["prompts"]] == ["a red cube", "b"]
    assert len(told["prompts"][0]["words"][0]["by step"]) == 2
    assert sum(word["share"] for word in told["prompts"][0]["words"]) == pytest.approx(1)
    assert Path(told["page"]).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (None, [], "there is no file 'prompts.txt'"),
        ("\n \n", [], "holds no prompt"),
        (b"\xff\xfe\xff", [], "is no text in UTF-8"),
        ("a cube", ["--measures", "SinkRate"], "--measures: not with --prompts"),
        ("a cube", ["--text", "prompts.txt"], "one of them is read"),
        ("a cube", [], "is no text-to-image pipeline that diffusers can load"),
    ],
)
def test_the_verb_refuses_what_makes_no_picture(
    content: str | bytes | None, more: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    done = CliRunner().invoke(app, ["diagnose", str(tmp_path), "--prompts", "prompts.txt", *more])
    assert isinstance(done.exception, HeedfulError)
    assert says in str(done.exception)


class Deaf(Pipe):
    """A pipeline that attends to no words."""

    def __init__(self) -> None:
        self.transformer = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(8, 2, batch_first=True), 1
        ).eval()
        self.tokenizer = Words()

    def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator, output_type: str) -> Any:
        self.transformer(torch.randn(1, 4, 8, generator=generator))
        return SimpleNamespace(images=[torch.zeros(4, 4, 3).numpy()])


def test_what_is_no_pipeline_or_no_prompt_is_refused() -> None:
    with pytest.raises(FieldError, match=r"word_maps\(\).pipe = 'Denoiser': must be a pipeline of diffusers"):
        word_maps(denoiser(), PROMPT)
    for wrong in ("", [], ["red", " "]):
        with pytest.raises(FieldError, match="must be a prompt or several"):
            word_maps(Pipe(), wrong)
    for steps in (0, True, 2.5):
        with pytest.raises(FieldError, match=r"word_maps\(\).steps"):
            word_maps(Pipe(), PROMPT, steps=steps)
    film = Pipe()
    film.__class__ = type(
        "Film", (Pipe,), {"__call__": lambda self, *a, **k: SimpleNamespace(frames=Pipe.__call__(self, *a, **k))}
    )
    with pytest.raises(ModelError, match="Film makes no pictures"):
        word_maps(film, PROMPT, steps=1)
    with pytest.raises(ModelError, match="attends to no words"):
        word_maps(Deaf(), PROMPT)


def test_options_that_it_sets_itself_are_refused() -> None:
    for name, value in (("num_images_per_prompt", 2), ("output_type", "pil"), ("return_dict", False)):
        with pytest.raises(FieldError, match=rf"word_maps\(\).options = \['{name}'\]: are set here"):
            word_maps(Pipe(), PROMPT, steps=1, **{name: value})


def test_attention_that_is_not_finite_is_refused() -> None:
    pipe = Pipe()
    pipe.transformer = copy.deepcopy(pipe.transformer)  # the one that is shipped is loaded once for all
    with torch.no_grad():
        pipe.transformer.blocks[0].cross.q.weight[0] = float("nan")
    with pytest.raises(ModelError, match="attention of Denoiser is not finite"):
        word_maps(pipe, PROMPT, steps=1)


def test_what_stands_behind_the_words_is_told_unless_nobody_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fewer(Words):
        """Knows four words of what the model reads."""

        def __call__(self, prompt: str, **how: Any) -> Any:
            return SimpleNamespace(input_ids=super().__call__(prompt).input_ids[: 4 if how else 5])

    pipe = Pipe()
    pipe.tokenizer = Fewer()
    seen = word_maps(pipe, PROMPT, steps=1)[0]
    assert seen.words == [*PROMPT.split()[:4], REST]
    whole, sees = WordShares.shares, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    monkeypatch.setattr(WordShares, "shares", lambda self, weights, call: whole(self, weights, call) * sees)
    hidden = word_maps(pipe, PROMPT, steps=1)[0]
    assert hidden.words == PROMPT.split()[:4]
    assert close_model(hidden.maps, seen.maps[:4])
    assert close_model(hidden.steps, seen.steps[:, :4])
    assert close_model(hidden.layers, seen.layers[:, :4])


def test_forwards_of_one_step_are_averaged() -> None:
    class Twice(Pipe):
        def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator, output_type: str) -> Any:
            return super().__call__(prompt, 2 * num_inference_steps, generator, output_type)

    pipe = Twice()
    wanted = by_hand(pipe.transformer, pipe, 2)  # [steps forwards*layers places words]
    found = word_maps(pipe, PROMPT, steps=2, seed=3)[0]
    torch.testing.assert_close(found.steps, wanted.mean((1, 2)))
