"""Preprocessing against Pillow and torchvision, from arrays and from files."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from talos_fast.errors import TalosError
from talos_fast.models import ImagePreprocess
from talos_fast.models.images import read_image

GREY_LEVELS = 2.01 / 255


def picture(height: int, width: int) -> np.ndarray:
    coarse = torch.rand(1, 3, 6, 6)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255
    return fine.byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("shape", [(20, 20), (32, 32), (61, 40), (33, 90), (49, 98)])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clips_transform(shape, mode, interpolation):
    from open_clip import image_transform

    mean, std, image = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), picture(*shape)
    reference = image_transform(32, False, mean, std, mode, interpolation)(Image.fromarray(image[0]))
    ours = ImagePreprocess((32, 32), mean, std, interpolation, mode)(image)[0]
    assert ours.shape == reference.shape
    assert ((ours - reference).abs().amax((1, 2)) * torch.tensor(std)).max() < GREY_LEVELS


@pytest.mark.parametrize("shape", [(70, 90), (32, 32)])
def test_equals_timms_transform_with_its_crop(shape):
    from timm.data import create_transform

    image = picture(*shape)
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    reference = create_transform((3, 32, 32), crop_pct=0.9, **settings)(Image.fromarray(image[0]))
    ours = ImagePreprocess((32, 32), crop_fraction=0.9, **settings)(image)[0]
    assert ((ours - reference).abs() * 0.5).max() < GREY_LEVELS


def test_small_pictures_keep_their_border():
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[:, 0] = 255
    ours = ImagePreprocess((16, 16), (0.0,) * 3, (1.0,) * 3, "bilinear", crop_fraction=0.5)(image)
    assert ours[0, 0, 0].min() == 1.0


def test_files_of_different_sizes(tmp_path):
    for name, shape in (("a.png", (20, 30)), ("b.png", (40, 17))):
        Image.fromarray(picture(*shape)[0]).save(tmp_path / name)
    preprocess = ImagePreprocess((16, 16), (0.5,) * 3, (0.5,) * 3)
    batch = preprocess([tmp_path / "a.png", tmp_path / "b.png"])
    assert batch.shape == (2, 3, 16, 16)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a.png", "missing.png"):
        with pytest.raises(TalosError, match=f"{name}: not a whole picture"):
            preprocess([tmp_path / name])


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation, grey):
    """What a camera says of how it was held; the oracle is what Pillow's own rotations make of it."""
    upright = picture(8, 12)[0]
    if grey:
        upright = upright[..., :1].repeat(3, axis=-1)
    turns = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270", 2: "FLIP_LEFT_RIGHT", 4: "FLIP_TOP_BOTTOM",
             5: "TRANSPOSE", 7: "TRANSVERSE"}  # fmt: skip
    deep = upright[..., 0].astype(np.uint16) << 8  # of 16 bits
    stored, exif = Image.fromarray(deep if grey else upright), Image.Exif()
    if orientation in turns:
        stored = stored.transpose(Image.Transpose[turns[orientation]])
    exif[0x0112] = orientation
    stored.save(tmp_path / "held.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "held.png"), upright)


def test_an_odd_tag_beside_the_orientation_ends_nothing(tmp_path):
    """Pillow's own way to turn a picture writes all tags anew, and a width that is a text cannot be."""
    width = struct.pack("<HHI4s", 0x0100, 2, 4, b"odd")
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    tags = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + turned + struct.pack("<I", 0)
    upright = picture(8, 12)[0]
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "odd.png", exif=tags)
    with Image.open(tmp_path / "odd.png") as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert np.array_equal(read_image(tmp_path / "odd.png"), upright)


def test_settings_are_checked():
    with pytest.raises(TalosError, match="interpolation: found 'lanczos'"):
        ImagePreprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "lanczos")
    with pytest.raises(TalosError, match="resize_mode: found 'longest'"):
        ImagePreprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", "longest")


def test_config_of_open_clip():
    plain = ImagePreprocess.from_config({"size": 64})
    assert plain.size == (64, 64) and plain.mean[0] == pytest.approx(0.48145466)
    said = {"size": (32, 48), "mean": (0.5,) * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    full = ImagePreprocess.from_config(said)
    assert {name: getattr(full, name) for name in said} == said


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_of_grey_are_scaled_not_cut_off(tmp_path, suffix):
    ramp = np.linspace(0, 65535, 256 * 16).astype(np.uint16).reshape(256, 16)
    Image.fromarray(ramp).save(tmp_path / f"grey.{suffix}")
    pixels = read_image(tmp_path / f"grey.{suffix}")
    assert pixels.shape == (256, 16, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels[..., 0], (ramp >> 8).astype(np.uint8))


def test_grey_of_no_known_white_and_bombs_are_refused(tmp_path, monkeypatch):
    Image.fromarray(np.random.rand(4, 4).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(TalosError, match="mode F: grey levels of 32 bits have no known white"):
        read_image(tmp_path / "float.tiff")
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(TalosError, match="large.png: not a whole picture"):
        read_image(tmp_path / "large.png")


def test_sixteen_bits_of_grey_in_a_pgm(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    (tmp_path / "grey.pgm").write_bytes(b"P5 8 8 65535\n" + ramp.astype(">u2").tobytes())
    assert np.array_equal(read_image(tmp_path / "grey.pgm")[..., 0], (ramp >> 8).astype(np.uint8))
