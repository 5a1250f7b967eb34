"""Training and evaluation of what is out of the ordinary: modes of torch, models that watch or write, odd forwards."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from methods_cases import case, checkpointed, without_dropout
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from talos_fast import Mask, TalosError, evaluate, finetune, merge, profile, search_alpha
from talos_fast.methods import METHODS


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches(count: int = 4) -> list:
    generator = torch.Generator().manual_seed(1)
    x = [torch.randn(8, 6, generator=generator) for _ in range(count)]
    return [(one, one[:, :3].argmax(1)) for one in x]


def mask_of(model: nn.Module) -> Mask:
    generator = torch.Generator().manual_seed(1)
    return Mask({name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters()})


def tuned(model: nn.Module, method: str, given=None, **options):
    """A few steps; the vector."""
    if method == "talos":
        options["mask"] = mask_of(model)
    return finetune(model, given or batches(), method=method, progress=False, **{"steps": 4, "lr": 1e-2, **options})


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_linearized_models_know_their_direction_in_inference_mode():
    base = net()
    vector = tuned(copy.deepcopy(base), "linearized", lr=0.3)
    module, (x, _) = merge(base, [vector]), batches()[0]
    with torch.no_grad():
        wanted = module(x)
    with torch.inference_mode():
        assert torch.equal(module(x), wanted) and not torch.allclose(base.eval()(x), wanted)

    @torch.inference_mode()
    def accuracy(model):
        return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in batches())

    def plain(model):
        return len(batches()) * float(evaluate(model, batches()))

    found = search_alpha(base, [vector], evaluate=accuracy)
    assert found.alpha == search_alpha(base, [vector], evaluate=plain).alpha > 0


@pytest.mark.parametrize("method", [name for name in METHODS if name != "l-lora"])
def test_batches_of_inference_mode_are_trained_on(method):
    with torch.inference_mode():
        given = [(x.clone(), y.clone()) for x, y in batches()]
    models = net(), net()
    tuned(models[0], method, given)
    tuned(models[1], method)
    assert same(*models)


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: pickle.loads(pickle.dumps(m))])
def test_a_merged_linearized_model_can_be_cast_and_pickled(change):
    base = net()
    module, (x, _) = merge(base, [tuned(copy.deepcopy(base), "linearized", lr=0.3)]), batches()[0]
    before = module(x)
    changed = change(module)
    torch.testing.assert_close(changed(x.to(next(changed.parameters()))).float(), before)


@pytest.mark.parametrize("compat", ["paper", "released"])
def test_a_forward_that_ignores_its_model_is_refused(compat, tmp_path):
    """The stand-in of a linearized model must be what it calls."""
    model, given = case("bert", tmp_path)

    def ignoring(_, batch):
        return model(batch["input_ids"], batch["attention_mask"])

    for method in ("linearized", "l-lora"):
        if compat == "paper":
            with pytest.raises(TalosError, match="did not call the model that it was given"):
                tuned(model, method, given, forward=ignoring)
    if compat == "released":  # here the model itself holds what trains
        vectors = [tuned(copy.deepcopy(model), "l-lora", given, compat=compat) for _ in range(1)]
        vectors.append(tuned(model, "l-lora", given, compat=compat, forward=ignoring))
        assert all(torch.equal(t, vectors[1].to_dense()[name]) for name, t in vectors[0].to_dense().items())


def test_a_forward_may_compile_its_model_itself():
    models, compiled = (net(), net()), {}

    def forward(model, batch):
        return compiled.setdefault(model, torch.compile(model, backend="eager"))(batch[0])

    tuned(models[0], "linearized", forward=forward)
    tuned(models[1], "linearized")
    assert same(*models)


def gpt2():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


def texts() -> list:
    ids = torch.randint(1, 50, (3, 4, 7), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one, "attention_mask": torch.ones_like(one), "labels": torch.arange(4) % 3} for one in ids]


@pytest.mark.parametrize("method", ["linearized", "l-lora"])
def test_linear_methods_on_checkpointed_layers_without_linear_maps(method):
    """GPT-2's are ``addmm``: that a forward runs again must be known without F.linear."""
    models = gpt2(), gpt2()
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in models:
        tuned(model, method, texts())
    assert same(*models)
    assert profile(models[1], texts(), method=method, rounds=1, warmup=0).to_json()


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("method", ["linearized", "l-lora"])
def test_linear_methods_are_profiled_under_checkpointing(kind, method, tmp_path):
    model, given = case(kind, tmp_path)
    assert profile(checkpointed(without_dropout(model), kind), given, method=method, rounds=1, warmup=0).to_json()


