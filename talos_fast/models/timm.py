"""Vision models of timm: features train, the head holds the mean feature of each class."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from talos_fast.errors import TalosError, brief
from talos_fast.models.base import Backbone, Classifier
from talos_fast.models.heads import CosineHead
from talos_fast.models.images import ImagePreprocess
from talos_fast.restoring import restoring_modes
from talos_fast.tasks.base import Inputs, Task

logger = logging.getLogger("talos_fast")

IMAGES_A_CLASS = 20
"""Training images a class (at most) that the mean of a class is taken over."""

SCALE = 30.0
"""Inverse temperature of the class-mean head, near the best calibrated one (30 to 50) of an ImageNet ViT-tiny.

It is higher than that of a contrastive encoder, because the features of a classifier lie in a narrow cone."""


class TimmBackbone(Backbone):
    """A timm model without its classifier.

    There is no text tower, so the head of a task holds one direction a class: the mean of the L2-normalised features of
    up to `IMAGES_A_CLASS` training images, drawn with a fixed seed and taken before fine-tuning.

    Args:
        name: for messages.
        encoder: gives features of shape (N, D).
        preprocess: what the model was trained with.
    """

    modality = "image"

    def __init__(self, name: str, encoder: nn.Module, preprocess: ImagePreprocess) -> None:
        super().__init__(name, encoder.eval())
        self.preprocess = preprocess

    def prepare(self, inputs: Inputs) -> Tensor:
        """Images to float32 of shape (N, 3, H, W)."""
        return self.preprocess(inputs)

    def classifier(self, task: Task) -> Classifier:
        """The encoder with the class-mean head of `task`; computes the features of some training images."""
        self._check_modality(task.modality)
        head = CosineHead(self._class_means(task), SCALE).to(next(self.encoder.parameters()).dtype)
        return Classifier(self.encoder, head).eval()

    @torch.no_grad()
    def _class_means(self, task: Task) -> Tensor:
        generator = np.random.default_rng(0)
        chosen: list[int] = []
        for label, class_name in enumerate(task.class_names):
            members = np.flatnonzero(task.train.labels == label)
            if not len(members):
                raise TalosError(
                    f"task {task.name!r}: class {class_name!r} has no training image, and the head of {self.name} "
                    "is made of the mean features of each class; add images, or use a CLIP model"
                )
            chosen.extend(generator.permutation(members)[:IMAGES_A_CLASS].tolist())
        sums = torch.zeros(0)
        batches = self.batches(task.train.select(chosen), batch_size=32)
        with restoring_modes(self.encoder):
            self.encoder.eval()
            for images, labels in tqdm(batches, desc=f"{task.name}: head", disable=None, leave=False):
                features = self.encoder(images.to(next(self.encoder.parameters()))).float()
                if not sums.numel():
                    sums = features.new_zeros(task.num_classes, features.shape[-1])
                sums.index_add_(0, labels.to(features.device), functional.normalize(features, dim=-1))
        return sums  # the head normalises: sums and means have the same direction


def load(name: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> TimmBackbone:
    """Load `name`, such as "vit_tiny_patch16_224".

    Args:
        name: a name of `timm.list_models()`.
        pretrained: a .safetensors or .pth file for this model, "hub" for timm's own weights, None for random ones.
        device: where the encoder goes.
        dtype: of the encoder; weights stored in another dtype are converted.

    Raises:
        TalosError: weights that are missing, damaged, for another model, or cannot be fetched.
    """
    import timm

    try:
        encoder = timm.create_model(name, pretrained=pretrained == "hub", num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        raise TalosError(
            f"timm:{name} could not be made: {brief(error)}; check the name, and for pretrained='hub' the network"
        ) from error
    if pretrained is None:
        logger.warning("timm:%s: random weights (pretrained is neither a file nor 'hub')", name)
    elif pretrained != "hub":
        _load_weights(encoder, Path(pretrained))
    data: Any = timm.data
    config = data.resolve_model_data_config(encoder)
    squash = config["crop_mode"] == "squash"
    preprocess = ImagePreprocess(
        size=tuple(config["input_size"][1:]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        resize_mode="squash" if squash else "shortest",
        crop_fraction=config["crop_pct"],
    )
    return TimmBackbone(f"timm:{name}", encoder.to(device=device, dtype=dtype), preprocess)


def _load_weights(encoder: Any, path: Path) -> None:
    from timm.models import load_state_dict

    if not path.is_file():
        raise TalosError(f"pretrained: no file {path}; give a .safetensors or .pth file, or 'hub'")
    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # it unpickles the file, and takes what it finds for tensors by name
        raise TalosError(f"{path}: not a whole file of weights ({brief(error)}); fetch it again") from error
    # The classifier that num_classes=0 left out; a few models have two.
    heads = encoder.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    state = {name: value for name, value in state.items() if not name.startswith(tuple(f"{h}." for h in heads))}
    try:
        encoder.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise TalosError(
            f"{path}: these weights are of another model ({brief(error)}); give those of this one"
        ) from error
