"""Which parameters may be masked at all: everything but embeddings, heads and output projections, by name."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from talos_fast.errors import TalosError
from talos_fast.modules import unwrapped

FROZEN_BY_DEFAULT = (
    "*class_embedding", "*class_token", "*cls_token*", "*dist_token", "*distillation_token", "*mask_token",
    "*mask_emb", "*masked_spec_embed", "*reg_token", "*register_tokens", "*positional_embedding", "*pos_embed*",
    "*position_embedding*", "*time_embeddings", "*patch_pos", "*pixel_pos", "*relative_attention_bias*",
    "*relative_position_bias*", "*rel_pos*", "*attention_biases",
    "*token_embedding*", "*embed_tokens*", "*word_embeddings*", "*wte.weight", "*wpe.weight", "shared.weight",
    "proj", "*visual.proj", "*encoder.proj", "*text_projection*", "*visual_projection*", "*logit_scale", "*logit_bias",
    "head.*", "*.head.*", "head_dist.*", "aux_head.*", "fc.weight", "fc.bias", "score.weight", "score.bias",
    "qa_outputs.*", "classification_head.*", "cls_classifier.*", "distillation_classifier.*", "pre_classifier.*",
    "logits_proj.*", "classifier.*", "*.classifier.*", "lm_head.*", "*.lm_head.*", "*pooler.*",
)  # fmt: skip


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def patterns(given: str | Iterable[str] | None) -> list[str] | None:
    """One pattern, several or none, as a list that can be read again."""
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


def maskable_parameters(
    model: nn.Module, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
) -> dict[str, nn.Parameter]:
    """Name -> parameter, in the model's order, of what a mask may select.

    By default every parameter of attention, MLP, convolution and norm layers; `nn.Embedding` tables, class tokens,
    positions, heads and output projections stay frozen. Complex parameters, and those that do not require a gradient,
    stay frozen too.

    Args:
        model: any module; tied parameters come once, under their first name. Wrappers are looked through, see
            `unwrapped`.
        include: shell patterns of names; what they match is maskable, even if it is frozen by default, and nothing
            else is.
        exclude: shell patterns of names to leave out, after ``include``.

    Raises:
        TalosError: a pattern that matches no parameter, nothing is left, or a parameter is sharded.
    """
    model = unwrapped(model)
    include, exclude = patterns(include), patterns(exclude) or []
    names = [name for name, _ in model.named_parameters()]
    for pattern in [*(include or []), *exclude]:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TalosError(
                f"the pattern {pattern!r} matches no parameter of {type(model).__name__}; names are like {names[:3]}"
            )
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    chosen = {}
    for name, parameter in model.named_parameters():
        if include is None:
            wanted = not _matches(name, FROZEN_BY_DEFAULT) and id(parameter) not in tables
        else:
            wanted = _matches(name, include)
        if wanted and parameter.requires_grad and parameter.is_floating_point() and not _matches(name, exclude):
            chosen[name] = parameter
    for name, parameter in chosen.items():
        if type(parameter.data) is not torch.Tensor:
            raise TalosError(
                f"{name!r} is a {type(parameter.data).__name__}, not a plain tensor; calibrate a model that is neither "
                "sharded nor quantised"
            )
    if not chosen:
        raise TalosError(
            f"{type(model).__name__} has no maskable parameter among {len(names)}: all are embeddings, heads, excluded "
            "or frozen (requires_grad=False); pass include= with patterns of names"
        )
    return chosen
