"""Gradient checkpointing and micro-batches under every method: the same gradients, and the memory they are for."""

import sys

import pytest
import torch
from conftest import ROOT
from methods_cases import case, checkpointed, setup_of, without_dropout
from torch import nn
from torch.nn import functional

from talos_fast.methods import METHODS
from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.step import Step

sys.path.insert(0, str(ROOT / "benchmarks"))

from backward import allocator_peak

KINDS = ("clip", "timm", "bert", "t5")


def gradients(setup, model, batches) -> dict[str, torch.Tensor]:
    step = Step(setup, model, functional.cross_entropy, clip=None, accumulate=len(batches))
    for batch in batches:
        step.backward(batch, "batch")
    found = {}
    for name, p in setup.trained.items():
        found[name] = p.grad.values if isinstance(p.grad, CompactGradient) else p.grad
    step.release()
    return found


def assert_same(found, expected, tolerance=1e-12):
    """Within ``tolerance`` of the norm of all of them together."""
    floor = torch.linalg.vector_norm(torch.cat([g.flatten() for g in expected.values()]))
    assert found.keys() == expected.keys() and floor > 0
    for name, gradient in expected.items():
        assert torch.linalg.vector_norm(found[name] - gradient) <= tolerance * floor, name


def move(setup) -> None:
    """Away from the start, where adapters are zero and linearized methods have no tangent."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in setup.trained.values():
            p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(kind, method, tmp_path):
    model, batches = case(kind, tmp_path, torch.float64)
    model.train()
    setup = setup_of(model, method)
    move(setup)
    runs = []
    block = next(m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m) == 2)[-1]
    first = next(m for m in block.modules() if not list(m.children()))  # Hugging Face's blocks checkpoint within them
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    torch.manual_seed(3)
    expected, plain = gradients(setup, model, batches[:1]), len(runs)
    torch.manual_seed(3)
    found = gradients(setup, checkpointed(model, kind), batches[:1])
    assert_same(found, expected)
    assert len(runs) == 3 * plain  # once, then once and again in the backward pass


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_gradients_of_the_batch(kind, method, tmp_path):
    model, batches = case(kind, tmp_path, torch.float64)
    setup = setup_of(without_dropout(checkpointed(model, kind)), method)
    move(setup)
    batch = batches[0]
    if isinstance(batch, dict):
        parts = [{key: value[half] for key, value in batch.items()} for half in (slice(2), slice(2, None))]
    else:
        parts = [tuple(value[half] for value in batch) for half in (slice(2), slice(2, None))]
    # T5's own code computes norms and attention in float32.
    assert_same(gradients(setup, model, parts), gradients(setup, model, [batch]), 1e-5 if kind == "t5" else 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_saved(method):
    """Six blocks: what is kept for the backward pass is one block's activations and the inputs of the others."""
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(32, 4, 64, 6, 2, mlp_ratio=4.0, output_dim=8)
    setup, batch = setup_of(tower.train(), method), (torch.randn(8, 3, 32, 32), torch.arange(8))
    step = Step(setup, tower, functional.cross_entropy, clip=None)
    peaks = []
    for _ in range(2):
        step.backward(batch, "batch")
        step.release()
        peaks.append(allocator_peak(lambda: step.backward(batch, "batch")))
        step.release()
        tower.set_grad_checkpointing()
    assert peaks[1] < 0.6 * peaks[0], peaks