@pytest.mark.parametrize("method", ["linearized", "l-lora"])
def test_linear_methods_say_that_checkpoints_must_not_be_reentrant(method):
    model = gpt2()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TalosError, match="use_reentrant=False"):
        tuned(model, method, texts())
    with pytest.raises(TalosError, match="use_reentrant=False"):
        profile(model, texts(), method=method, rounds=1, warmup=0)


@pytest.mark.parametrize("trained", [["0.weight"], ["3.weight"], ["0.weight", "0.bias", "3.weight", "3.bias"]])
def test_a_checkpoint_of_other_parameters_is_refused(trained, tmp_path):
    model = net()
    for name in ("0.bias", "3.bias"):
        model.get_parameter(name).requires_grad_(False)
    tuned(model, "nonlinear", checkpoint_dir=tmp_path)
    other = net()
    for name, p in other.named_parameters():
        p.requires_grad_(name in trained)
    with pytest.raises(TalosError, match="of a run with trained="):
        tuned(other, "nonlinear", checkpoint_dir=tmp_path)


def test_a_checkpoint_of_the_released_code_is_refused(tmp_path):
    tuned(net(), "talos", checkpoint_dir=tmp_path, compat="released")
    with pytest.raises(TalosError, match="of a run with compat='released'"):
        tuned(net(), "talos", checkpoint_dir=tmp_path)


class Prototypes(nn.Module):
    """A head of means that move while it trains, and are used in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.register_buffer("means", torch.randn(3, 6))

    def forward(self, x):
        rows = self.first(x)
        with torch.no_grad():
            self.means.mul_(0.5).add_(rows[:3].float())
        return F.linear(rows, self.means)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_buffers_that_move_are_cast_as_they_are(amp, compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, plain = Prototypes(), Prototypes()
    tuned(model, "nonlinear", amp=amp, compile=compile, warmup=0, schedule="constant", clip=None, weight_decay=0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    for x, y in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            logits = plain(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.first.weight, plain.first.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_buffers_are_kept(layout):
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            self.register_buffer("edges", torch.eye(8).to_sparse(layout=layout))

        def forward(self, x):
            return torch.sparse.mm(self.edges, self.out(x))

    for method in ("nonlinear", "lota", "talos"):
        model = Graph()
        edges = model.edges
        assert tuned(model, method).nnz and model.edges is edges


@pytest.mark.parametrize("method", ["nonlinear", "talos"])
def test_hooks_of_parameters_are_called(method):
    model, shapes = net(), []
    before = model[0].weight.detach().clone()
    model[0].weight.register_hook(lambda gradient: shapes.append(tuple(gradient.shape)) or gradient * 0)
    tuned(model, method, weight_decay=0.0)
    assert shapes == [(8, 6)] * 4 and torch.equal(model[0].weight, before)
    assert not torch.equal(model[3].weight, net()[3].weight)


@pytest.mark.parametrize("method", ["nonlinear", "lota", "talos"])
def test_a_layer_under_vmap_trains(method):
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.out, self.mapped = nn.Linear(6, 6), nn.Linear(6, 3), True

        def forward(self, x):
            return self.out(torch.vmap(self.first)(x) if self.mapped else self.first(x))

    models = Mapped(), Mapped()
    models[1].mapped = False
    for model in models:
        tuned(model, method)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


def shuffled(generator: torch.Generator | None = None) -> DataLoader:
    x = torch.cat([x for x, _ in batches()])
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 5, shuffle=True, generator=generator)


def test_the_seed_is_that_of_a_loaders_own_generator_too():
    loader, models = shuffled(torch.Generator().manual_seed(7)), [net() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        tuned(model, "nonlinear", loader, seed=seed)
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_profile_draws_nothing():
    model, loader = net(), shuffled()
    before = torch.get_rng_state()
    profile(model, loader, method="nonlinear", rounds=1, warmup=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_buffer_that_is_filled_meanwhile_is_empty_again():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            self.register_buffer("mean", None)

        def forward(self, x):
            if self.mean is None:
                self.mean = x.mean(0)
            return self.out(x - self.mean)

    model = Lazy()
    tuned(model, "nonlinear")
    assert model.mean is None


@pytest.mark.parametrize("call, said", [
    (lambda: tuned(net(), "nonlinear", loss=nn.CrossEntropyLoss(reduction="none")), r"the loss has shape \(8,\)"),
    (lambda: tuned(gpt2(), "l-lora", texts(), rank=2.0), "both must be positive, the rank an integer"),
    (lambda: profile(net(), batches(), method="nonlinear", rounds=1.5), "rounds=1.5, warmup=2: give integers"),
    (lambda: tuned(net().to("meta"), "nonlinear"), "on the meta device, without numbers"),
    (lambda: evaluate(net().to("meta"), batches()), "on the meta device, without numbers"),
])  # fmt: skip
def test_slips_are_named(call, said):
    with pytest.raises(TalosError, match=said):
        call()
