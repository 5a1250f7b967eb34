"""Tiny classifiers with batches, and masks of a TaLoS shape, for tests that run steps of methods."""

import torch
from tiny_models import image_task, text_task, tiny_clip, tiny_timm, write_bert, write_t5
from torch import nn
from torch.utils._pytree import tree_map

from talos_fast import Mask, models
from talos_fast.forward import default_forward
from talos_fast.methods import Options, Request, get_method
from talos_fast.methods.masked import masked
from talos_fast.structure import parts


def load(kind: str, folder, dtype=torch.float32) -> models.Backbone:
    """ "clip", "timm", "bert" or "t5"; the latter two are written to ``folder``."""
    if kind in ("clip", "timm"):
        backbone = tiny_clip() if kind == "clip" else tiny_timm()
        backbone.encoder.to(dtype)
        return backbone
    return models.load(str(write_bert(folder) if kind == "bert" else write_t5(folder)), dtype=dtype)


def case(kind: str, folder, dtype=torch.float32):
    """A classifier and a task's batches."""
    backbone = load(kind, folder, dtype)
    task = image_task() if backbone.modality == "image" else text_task()
    return backbone.classifier(task).to(dtype), list(backbone.batches(task.train, batch_size=4))


def checkpointed(model, kind: str):
    """Gradient checkpointing, as each library's users ask for it."""
    if kind in ("clip", "timm"):
        model.encoder.set_grad_checkpointing()
    else:
        model.encoder.gradient_checkpointing_enable()
    return model


def without_dropout(model):
    """In training mode, but each forward gives the same."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def two_of_one_shape(batch) -> list:
    """A batch and another."""
    return [batch, tree_map(lambda tensor: tensor.roll(1, -1), batch)]


def mask_of(model) -> Mask:
    """Half of the entries of queries and keys, and nothing else."""
    generator = torch.Generator().manual_seed(1)
    masks: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        masks[name] = torch.zeros(p.shape, dtype=torch.bool)
        for part in parts(name, tuple(p.shape)):
            if part.kind in ("query", "key"):
                masks[name][part.rows] = torch.rand(p[part.rows].shape, generator=generator) < 0.5
    return Mask(masks)


def setup_of(model, method: str):
    """What the trainer runs, with masks of our own instead of those of a calibration or a first run."""
    request = Request(model, default_forward, 1e-3, 0.1, Options(), None)
    return masked(request, mask_of(model)) if method in ("talos", "lota") else get_method(method).prepare(request)
