"""The models of the paper's cost table at their true size, with random weights, a batch, and masks of a real shape.

Time and memory do not depend on the values of weights and pixels; what a mask looks like they do depend on, so its
densities are those of masks calibrated on real models (`shapes.QUERY_DENSITY`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from shapes import DENSITY, KEY_DENSITY, QUERY_DENSITY, random_mask, talos_mask
from torch import nn

from talos_fast import Mask
from talos_fast.batch import Batch
from talos_fast.models import Classifier
from talos_fast.models.heads import ChoiceHead, CosineHead
from talos_fast.models.t5 import T5Choices

CLASSES = 100
CHOICES, CHOICE_TOKENS = 2, 4


@dataclass(frozen=True)
class Spec:
    """A model and the batch it is measured on.

    Args:
        encoder: makes the network.
        task: (network, batch size) -> the classifier, the batch, and the batch in words.
        cuda_batch: inputs a batch on a GPU, the paper's.
        cpu_batch: and on a CPU.
        clip: the paper's largest gradient norm; None where it does not clip.
        dense: what the released code trains densely beside the mask, since no maskable module owns it.
        soft: the score of what LoTA does not select, in the released code.
    """

    encoder: Callable[[], nn.Module]
    task: Callable[[nn.Module, int], tuple[nn.Module, Batch, str]]
    cuda_batch: int
    cpu_batch: int
    clip: float | None
    dense: tuple[str, ...] = ()
    soft: float = 0.0


@dataclass(frozen=True)
class Workload:
    """A built model.

    Args:
        model: on its device, in training mode.
        batch: inputs and labels.
        talos, lota: masks of 10 %.
        spec: what it was built from.
        about: shapes, in words (JSON).
    """

    model: nn.Module
    batch: Batch
    talos: Mask
    lota: Mask
    spec: Spec
    about: dict[str, Any]


def _tower(name: str, config: dict[str, Any] | None = None) -> nn.Module:
    """The visual tower of an open_clip model; a text tower of the true size would cost memory for nothing."""
    import open_clip

    settings = config or open_clip.get_model_config(name)
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
    tower: nn.Module = open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], text).visual
    return tower


def _t5(**config: int) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    network: nn.Module = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **config))
    return network


def _images(tower: Any, size: int) -> tuple[nn.Module, Batch, str]:
    model = Classifier(tower, CosineHead(torch.randn(CLASSES, tower.output_dim), 100.0))
    side = tower.image_size[0]
    batch = torch.randn(size, 3, side, side), torch.randint(CLASSES, (size,))
    return model, batch, f"{size} images of {side}², {CLASSES} classes"


def _texts(network: Any, size: int, tokens: int = 128) -> tuple[nn.Module, Batch, str]:
    vocabulary = network.config.vocab_size
    choices = torch.randint(2, vocabulary, (CHOICES, CHOICE_TOKENS))
    batch = {
        "input_ids": torch.randint(2, vocabulary, (size, tokens)),
        "attention_mask": torch.ones(size, tokens, dtype=torch.long),
        "labels": torch.randint(CHOICES, (size,)),
    }
    words = f"{size} texts of {tokens} tokens, {CHOICES} choices of {CHOICE_TOKENS} tokens"
    return T5Choices(network, ChoiceHead(choices, network.config.pad_token_id)), batch, words


RAW = ("encoder.class_embedding", "encoder.positional_embedding", "encoder.proj")
TINY = {"embed_dim": 32, "vision_cfg": {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}}
TINY_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
LARGE_T5 = {"vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_heads": 16}

SPECS = {
    "ViT-B-32": Spec(partial(_tower, "ViT-B-32"), _images, 128, 8, 1.0, RAW, 0.1),
    "ViT-L-14": Spec(partial(_tower, "ViT-L-14"), _images, 128, 1, 1.0, RAW, 0.1),
    "T5-Large": Spec(partial(_t5, **LARGE_T5), _texts, 64, 1, None),
    "smoke": Spec(partial(_tower, "smoke", TINY), _images, 4, 4, 1.0, RAW, 0.1),
    "smoke-T5": Spec(partial(_t5, **TINY_T5), partial(_texts, tokens=8), 4, 4, None),
}


def build(name: str, size: int, device: torch.device) -> Workload:
    """The model called ``name`` with a batch of ``size``, the same each time.

    Raises:
        ImportError: open_clip or transformers is not installed.
    """
    torch.manual_seed(0)
    spec = SPECS[name]
    with device:
        model, batch, inputs = spec.task(spec.encoder(), size)
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    talos, lota = Mask(talos_mask(shapes, generator)), Mask(random_mask(shapes, generator))
    about = {
        "model": name, "weights": "random", "inputs": inputs, "batch": size, "clip": spec.clip,
        "parameters": sum(p.numel() for p in model.parameters()), "selected": talos.selected,
        "mask": f"queries {QUERY_DENSITY}, keys {KEY_DENSITY} of each block, scattered; nothing else",
        "lota_mask": f"{DENSITY} of all entries, scattered",
    }  # fmt: skip
    return Workload(model.train(), batch, talos, lota, spec, about)


def bytes_needed(name: str, method: str, variant: str, baselines: int) -> int:
    """Roughly what measuring a method takes, activations not counted.

    In float32 of every parameter: the model, two bool masks, the moments of each full fine-tuning beside it, a gradient
    and what foreach holds of a step; and of the method's own a gradient and two moments, for linearized fine-tuning the
    start and the direction too, for a dense masked optimizer its scores. What trains few entries is taken for one copy.

    Raises:
        ImportError: open_clip or transformers is not installed.
    """
    own = {"nonlinear": 3.0, "linearized": 5.0, "lota": 5.0 if variant == "paper" else 1.5}.get(method, 1.0)
    beside = 2.0 * baselines + 2.0 if baselines else 0.0
    if method == "nonlinear" and baselines:
        own = 0.0  # it is one of those
    return int((1.5 + beside + own) * parameter_bytes(name))


@cache
def parameter_bytes(name: str) -> int:
    """Of the encoder in float32, which is not made for it."""
    with torch.device("meta"):
        return sum(p.nbytes for p in SPECS[name].encoder().parameters())


def bytes_free(device: torch.device) -> int | None:
    """Memory that a new process could have; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
