"""The tiny CLIP of the demo: open_clip's own classes, a custom configuration, weights inside this package.

`tiny_clip.json` holds the configuration, the vocabulary and how the weights were made; `tiny_clip.safetensors` the
weights in fp16. `python -m talos_fast.demo.pretrain` makes both.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from talos_fast.demo.tokenizer import WordTokenizer
from talos_fast.errors import TalosError, needs

if TYPE_CHECKING:
    from talos_fast.models.open_clip import OpenClipBackbone

FOLDER = Path(__file__).parent
CONFIG_NAME, WEIGHTS_NAME = "tiny_clip.json", "tiny_clip.safetensors"
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def load_backbone(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, folder: Path = FOLDER
) -> "OpenClipBackbone":
    """The pre-trained tiny CLIP, through the same class as every open_clip model.

    Args:
        device: where both towers go.
        dtype: of both towers.
        folder: where `tiny_clip.json` and `tiny_clip.safetensors` are; by default those of the package.

    Raises:
        TalosError: a file that is missing, damaged, or does not fit the other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from talos_fast.models.images import ImagePreprocess
    from talos_fast.models.open_clip import OpenClipBackbone

    config = _read_config(folder / CONFIG_NAME)
    model = build(config["architecture"])
    tokenizer = WordTokenizer(config["words"], config["architecture"]["text_cfg"]["context_length"])
    weights = folder / WEIGHTS_NAME
    try:
        model.load_state_dict(load_file(weights), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise TalosError(f"{weights}: not the weights that {CONFIG_NAME} describes ({error}); reinstall") from error
    size = config["architecture"]["vision_cfg"]["image_size"]
    preprocess = ImagePreprocess((size, size), MEAN, STD)
    return OpenClipBackbone("tiny", model.to(device=device, dtype=dtype), tokenizer, preprocess)


def build(architecture: dict[str, Any]) -> Any:
    """An `open_clip.CLIP` with random weights, float32, on the CPU."""
    with needs("demo"):
        from open_clip import CLIP
    return CLIP(**architecture)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["architecture"]["text_cfg"]["context_length"], config["words"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TalosError(f"{path}: not the description of a tiny CLIP ({error!r}); reinstall") from error
    return config
