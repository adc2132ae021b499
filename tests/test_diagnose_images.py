"""A diagnosis of images: files and folders, what cannot be read, and the view of a few of them."""

from __future__ import annotations

import gzip
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import SwinConfig, SwinModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import heedful
from heedful import models
from heedful.adapters.grids import names_before, regions
from heedful.conformance.tolerances import close
from heedful.core.errors import FieldError, HeedfulError
from heedful.core.regions import Region
from heedful.diagnosis import glances
from heedful.diagnosis import images as reading
from heedful.diagnosis.glances import ImageView, places
from heedful.diagnosis.profile import Profile
from heedful.methods import ModalityShare, SinkRate
from heedful.report import page
from heedful.report.glances import packed


def vit(side: int = 8) -> models.Loaded:
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    return models.Loaded(models.tiny("vit", image_size=side), processor, "us/vit")


def picture(seed: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype("uint8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them a file's width below, one that is none, one half of one, and what is no image's name."""
    home = tmp_path / "photos"
    (home / "below").mkdir(parents=True)
    Image.fromarray(picture(0)).save(home / "a.png")
    Image.fromarray(picture(1)).save(home / "below" / "c.png")
    (home / "b.jpg").write_text("no image")
    whole = (home / "a.png").read_bytes()
    (home / "d.png").write_bytes(whole[: len(whole) // 2])
    (home / "notes.txt").write_text("not asked for")
    (home / ".hidden.png").write_text("not asked for")
    return home


def pixels(seed: int) -> Tensor:
    return torch.tensor(picture(seed)).permute(2, 0, 1) / 127.5 - 1


def test_a_folder_is_read_and_what_is_bad_in_it_is_told(folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = heedful.diagnose(vit(), folder, progress=lambda p: seen.append((p.stage, p.done, p.total)))
    assert (found.facts["texts"], found.facts["tokens"], found.facts["reads"]) == (2, 10, "image")
    assert [x.partition("photos/")[2] for x in found.facts["skipped"]] == [
        "b.jpg is no image that can be read",
        found.facts["skipped"][1].partition("photos/")[2],
    ]
    assert "d.png cannot be read (" in found.facts["skipped"][1]
    assert "2 of 4 images left out: " in str(found)
    assert ("images", 5, 10) in seen
    assert ("view", 10, 10) in seen
    plain = heedful.diagnose(vit(), torch.stack([pixels(0), pixels(1)]))
    share = ModalityShare(("cls", "register", "border"), "middle")
    assert close(found.answer(share).attention["cls"], plain.answer(share).attention["cls"])
    assert found.view is not None
    assert found.view.names == [str(folder / "a.png"), str(folder / "below" / "c.png")]
    assert close(found.view.pixels[1], pixels(1).half())
    with pytest.raises(FieldError, match=r"b\.jpg': is no image that can be read"):
        heedful.diagnose(vit(), folder / "b.jpg")
    assert heedful.diagnose(vit(), [folder / "a.png", pixels(1)]).facts["texts"] == 2


def test_images_are_upright_and_have_three_colours(tmp_path: Path) -> None:
    grey = Image.fromarray(picture(0)[..., 0])
    turned = Image.fromarray(picture(1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    grey.save(tmp_path / "grey.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    read = reading.images(tmp_path, vit().tokenizer)
    assert close(read.tokens[0], pixels(0)[:1].expand(3, 8, 8))
    assert close(read.tokens[1], pixels(1).rot90(-1, (1, 2)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Path("nowhere"), "no such file or folder"),
        ("nowhere", "files or folders of them, as Path"),
        ([], "files or folders of them, as Path"),
        (torch.ones(3, 8, 8, dtype=torch.uint8), "takes their pixels"),
        (torch.zeros(0, 3, 8, 8), "holds no image"),
    ],
)
def test_wrong_images_are_a_plain_error(given: Any, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        heedful.diagnose(vit(), given)


def test_folders_with_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FieldError, match=r"the folder holds no file that ends in \.png"):
        heedful.diagnose(vit(), tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(FieldError, match=r"holds no image that can be read: .*a\.png is no image"):
        heedful.diagnose(vit(), tmp_path)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    with pytest.raises(FieldError, match=r"needs the model's image processor.*AutoImageProcessor"):
        heedful.diagnose(models.tiny("vit"), tmp_path)
    with pytest.raises(FieldError, match="is not one image"):
        heedful.diagnose(models.Loaded(models.tiny("vit"), Twice(), ""), tmp_path / "a.png")
    monkeypatch.setattr(reading, "MOST", 3 * 8 * 8 * 4)
    heedful.diagnose(vit(), tmp_path, measures=SinkRate())
    Image.fromarray(picture(1)).save(tmp_path / "b.png")
    with pytest.raises(FieldError, match="more than 1 images"):
        heedful.diagnose(vit(), tmp_path)


class Twice(ViTImageProcessorPil):
    """Cuts an image in two, as some do with large ones."""

    def __call__(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(2, 3, 8, 8)}


def test_the_view_is_what_the_maps_say(folder: Path) -> None:
    loaded = vit(20)  # 5 x 5 patches
    view = heedful.diagnose(loaded, folder, measures=SinkRate()).view
    assert isinstance(view, ImageView)
    assert (view.before, view.grid, view.layers) == (["class token"], [5, 5], [0, 1])
    assert view.looks.shape == (2, 2, 2, 4, 26)
    for i, row in enumerate(reading.images(folder, loaded.tokenizer).tokens):
        maps = heedful.patterns(loaded, row).tensor
        assert close(view.looks[0, i], maps[:, :, 0].half())
        assert close(view.looks[1, i], maps.half().float().mean(2).half())
        for at, (layer, head) in enumerate(view.heads):
            assert close(view.maps[i, at], maps[layer, head].half())


def test_many_patches_are_shown_as_squares(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glances, "CELLS", 9)
    loaded = vit(20)
    view = heedful.diagnose(loaded, folder / "a.png", measures=SinkRate()).view
    assert isinstance(view, ImageView)
    assert view.grid == [3, 3]
    at, shape = places(Region(((1, 26),), (5, 5)))
    square = [i // 2 * 3 + j // 2 for i in range(5) for j in range(5)]
    assert at.tolist() == [0, *(1 + n for n in square)]
    assert shape == (3, 3)
    whole = heedful.patterns(loaded, reading.images(folder / "a.png", loaded.tokenizer).tokens[0])
    for n, (layer, head) in enumerate(view.heads):
        wanted = torch.zeros(10, 10)
        for q in range(26):
            for k in range(26):
                wanted[at[q], at[k]] += whole[layer, head][q, k] / (at == at[q]).sum()
        assert close(view.maps[0, n], wanted.half())


def test_a_view_of_images_is_saved_and_checked(folder: Path, tmp_path: Path) -> None:
    found = heedful.diagnose(vit(), folder, out=tmp_path / "kept")
    again = Profile.load(tmp_path / "kept")
    assert isinstance(again.view, ImageView)
    for name, x in vars(found.view).items():
        y = getattr(again.view, name)
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y
    assert heedful.diagnose(vit(), folder, out=tmp_path / "kept").facts["date"] == found.facts["date"]
    with pytest.raises(FieldError, match="must be those of 5 places"):
        ImageView(**{**vars(again.view), "looks": again.view.looks[..., :4]})


def test_half_of_the_heads_play_a_role_and_the_others_are_of_the_last_layer() -> None:
    found = {layer: torch.zeros(6, 3, 3) for layer in (0, 1, 3)}
    assert glances.chosen([(0, 2), (2, 1), (3, 1)], found) == [(0, 2), *((3, h) for h in range(6))]  # layer 2 is none
    assert glances.chosen([], {0: torch.zeros(12, 3, 3)}) == [(0, h) for h in range(8)]
    assert len(glances.chosen([(0, h) for h in range(4)], found)) == 8


def test_room_is_kept() -> None:
    assert glances.room(257, 8) == 4
    assert glances.room(577, 8) == 1
    assert glances.room(10_000, 8) == 1


def test_layers_that_see_no_image_whole_have_no_view() -> None:
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4)
    found = heedful.diagnose(SwinModel(config).eval(), torch.randn(2, 3, 16, 16), measures=SinkRate())
    assert found.view is None
    assert "In the images" not in page.render(found)


def test_a_packed_view_unpacks(folder: Path) -> None:
    view = heedful.diagnose(vit(20), folder, measures=SinkRate()).view
    assert isinstance(view, ImageView)
    about, numbers = packed(view)
    raw = gzip.decompress(b64decode(numbers))
    rows, whole, n = 2 * 2 * 2 * 4, about["whole"] * len(view.heads) * 26, 26
    high = torch.frombuffer(bytearray(raw[: 4 * (rows + whole)]), dtype=torch.float32)
    parts = torch.frombuffer(bytearray(raw[4 * (rows + whole) :]), dtype=torch.uint8)
    shares = (parts[: (rows + whole) * n].view(-1, n) / 255) ** 2 * high[:, None]
    assert float((shares[:rows].view(2, 2, 2, 4, n) - view.looks.float()).abs().max()) < 2 / 255
    assert float((shares[rows:].view(view.maps.shape) - view.maps.float()).abs().max()) < 2 / 255
    shown = parts[(rows + whole) * n :].view(2, 20, 20, 3)
    x = view.pixels[0].float()
    wanted = (x - x.min()) / (x.max() - x.min()) * 255
    assert int((shown[0].permute(2, 0, 1) - wanted).abs().max()) < 2
    assert (about["images"], about["before"], about["grid"]) == (["a.png", "c.png"], ["class token"], [5, 5])


def test_the_page_shows_images_and_no_text(folder: Path) -> None:
    text = page.render(heedful.diagnose(vit(), folder))
    assert 'id="images"' in text
    assert 'id="tokens"' not in text
    assert "in 2 images" in text
    alone = page.render(heedful.diagnose(vit(), folder / "a.png"))
    assert "One image was read" in alone


def test_the_sides_of_an_image_are_known() -> None:
    model = models.tiny("vit")
    found = regions(model, (3, 4), 13)
    assert [i for start, stop in found["border"] for i in range(start, stop)] == [1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
    found = regions(model, (4, 4), 17)
    assert [i for start, stop in found["border"] for i in range(start, stop)] == [
        1,
        2,
        3,
        4,
        5,
        8,
        9,
        12,
        13,
        14,
        15,
        16,
    ]
    assert "border" not in regions(model, (2, 5), 11)
    assert "register" not in found
    model.register_parameter("register_tokens", torch.nn.Parameter(torch.zeros(1, 3, 8)))
    assert regions(model, (2, 2), 8)["register"] == ((1, 4),)
    assert names_before(model) == ["class token", "register 1", "register 2", "register 3"]
    for module in model.modules():
        if hasattr(module, "cls_token"):
            del module.cls_token
    assert names_before(model) == ["register 1", "register 2", "register 3"]
    assert "cls" not in regions(model, (2, 2), 7)


def test_text_models_take_no_folder_of_images(folder: Path) -> None:
    with pytest.raises(HeedfulError, match=r"holds no file with text in it|words need a tokenizer"):
        heedful.diagnose(models.tiny("llama"), folder)
