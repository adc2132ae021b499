"""timm, diffusers and open_clip: their models are served as they are, in the ways in which they are used."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn

from benchmarks.beside_torch import library
from benchmarks.coverage.library_cases import (
    PICTURES,
    Case,
    clip,
    clip_model,
    dit,
    draw,
    drawn,
    flux,
    of_timm,
    pixart,
    sd3,
    unet,
    unet2d,
    vit,
)
from benchmarks.coverage.probe import DropPattern, Look
from heedful import attach
from heedful.cli.doctor import doctor
from heedful.conformance.model_laws import fingerprint
from heedful.conformance.tolerances import close_model
from heedful.core.call import Call
from heedful.core.errors import ModelError, NotEntered, RefusedModel
from heedful.core.sites import Site, at
from heedful.methods.mechanisms.local.neighborhood_attention import NeighborhoodAttention

from .samples import Gate, Zero
from .test_residual import Push
from .test_torch_modules import CALLS, Halve, Spy, TwiceOut, model_of, slow
from .torch_models import WrittenOut

ROOT = Path(__file__).parents[1]
EXAMPLES = re.findall(r"## ([\w ]+)\n\n```python\n(.*?)```", (ROOT / "docs" / "vision.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_examples_of_the_docs_run(name: str, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    for library_of in ("timm", "open_clip"):
        library(library_of)
    exec(code, {})
    told = capsys.readouterr().out
    wanted = {
        "timm": "blocks.0.attn torch.Size([14, 14])",
        "diffusers": "(64, 64, 3) active: 4 of 4",
        "Your own": "layers.1.self_attn",
    }
    wanted["DINOv2"] = "12 layers of 6 heads, 1 image of 257 tokens"
    assert wanted.get(name, "sink rate") in told
    assert len(code.strip().splitlines()) <= 12


def test_doctor_names_the_layers_of_several_pictures_or_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    library("timm")
    with pytest.raises(RefusedModel, match="HaloAttn: texts and heads share an axis"):
        doctor("timm:halonet26t")

    def broken(name: str) -> nn.Module:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(library("timm"), "create_model", broken)
    with pytest.raises(ModelError, match=r"nms does not exist; timm wants torchvision, in the build of your torch"):
        doctor("timm:vit_tiny_patch16_224")


def test_doctor_and_explain_name_the_layers(capsys: pytest.CaptureFixture[str]) -> None:
    library("timm")
    doctor("timm:vit_tiny_patch16_224")
    told = capsys.readouterr().out
    assert "12 attention layers of VisionTransformer, blocks.0.attn to blocks.11.attn" in told
    assert "3 query heads, 3 key heads, 64 wide" in told
    with pytest.raises(ModelError, match="Unknown model"):
        doctor("timm:nothing")
    with pytest.raises(RefusedModel, match="calls no attention of torch's"):
        doctor("timm:resnet18")
    with attach(vit(), Halve(), inputs=PICTURES) as run:
        run(PICTURES)
        assert "2 attention layers: blocks.0.attn, blocks.1.attn" in str(run.explain())


CASES: dict[str, Callable[[], Case]] = {
    "timm ViT": lambda: of_timm("vit_tiny_patch16_224"),
    "timm with registers": lambda: of_timm("vit_small_patch14_reg4_dinov2", init_values=None),
    "timm EVA": lambda: of_timm("eva02_tiny_patch14_224"),
    "UNet": unet,
    "SD3": sd3,
    "Flux": flux,
    "PixArt": pixart,
    "DiT": dit,
    "UNet of images": unet2d,
    "open_clip": clip,
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
@torch.no_grad()
def test_models_are_served_as_they_are(make: Callable[[], Case]) -> None:
    case = make()
    before, native, wanted = fingerprint(case.model), case.call(), slow(case.call)
    with attach(case.model, Look().when("decode")):
        assert torch.equal(case.call(), wanted)
    CALLS.clear()
    with attach(case.model, Look() | Spy(), backend="reference") as run:
        assert close_model(case.call(), native)
        assert len(run.layer_names) == len(run.activity().entered) == case.layers
    assert tuple(call.cross for call in CALLS) == case.cross
    with attach(case.model, Halve(), inputs=case.call):
        halved = case.call()
    assert torch.equal(case.call(), native)
    assert fingerprint(case.model) == before
    with WrittenOut(lambda p: p / 2):
        wanted = case.call()
    assert close_model(halved, wanted)
    assert not close_model(halved, native)


@torch.no_grad()
def test_patches_lie_on_the_grid_of_the_image() -> None:
    for name, before in (("vit_tiny_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5)):
        model = vit(name)
        CALLS.clear()
        with attach(model, Spy()) as run:
            run(PICTURES)
        region = CALLS[0].region("patches")
        assert (tuple(region), region.grid) == (((before, before + 32),), (4, 8))
        with attach(model, NeighborhoodAttention.example(), inputs=PICTURES) as run:
            assert not close_model(run(PICTURES), model_of(run)(PICTURES))
            assert run.active
    model = clip_model()
    CALLS.clear()
    with attach(model.visual, Spy()) as run:
        run(draw(2, 3, 32, 32))
    assert CALLS[0].region("patches").grid == (4, 4)


@torch.no_grad()
def test_joint_attention_tells_which_half_is_the_image() -> None:
    for make, image in ((sd3, (0, 64)), (flux, (7, 23))):
        case = make()
        CALLS.clear()
        with attach(case.model, Spy()):
            case.call()
        assert CALLS[0].region("image") == (image,)
        assert CALLS[0].region("context") == (((64, 71),) if make is sd3 else ((0, 7),))


@torch.no_grad()
def test_the_sites_around_the_call() -> None:
    model = vit()
    with attach(model, Push().on(layers=0) | TwiceOut(), inputs=PICTURES) as run:
        found = run(PICTURES)
        assert run.active
    assert not close_model(found, model(PICTURES))


@torch.no_grad()
def test_what_a_layer_scale_hides_is_told_all_the_same() -> None:
    model = vit(init_values=1e-5)
    for block in model.blocks:
        block.ls1.gamma.fill_(1e-9)
    with attach(model, DropPattern()) as run:
        assert close_model(run(PICTURES), model_of(run)(PICTURES))
        assert run.active


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_both_of_timms_ways_are_served_alike(fused: bool) -> None:
    how = {"img_size": 16, "window_size": 2, "patch_size": 4, "embed_dim": 16, "depths": (1,), "num_heads": (2,)}
    model = drawn(library("timm").create_model("swin_tiny_patch4_window7_224", num_classes=5, **how))
    x = draw(2, 3, 16, 16)
    model.layers[0].blocks[0].attn.fused_attn = fused
    native = model(x)
    CALLS.clear()
    with attach(model, Look() | Spy(), inputs=x, backend="reference") as run:
        assert close_model(run(x), native)
    assert (len(CALLS[0].queries), CALLS[0].heads, CALLS[0].batch) == (4, 2, 8)


def test_gradients_under_the_libraries_own_checkpointing() -> None:
    found = []
    for on in (False, True):
        case = dit()
        if on:
            case.model.enable_gradient_checkpointing()
        case.model.train()
        with attach(case.model, Halve() | Gate(), inputs=case.call):
            torch.manual_seed(0)  # classes are left out at random
            case.call().square().sum().backward()
            found.append([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])
        model = vit()
        model.set_grad_checkpointing(on)
        model.train()
        with attach(model, Halve(), inputs=PICTURES) as run:
            run(PICTURES).square().sum().backward()
        found[-1] += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    plain, again = map(torch.cat, found)
    assert close_model(again, plain)


@torch.no_grad()
def test_attention_backends_of_diffusers() -> None:
    case = flux()
    native = case.call()
    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        case.model.set_attention_backend("_native_math")
        with attach(case.model, Look(), backend="reference"):
            assert close_model(case.call(), native)
        case.model.set_attention_backend("flex")
        with pytest.raises(RefusedModel, match=r"attention backend 'flex'; model\.set_attention_backend"):
            attach(case.model, Look(), inputs=lambda: None)
        case.model.set_attention_backend("native")
        with attach(case.model, Look()):
            case.call()
            registry = _AttentionBackendRegistry._backends
            mine = registry[active]
            registry[active] = lambda query, key, value, *args, **kwargs: query
            try:
                with pytest.raises(NotEntered, match="did not pass through heedful"):
                    case.call()
            finally:
                registry[active] = mine
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("first", ["hook", "run"])
@torch.no_grad()
def test_offloading_before_and_after(first: str) -> None:
    case = dit()
    native = case.call()
    if first == "hook":
        add_hook_to_module(case.model, AlignDevicesHook(execution_device="cpu"))
    run = attach(case.model, Halve())
    if first == "run":
        add_hook_to_module(case.model, AlignDevicesHook(execution_device="cpu"))
    with WrittenOut(lambda p: p / 2), run.paused():
        wanted = case.call()
    assert close_model(case.call(), wanted)
    run.close()
    assert torch.equal(case.call(), native)
    remove_hook_from_module(case.model)
    assert torch.equal(case.call(), native)


@torch.no_grad()
def test_a_pipeline_runs_under_a_run() -> None:
    net: Any = unet2d().model
    pipe = diffusers.DDPMPipeline(unet=net, scheduler=diffusers.DDIMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(generator=generator, num_inference_steps=2, output_type="np").images)

    native = picture()
    with attach(pipe.unet, Halve()) as run:
        assert not torch.equal(picture(), native)
        assert run.state.now.number == 1
        assert len(run.layer_names) == 4
    assert torch.equal(picture(), native)


class Guided(Halve):
    """Acts on the rows of a batch that have the role."""

    @at(Site.PATTERN)
    def halve(self, pattern: Tensor, call: Call) -> Tensor:
        there = call.spread(call.marked("guided")).any(-1)
        return torch.where(there[..., None, None], pattern / 2, pattern)


@torch.no_grad()
def test_each_half_of_a_guided_batch_has_roles_of_its_own() -> None:
    model = unet().model
    x, words = draw(2, 4, 8, 8), draw(2, 7, 16)
    native = model(x, 1, encoder_hidden_states=words).sample
    with attach(model, Halve()):
        wanted = model(x, 1, encoder_hidden_states=words).sample
    with attach(model, Guided(), roles=[{}, {"guided": ((0, 1),)}]):
        plain, told = model(x, 1, encoder_hidden_states=words).sample
    assert close_model(plain, native[0])
    assert close_model(told, wanted[1])
    assert not close_model(wanted[1], native[1])


@pytest.mark.parametrize("first", ["offload", "run"])
def test_a_pipeline_is_offloaded_before_or_after(first: str) -> None:
    pipe = diffusers.DDPMPipeline(unet=unet2d().model, scheduler=diffusers.DDIMScheduler(num_train_timesteps=10))
    pipe.set_progress_bar_config(disable=True)

    def picture() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(generator=generator, num_inference_steps=2, output_type="np").images)

    native = picture()
    with attach(pipe.unet, Halve()):
        wanted = picture()
    if first == "offload":
        pipe.enable_model_cpu_offload(device="cpu")
    with attach(pipe.unet, Halve()):
        if first == "run":
            pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(picture(), wanted)
        assert not torch.equal(wanted, native)
    assert torch.equal(picture(), native)
    pipe.remove_all_hooks()
    assert torch.equal(picture(), native)


class Inside(nn.Module):
    """A block's attention, which timm hands a mask."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        return self.own(x)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@torch.no_grad()
