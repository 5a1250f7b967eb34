"""`compat="released"`: each method against a plain loop of the released code's formulas, in float64."""

import copy
import math

import peft
import pytest
import torch
from tiny_models import image_task, text_task, tiny_clip, tiny_timm, write_bert, write_t5
from torch import nn
from torch.nn import functional

from talos_fast import TalosError, TaskVector, calibrate, finetune, merge, models
from talos_fast.batch import labels_of
from talos_fast.forward import default_forward
from talos_fast.methods import Options, Request, get_method
from talos_fast.methods.l_lora import lora_adapters
from talos_fast.methods.released import ScoredAdamW
from talos_fast.sensitivity.selection import maskable_parameters

STEPS, LR, DECAY = 4, 0.01, 0.3
RAW = {f"encoder.{name}" for name in ("class_embedding", "positional_embedding", "proj")}


def case(kind: str, folder):
    if kind in ("t5", "bert"):
        write = write_t5 if kind == "t5" else write_bert
        backbone, task = models.load(str(write(folder)), dtype=torch.float64), text_task()
    else:
        backbone, task = tiny_clip() if kind == "clip" else tiny_timm(), image_task()
    model = backbone.classifier(task).double()
    for module in model.modules():  # dropout draws from one generator in finetune, from another in the loops below
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model, list(backbone.batches(task.train, batch_size=4))


def train(model, batches, method: str, **options):
    return finetune(
        model, batches, method=method, compat="released", lr=LR, weight_decay=DECAY, steps=STEPS, schedule="constant",
        warmup=0, clip=0.5, progress=False, **options,
    )  # fmt: skip


def adapt_w(model, batches, scores, forward=default_forward) -> None:
    """The released optimizer, over (tensor, score) pairs; clipped by the norm of whole gradients."""
    tensors = [tensor for tensor, _ in scores]
    first, second = ([torch.zeros_like(p) for p in tensors] for _ in range(2))
    for n, batch in enumerate(batches * STEPS, 1):
        if n > STEPS:
            return
        loss = functional.cross_entropy(forward(model.train(), batch), labels_of(batch, ""))
        gradients = torch.autograd.grad(loss, tensors)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        with torch.no_grad():
            for (p, s), g, m, v in zip(scores, gradients, first, second, strict=True):
                g = g * min(1.0, 0.5 / (norm + 1e-6))
                p *= 1 - s * LR * DECAY
                m += 0.1 * (g - m)
                v += 0.001 * (g * g - v)
                p -= s * LR / (1 - 0.9**n) * m / (v.sqrt() / math.sqrt(1 - 0.999**n) + 1e-8)


def close(found, expected) -> None:
    expected = dict(expected.named_parameters())
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-8, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind, soft", [("clip", 0.1), ("t5", None)])
def test_what_the_released_lota_did_is_said(kind, soft, tmp_path):
    model, batches = case(kind, tmp_path)
    info = train(model, batches, "lota").info
    assert (info["compat"], info.get("soft"), info["density"]) == ("released", soft, 0.1)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_talos_trains_raw_parameters_densely_and_clips_by_the_whole_norm(kind, tmp_path):
    model, batches = case(kind, tmp_path)
    reference, raw = copy.deepcopy(model), RAW if kind == "clip" else set()
    mask = calibrate(model, batches, density=0.2, rounds=2, estimator="sampled-logit", progress=False)
    vector = train(model, batches, "talos", mask=mask)
    scores = [
        (p, torch.ones_like(p) if name in raw else mask[name].to(p))
        for name, p in reference.named_parameters()
        if name in raw or (name in mask and mask[name].any())
    ]
    adapt_w(reference, batches, scores)
    close(model, reference)
    moved = vector.mask()
    assert all(moved[name].all() for name in raw) and vector.info["compat"] == "released"
    assert all(not (moved[name] & ~mask[name]).any() for name in moved if name not in raw)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_lota_is_soft_on_vision_and_hard_on_language(kind, tmp_path):
    model, batches = case(kind, tmp_path)
    full = finetune(copy.deepcopy(model), batches, method="nonlinear", lr=LR, steps=STEPS, progress=False)
    reference, maskable = copy.deepcopy(model), maskable_parameters(model)
    change = {name: full.to_dense()[name].abs() for name in maskable}
    count = int(0.1 * sum(value.numel() for value in change.values()))
    threshold = torch.cat([value.flatten() for value in change.values()]).sort(descending=True).values[count - 1]
    train(model, batches, "lota", finetuned=full)
    low = 0.1 if kind == "clip" else 0.0
    scores = []
    for name, p in reference.named_parameters():
        if name in change:
            score = (change[name] >= threshold).to(p) * (1 - low) + low
            scores += [(p, score)] if score.any() else []
        elif name in RAW:
            scores.append((p, torch.ones_like(p)))
    adapt_w(reference, batches, scores)
    close(model, reference)


