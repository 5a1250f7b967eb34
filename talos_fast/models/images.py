"""Pictures to the tensors that a vision model was trained on."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from talos_fast.errors import TalosError, needs
from talos_fast.tasks.base import Inputs

ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held, 1 to 8."""
UPRIGHT = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
           7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
"""What turns such a picture upright. `PIL.ImageOps.exif_transpose` also rewrites all tags, and fails at odd ones."""


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize, crop to the centre, scale to 0 ... 1 and normalise: as torchvision does with Pillow, to two grey levels.

    Pictures smaller than the model's input are enlarged without the crop, which would cut away a part of so few pixels.

    Args:
        size: height and width that the model takes, pixels.
        mean: of the three channels, of values in 0 ... 1.
        std: likewise.
        interpolation: "bicubic" or "bilinear", both with antialiasing.
        resize_mode: "shortest" keeps the aspect and crops, "squash" does not.
        crop_fraction: the share of the resized picture's side that the crop keeps.

    Raises:
        TalosError: another interpolation or resize mode.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    crop_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise TalosError(f"interpolation: found {self.interpolation!r}; use 'bicubic' or 'bilinear'")
        if self.resize_mode not in ("shortest", "squash"):
            raise TalosError(f"resize_mode: found {self.resize_mode!r}; use 'shortest' or 'squash'")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ImagePreprocess":
        """From the `preprocess_cfg` of an open_clip model; what it leaves out is open_clip's default, CLIP's own."""
        with needs("clip"):
            from open_clip.transform import PreprocessCfg, merge_preprocess_dict

        known = merge_preprocess_dict(PreprocessCfg(), dict(config))
        size = known["size"]
        return cls(
            size=(size, size) if isinstance(size, int) else (size[0], size[1]),
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
            interpolation=known["interpolation"],
            resize_mode=known["resize_mode"],
        )

    def __call__(self, inputs: Inputs) -> Tensor:
        """Images (uint8, shape (N, H, W, 3), or files) to float32 of shape (N, 3, *size)."""
        if isinstance(inputs, np.ndarray):
            resized = self._resize(inputs)
        else:
            resized = torch.cat([self._resize(read_image(Path(path))[None]) for path in inputs])
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").view(1, 3, 1, 1) for values in (self.mean, self.std)
        )
        return ((resized / 255.0 - mean) / std).contiguous()

    def _resize(self, images: npt.NDArray[np.uint8]) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        height, width = self._scaled(*images.shape[1:3])
        if (height, width) != tuple(images.shape[1:3]):
            # On uint8, in this memory format, torch has a fast path that rounds between the two passes as Pillow does.
            pixels = functional.interpolate(pixels, (height, width), mode=self.interpolation, antialias=True)
        top, left = (round((have - want) / 2.0) for have, want in zip((height, width), self.size, strict=True))
        return pixels[:, :, top : top + self.size[0], left : left + self.size[1]]

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        enlarged = min(height, width) < min(self.size)
        crop = 1.0 if enlarged else self.crop_fraction
        target = (int(self.size[0] / crop), int(self.size[1] / crop))
        if self.resize_mode == "squash":
            return target
        # The side that decides is hit exactly; the other is cut off, as torchvision does, from the exact quotient.
        if target[0] * width >= target[1] * height:
            return target[0], target[0] * width // height
        return target[1] * height // width, target[1]


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """The picture in a file, upright, as RGB: uint8, shape (H, W, 3).

    Raises:
        TalosError: no such file, or not a whole picture.
    """
    with needs("clip"):
        from PIL import Image

    try:
        with Image.open(path) as image:
            turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
            sixteen = image.mode == "I" and image.format in ("PNG", "PPM")  # which have no more bits
            if sixteen or image.mode.startswith("I;16"):  # Pillow would cut grey levels off at 255
                picture = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            elif image.mode in ("I", "F"):
                raise ValueError(f"mode {image.mode}: grey levels of 32 bits have no known white; save 8 or 16 bits")
            else:
                picture = image.convert("RGB")
            return np.array(picture if turn is None else picture.transpose(Image.Transpose[turn]))
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise TalosError(f"{path}: not a whole picture ({error}); replace or remove the file") from error
