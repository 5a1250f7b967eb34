"""Hugging Face's gradient checkpointing stops where nothing below trains, and is as it was afterwards."""

import pytest
import torch
from methods_cases import case, checkpointed

from talos_fast import Mask, finetune
from talos_fast.gradient_checkpointing import is_checkpointed_block, lean_checkpointing


def upper_mask(model) -> Mask:
    """All queries of the upper of two layers."""
    return Mask({
        name: torch.full(p.shape, "layer.1." in name and "query" in name) for name, p in model.named_parameters()
    })  # fmt: skip


def state(model):
    """What `lean_checkpointing` may change."""
    configs = [getattr(m, "config", None) for m in model.modules()]
    flags = [(getattr(m, "gradient_checkpointing", None), list(m._forward_hooks.items())) for m in model.modules()]
    return flags, [getattr(config, "use_cache", None) for config in configs]


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_caches_are_off_inside(kind, tmp_path):
    """A layer that checkpoints would warn of them in each pass, which torch.compile cannot trace."""
    model, _ = case(kind, tmp_path)
    checkpointed(model, kind)
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    configs = [layer.config for layer in layers if hasattr(layer, "config")]
    assert configs
    for config in configs:
        config.use_cache = True
    with lean_checkpointing(model):
        assert not any(config.use_cache for config in configs)
    assert all(config.use_cache for config in configs)


def runs_in(model, steps) -> list[int]:
    """How often each layer ran while ``steps()`` was."""
    counts = [0, 0]
    hooks = [
        layer.attention.register_forward_pre_hook(lambda *_, n=n: counts.__setitem__(n, counts[n] + 1))
        for n, layer in enumerate(model.encoder.encoder.layer)
    ]
    steps()
    for hook in hooks:
        hook.remove()
    return counts


def test_what_no_layer_below_trains_is_not_run_again(tmp_path):
    model, batches = case("bert", tmp_path)
    mask = upper_mask(model)
    checkpointed(model, "bert")
    assert runs_in(model, lambda: finetune(model, batches, mask=mask, steps=2, progress=False)) == [2, 4]


@pytest.mark.parametrize("method", ["talos", "nonlinear"])
def test_the_vector_is_that_of_a_model_without_checkpointing(method, tmp_path):
    vectors = []
    for is_on in (False, True):
        torch.manual_seed(0)
        model, batches = case("bert", tmp_path, torch.float64)
        masks = {"mask": upper_mask(model)} if method == "talos" else {}
        if is_on:
            checkpointed(model, "bert")
        vectors.append(finetune(model, batches, method=method, steps=3, lr=1e-2, progress=False, **masks))
    plain, found = (vector.deltas for vector in vectors)
    assert plain.keys() == found.keys() and plain
    for name, delta in plain.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_all_of_it_is_brought_back(kind, tmp_path):
    model, _ = case(kind, tmp_path)
    embedding = model.encoder.get_input_embeddings()
    embedding.register_forward_hook(lambda *_: None)
    checkpointed(model, kind)
    embedding.register_forward_hook(lambda *_: None)
    before = state(model)
    with pytest.raises(KeyError), lean_checkpointing(model):
        assert state(model) != before and len(embedding._forward_hooks) == 2
        raise KeyError
    assert state(model) == before and len(embedding._forward_hooks) == 3
    model.encoder.disable_input_require_grads()  # its handles still find their hooks
    assert len(embedding._forward_hooks) == 2


def test_reentrant_checkpointing_keeps_what_it_needs(tmp_path):
    """Without an input that requires a gradient it would give none."""
    model, batches = case("bert", tmp_path)
    mask = upper_mask(model)
    model.encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    before = state(model)
    with lean_checkpointing(model):
        assert state(model) == before
    vector = finetune(model, batches, mask=mask, steps=2, lr=1e-2, progress=False)
    assert all(delta.dense().any() for delta in vector.deltas.values())


def test_models_of_others_are_left_alone(tmp_path):
    """One that has a flag of that name, and says nothing of how it checkpoints, alone or beside one that does."""
    other, known = torch.nn.Linear(2, 2), checkpointed(case("bert", tmp_path)[0], "bert")
    other.gradient_checkpointing = True
    for model in (other, torch.nn.Sequential(known, other)):
        before = state(model)
        with lean_checkpointing(model):
            assert state(model) == before


def test_a_block_checkpoints_once_it_is_asked_to(tmp_path):
    model = case("bert", tmp_path)[0]
    assert not any(map(is_checkpointed_block, model.modules()))
    assert sum(map(is_checkpointed_block, checkpointed(model, "bert").modules())) == 2


def test_without_checkpointing_an_embedding_keeps_its_hook(tmp_path):
    """As of adapters, which may train by it."""
    model = case("bert", tmp_path)[0]
    model.encoder.enable_input_require_grads()
    before = state(model)
    with lean_checkpointing(model):
        assert state(model) == before


def test_hooks_that_are_new_stay_and_peft_s_goes(tmp_path):
    model = checkpointed(case("bert", tmp_path)[0], "bert")
    embedding = model.encoder.get_input_embeddings()
    embedding.register_forward_hook(make_inputs_require_grad)
    mine = [embedding.register_forward_hook(lambda *_, n=n: None) for n in range(2)]
    before = list(embedding._forward_hooks)
    with lean_checkpointing(model):
        assert list(embedding._forward_hooks) == before[2:]
        mine[0].remove()
        new = embedding.register_forward_hook(lambda *_: None)
    assert list(embedding._forward_hooks) == [*before[:2], before[3], new.id]


def make_inputs_require_grad(module, inputs, output):
    """By the name that peft gives it."""
    output.requires_grad_(True)