def test_l_lora_on_language_is_peft_s_lora_with_a_fixed_a_and_training_base_weights(tmp_path):
    model, batches = case("t5", tmp_path)
    adapters = lora_adapters(model, 4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q", "v"], lora_dropout=0.0)
    reference = peft.get_peft_model(copy.deepcopy(model), config)
    parameters, trained = dict(reference.named_parameters()), []
    for adapter in adapters:
        prefix = f"base_model.model.{adapter.name.removesuffix('.weight')}"
        parameters[f"{prefix}.lora_A.default.weight"].data.copy_(adapter.a)
        trained += [parameters[f"{prefix}.lora_B.default.weight"], parameters[f"{prefix}.base_layer.weight"]]
    for p in trained:
        p.requires_grad_(True)
    vector = train(model, batches, "l-lora", rank=4, lora_alpha=8.0)
    adapt_w(reference, batches, [(p, 1.0) for p in trained])
    close(model, reference.merge_and_unload())
    assert not vector.linearized and set(vector) == {adapter.name for adapter in adapters}


def test_l_lora_on_vision_trains_all_of_attention_and_multiplies_by_alpha(tmp_path):
    """q = W_q x + b_q + 32 B A0 x, and v; A0 is Xavier-uniform / 4; projections, out-projections and biases train."""
    model, batches = case("timm", tmp_path)
    base, reference = copy.deepcopy(model), copy.deepcopy(model)
    adapters = {adapter.name: [] for adapter in lora_adapters(reference, 16)}
    for adapter in lora_adapters(reference, 16):
        xavier = math.sqrt(6 / (16 + 32)) / 4
        b = torch.zeros(32, 16, dtype=torch.float64, requires_grad=True)
        adapters[adapter.name].append((adapter.a * math.sqrt(32) * xavier, b))
    parameters = dict(reference.named_parameters())
    trained = [p for name, p in parameters.items() if ".attn." in name]
    for name, factors in adapters.items():

        def adapted(module, inputs, output, factors=factors):
            (a_q, b_q), (a_v, b_v) = factors
            x = inputs[0]
            q, k, v = output.chunk(3, -1)
            return torch.cat([q + 32 * x @ a_q.T @ b_q.T, k, v + 32 * x @ a_v.T @ b_v.T], -1)

        reference.get_submodule(name.removesuffix(".weight")).register_forward_hook(adapted)
        trained += [b for _, b in factors]
    vector = train(model, batches, "l-lora")
    adapt_w(reference, batches, [(p, 1.0) for p in trained])
    with torch.no_grad():
        expected = default_forward(reference.eval(), batches[0])
        torch.testing.assert_close(default_forward(model.eval(), batches[0]), expected, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(default_forward(merge(base, [vector]), batches[0]), expected, rtol=1e-6, atol=1e-8)
    assert set(vector) == {name for name in parameters if ".attn." in name}


@pytest.mark.parametrize("compat", ["paper", "released"])
@pytest.mark.parametrize(
    "kind, method", [("clip", "l-lora"), ("t5", "l-lora"), ("clip", "lota"), ("clip", "linearized")]
)
def test_nothing_that_is_frozen_trains(kind, method, compat, tmp_path):
    model, batches = case(kind, tmp_path)
    for name, p in model.named_parameters():
        p.requires_grad_("blocks.1." in name or "block.1." in name)
    vector = finetune(model, batches, method=method, compat=compat, lr=LR, steps=1, progress=False)
    assert set(vector) and all("block" in name and ".1." in name for name in vector)


def test_l_lora_on_language_trains_no_bias(tmp_path):
    vector = train(*case("bert", tmp_path), "l-lora")
    assert {name.split(".", 5)[-1] for name in vector} == {"self.query.weight", "self.value.weight"}


def test_scored_adamw_with_scores_of_one_is_adamw():
    start, gradient = torch.randn(50), torch.randn(50)
    first, second = (nn.Parameter(start.clone()) for _ in range(2))
    ones = ScoredAdamW({first: torch.ones(50)}, lr=LR, weight_decay=DECAY)
    plain = torch.optim.AdamW([second], lr=LR, weight_decay=DECAY)
    for _ in range(3):
        for p, optimizer in ((first, ones), (second, plain)):
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(first, second)


def test_refusals(tmp_path):
    model, batches = case("clip", tmp_path)
    with pytest.raises(TalosError, match="compat='old': choose 'paper' or 'released'"):
        finetune(model, batches, compat="old", steps=1, progress=False)
    with pytest.raises(TalosError, match="rank=0, lora_alpha=32.0: both must be positive"):
        train(model, batches, "l-lora", rank=0)
    moved = copy.deepcopy(model)
    moved.encoder.positional_embedding.data += 1.0  # which the released code does not choose among
    with pytest.raises(TalosError, match="finetuned= changed 0 entries"):
        train(model, batches, "lota", finetuned=TaskVector(model, moved), density=1e-3)
    assert get_method("nonlinear", "released") is get_method("nonlinear")


def test_l_lora_trains_in_the_model_s_order():
    """Checkpoints and ranks count on it, and a set of names has another order in each process."""
    model = tiny_clip().encoder
    trained = (
        get_method("l-lora", "released").prepare(Request(model, default_forward, 1.0, 0.0, Options(), None)).trained
    )
    base = [name for name in trained if not name.endswith(":]")]
    assert len(base) > 6 and base == [name for name, _ in model.named_parameters() if name in base]