def test_what_is_no_map_of_tokens_is_never_told_as_one(fused: bool) -> None:
    library("timm")
    from timm.layers import DiffAttention
    from timm.models.xcit import XCA

    for other, why in (
        (XCA(32, 4), "over channels, not over tokens"),
        (DiffAttention(32, 2), "2 calls in one forward"),
    ):
        model, other.fused_attn = vit(), fused
        model.blocks[0].attn = Inside(drawn(other))
        with pytest.raises(
            RefusedModel, match=rf"blocks\.0\.attn\.own \({type(other).__name__}: {why if fused else ''}"
        ):
            attach(model, Look(), inputs=PICTURES)
        with attach(model, Look(), inputs=PICTURES, only="blocks.1") as run:
            run(PICTURES)
            assert run.layer_names == ("blocks.1.attn",)


@torch.no_grad()
def test_places_that_a_module_inside_tells_are_a_bias() -> None:
    library("timm")
    from timm.layers.bottleneck_attn import BottleneckAttn

    net, x = nn.Sequential(drawn(BottleneckAttn(32, feat_size=(4, 8), num_heads=4), 0.5)), draw(4, 32, 4, 8)
    native = net(x)
    with attach(net, Zero().on(heads=[1]), inputs=x) as run:
        found = run(x)
    assert close_model(found[:, 8:16], 0 * found[:, 8:16])
    assert close_model(found[:, :8], native[:, :8])
    assert close_model(found[:, 16:], native[:, 16:])


@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_windows_are_not_taken_for_heads_that_stand_among_the_texts(heads: int) -> None:
    library("timm")
    from timm.layers.halo_attn import HaloAttn

    net = nn.Sequential(drawn(HaloAttn(32, num_heads=heads, block_size=4, halo_size=1), 0.5))
    for side in (8, 4):  # four windows a picture, or one
        with pytest.raises(RefusedModel, match=r"0 \(HaloAttn: texts and heads share an axis, beside one"):
            attach(net, Look(), inputs=draw(2, 32, side, side))
    one, two = draw(1, 32, 8, 8), draw(2, 32, 8, 8)
    with attach(net, Zero().on(heads=[1]), inputs=one) as run:  # of one picture sizes tell
        found, width = run(one), 32 // heads
        assert torch.equal((found == 0).all(dim=(0, 2, 3)), torch.arange(32) // width == 1)
        with pytest.raises(NotEntered, match="HaloAttn"):
            run(two)
