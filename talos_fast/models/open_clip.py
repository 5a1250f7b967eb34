"""CLIP models of open_clip: the visual tower trains, the text tower makes zero-shot heads."""

import logging
from pathlib import Path
from typing import Any

import torch

from talos_fast.errors import TalosError, brief
from talos_fast.models.base import Backbone, Classifier, warn_of_twins
from talos_fast.models.heads import CosineHead
from talos_fast.models.images import ImagePreprocess
from talos_fast.tasks.base import Inputs, Task

logger = logging.getLogger("talos_fast")


class OpenClipBackbone(Backbone):
    """An open_clip model.

    The encoder is `model.visual`. The head of a task holds the text embeddings of its class names, made by open_clip's
    `build_zero_shot_classifier` with the task's templates, or with OpenAI's 80 ImageNet templates where it has none;
    logits are exp(logit_scale) * cosine.

    Args:
        name: for messages.
        model: `open_clip.CLIP`, `CustomTextCLIP`, or the like.
        tokenizer: takes a list of texts, returns int64 of shape (N, T); its `open_clip` one.
        preprocess: by default as the model's own `visual.preprocess_cfg` says.

    Raises:
        TalosError: a model whose visual tower does not give one vector an image.
    """

    modality = "image"

    def __init__(self, name: str, model: Any, tokenizer: Any, preprocess: ImagePreprocess | None = None) -> None:
        from open_clip.model import get_model_preprocess_cfg

        if getattr(model.visual, "output_tokens", False):
            raise TalosError(f"{name}: its visual tower returns tokens beside the image vector; use a plain CLIP model")
        super().__init__(name, model.visual)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess or ImagePreprocess.from_config(get_model_preprocess_cfg(model))

    def prepare(self, inputs: Inputs) -> torch.Tensor:
        """Images to float32 of shape (N, 3, H, W)."""
        return self.preprocess(inputs)

    def classifier(self, task: Task) -> Classifier:
        """The visual tower with the zero-shot head of `task`."""
        import open_clip

        self._check_modality(task.modality)
        templates = task.templates or open_clip.OPENAI_IMAGENET_TEMPLATES
        warn_of_twins(task, self.tokenizer(list(task.class_names)), self.name)
        # The text tower stays where it was loaded, even if a classifier moved or cast the visual one.
        scale = self.model.logit_scale.detach()
        weight = open_clip.build_zero_shot_classifier(
            self.model, self.tokenizer, task.class_names, templates, device=scale.device
        )
        head = CosineHead(weight.T, float(scale.exp())).to(next(self.encoder.parameters()))
        return Classifier(self.encoder, head).eval()


def load(name: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> OpenClipBackbone:
    """Load `name`, such as "ViT-B-32".

    Args:
        name: a name of `open_clip.list_models()`, or `hf-hub:<id>`, `local-dir:<path>` in open_clip's own notation.
        pretrained: a tag of open_clip, such as "openai", or a file of weights; None for random weights.
        device: where both towers go.
        dtype: of both towers.

    Raises:
        TalosError: an unknown tag, a file that is missing or does not fit, or weights that cannot be fetched.
    """
    import open_clip

    carries_weights = ":" in name
    if pretrained is None and not carries_weights:
        logger.warning("%s: random weights (no pretrained tag or file given)", name)
    if pretrained is not None and carries_weights:
        raise TalosError(f"pretrained: {name} carries its own weights, found {pretrained!r}; leave it out")
    tags = [] if carries_weights else open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and pretrained not in tags and not Path(pretrained).is_file():
        raise TalosError(f"pretrained: {pretrained!r} is neither a file nor a tag of {name}; its tags are {tags}")
    # OpenAI's and some other weights were trained with QuickGELU, which the plain configuration does not say.
    settings = open_clip.get_pretrained_cfg(name, pretrained) if pretrained in tags else {}
    quick_gelu = bool(settings.get("quick_gelu", False))
    try:
        model = open_clip.create_model(
            name, pretrained, device=device, force_quick_gelu=quick_gelu, pretrained_text=False
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip reshapes what a file holds before it compares: anything may be raised
        raise TalosError(
            f"open_clip:{name} with pretrained={pretrained!r} could not be loaded: {brief(error)}; "
            "check the network, or give a file of weights for exactly this model"
        ) from error
    return OpenClipBackbone(f"open_clip:{name}", model.to(dtype), tokenizer)
