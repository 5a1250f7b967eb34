"""The five methods: each against its definition, on every kind of model, interrupted and resumed."""

import copy
import math
import os
import signal

import peft
import pytest
import torch
from methods_cases import case, mask_of
from tiny_models import text_task, tiny_clip
from torch import nn
from torch.nn import functional

from talos_fast import Mask, TalosError, TaskVector, calibrate, evaluate, finetune, merge, models, search_alpha
from talos_fast.delta import SparseDelta
from talos_fast.evaluate import evaluate_along
from talos_fast.forward import default_forward
from talos_fast.linear import Linearized
from talos_fast.methods import METHODS, Options, Request, get_method
from talos_fast.methods.l_lora import lora_adapters, lora_changes
from talos_fast.methods.lota import largest_changes
from talos_fast.methods.masked import masked

EXACT = {"rtol": 1e-9, "atol": 1e-9}
LINEAR = ("linearized", "l-lora")
RATES = {"nonlinear": 1e-3, "linearized": 1e-3, "l-lora": 2e-2, "lota": 3e-3, "talos": 1e-2}


def train(model, batches, method: str, steps: int = 6, **options) -> TaskVector:
    if method == "talos" and "mask" not in options:
        options["mask"] = calibrate(model, batches, density=0.3, rounds=2, progress=False)
    options = {"lr": RATES[method], "steps": steps, "progress": False, **options}
    return finetune(model, batches, method=method, **options)


def bits(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def jacobian_product(model, batch, tangents) -> torch.Tensor:
    """J τ in float64, one reverse pass a logit."""
    parameters = dict(model.named_parameters())
    rows = []
    for logit in default_forward(model, batch).flatten():
        found = torch.autograd.grad(logit, [parameters[name] for name in tangents], retain_graph=True)
        rows.append(sum((g * t).sum() for g, t in zip(found, tangents.values(), strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_rate_is_the_papers_but_higher_where_little_can_move(method, tmp_path):
    model, batches = case("clip", tmp_path)
    few = 3e-4 if method in ("talos", "l-lora") else 1e-5
    for compat, expected in (("paper", few), ("released", 1e-5)):
        found = train(copy.deepcopy(model), batches, method, steps=1, lr=None, compat=compat)
        assert found.info["lr"] == expected


@pytest.mark.parametrize("kind", ["clip", "timm", "bert", "t5"])
def test_linearized_is_the_jacobian_product(kind, tmp_path):
    model, batches = case(kind, tmp_path, torch.float64)
    before, fast = bits(model), torch.backends.mha.get_fastpath_enabled()
    tangents = {name: 0.05 * torch.randn_like(p) for name, p in model.named_parameters()}
    line = Linearized(model.train(), lambda: tangents)
    found = default_forward(line, batches[0])
    assert model.training and torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.cuda.flash_sdp_enabled()
    value = default_forward(model.eval(), batches[0])
    expected = value + jacobian_product(model, batches[0], tangents).view_as(value)
    # T5's own code computes norms and attention in float32.
    torch.testing.assert_close(found, expected, **({"rtol": 1e-6, "atol": 1e-5} if kind == "t5" else EXACT))
    assert (expected - value).abs().max() > 1e-3
    assert same(before, bits(model))
    with pytest.raises(TalosError, match=r"coefficients \(nan,\): every one must be a finite number"):
        line.move(float("nan"))


def test_a_linearized_model_that_is_reverted_is_the_model():
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    line = Linearized.along(net, TaskVector(net, nn.Linear(4, 3)))
    line.move(0.5)
    assert not torch.equal(line(x), net(x))
    line.revert()
    assert torch.equal(line(x), net(x))


def inputs(batch) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("kind", ["clip", "bert", "t5"])
def test_the_gradient_of_linearized_training_is_the_one_of_the_definition(kind, tmp_path):
    """∂ loss(f + J (θ - θ0)) / ∂θ = Jᵀ ∂loss, also away from θ0; J from reverse passes in float64."""
    model, batches = case(kind, tmp_path, torch.float64)
    origin, model = bits(model), model.eval()
    step = {name: 0.05 * torch.randn_like(p) for name, p in origin.items()}
    moving = {name: (origin[name] + step[name]).requires_grad_() for name in origin}
    line = Linearized(model, lambda: {name: moving[name] - origin[name] for name in moving}, origin)
    logits, labels = default_forward(line, batches[0]), _labels(batches[0])
    found = torch.autograd.grad(functional.cross_entropy(logits, labels), list(moving.values()))
    value = default_forward(model, batches[0])
    shifted = (value.detach() + jacobian_product(model, batches[0], step).view_as(value)).detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(functional.cross_entropy(shifted, labels), shifted)
    expected = torch.autograd.grad(value, list(model.parameters()), cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-4, "atol": 1e-5} if kind == "t5" else EXACT))


def _labels(batch) -> torch.Tensor:
    return batch["labels"] if isinstance(batch, dict) else batch[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["clip", "timm", "bert", "t5"])
def test_every_method_lowers_its_loss_and_its_vector_is_what_was_trained(kind, method, tmp_path):
    model, batches = case(kind, tmp_path)
    base = copy.deepcopy(model)
    vector = train(model, batches, method, steps=20, weight_decay=0.0)
    assert vector.linearized == (method in LINEAR) and vector.info["method"] == method

    def loss(of) -> float:
        return sum(float(functional.cross_entropy(default_forward(of.eval(), b), _labels(b))) for b in batches)

    with torch.no_grad():
        assert loss(merge(base, [vector])) < loss(base) - 0.01
    if method not in LINEAR:
        assert same(bits(model), bits(merge(base, [vector])))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", LINEAR)
def test_addition_of_linear_vectors_is_exact(method, tmp_path):
    """f(θ0) + α Σ_t (f_t - f(θ0)) in logits, and one sweep gives the accuracies of every α."""
    model, batches = case("clip", tmp_path, torch.float64)
    base = copy.deepcopy(model)
    vectors = []
    for part in (batches[:1], batches[1:]):
        with torch.no_grad():
            model.load_state_dict(base.state_dict())
        vectors.append(train(model, part, method))
    batch, alpha = batches[0], 0.7
    with torch.no_grad():
        zero = default_forward(base, batch)
        alone = [default_forward(merge(base, [vector]), batch) - zero for vector in vectors]
        added = default_forward(merge(base, vectors, alpha=alpha), batch)
        torch.testing.assert_close(added, zero + alpha * (alone[0] + alone[1]), rtol=1e-7, atol=1e-9)
    grid = [0.0, 0.3, alpha, 1.0]
    total = vectors[0] + vectors[1]
    swept = evaluate_along(base, total, batches, grid)
    assert swept == [evaluate(merge(base, [total], alpha=a), batches) for a in grid]
    found = search_alpha(base, vectors, evaluate=[lambda m: evaluate(m, batches)] * 2, grid=grid)
    assert [trial.accuracies[0] for trial in found.trials] == [float(accuracy) for accuracy in swept]
    assert (-total).linearized and (0.5 * total).linearized
    for alpha, said in ((float("nan"), "must be a finite number"), (1e300, "give smaller coefficients")):
        with pytest.raises(TalosError, match=said):
            evaluate_along(base, 1e30 * total, batches, [0.0, alpha])


@pytest.mark.parametrize("linearized", [False, True])
def test_accuracy_along_a_vector_is_that_of_the_logits_that_forward_makes(linearized):
    """The logits are (1 - alpha, alpha), and their negatives are asked for."""
    deltas = {"weight": SparseDelta((2, 1), torch.tensor([-1.0, 1.0]))}
    vector = TaskVector.from_deltas(deltas, info={"linearized": linearized})
    base, data = nn.Linear(1, 2, bias=False), [(torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))]
    base.weight.data = torch.tensor([[1.0], [0.0]])
    found = evaluate_along(base, vector, data, [0.25, 0.75], forward=lambda model, batch: -model(batch[0]))
    assert [accuracy.correct for accuracy in found] == [1, 3]


def test_l_lora_is_the_expansion_of_peft_s_lora(tmp_path):
    """The same A0, any B: our direction against torch.func.jvp over A and B of a model that peft adapted."""
    model, batches = case("bert", tmp_path, torch.float64)
    adapters = lora_adapters(model, rank=4)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["query", "value"], lora_dropout=0.0)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    start = dict(adapted.named_parameters())
    primals, tangents = {}, {}
    for adapter in adapters:
        with torch.no_grad():
            adapter.b.normal_()
        prefix = f"base_model.model.{adapter.name.removesuffix('.weight')}"
        moves = {"A": (adapter.a, torch.randn_like(adapter.a)), "B": (torch.zeros_like(adapter.b), adapter.b)}
        for factor, (value, move) in moves.items():
            name = f"{prefix}.lora_{factor}.default.weight"
            assert start[name].shape == value.shape
            primals[name], tangents[name] = value, move.detach()
    arguments = inputs(batches[0])

    def function(factors):
        return torch.func.functional_call(adapted, factors, (), arguments)

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH), torch.no_grad():
        value, slope = torch.func.jvp(function, (primals,), (tangents,))
        parameters = dict(model.named_parameters())
        ours = Linearized(model, lambda: lora_changes(adapters, parameters, 32 / 4))(**arguments)
    torch.testing.assert_close(ours, value + slope, rtol=1e-9, atol=1e-9)
    assert slope.abs().max() > 1e-3


def test_l_lora_moves_queries_and_values_by_its_factors(tmp_path):
    """Also in a fused projection: rank at most r, keys and everything else untouched; A0 is one for all tasks."""
    model, batches = case("clip", tmp_path)
    base = bits(model)
    vector = train(model, batches, "l-lora", rank=4, lora_alpha=8.0)
    assert all(name.endswith("in_proj_weight") for name in vector) and len(vector) == 2
    for name, change in vector.to_dense().items():
        query, key, value = change.chunk(3)
        assert not key.any()
        for part in (query, value):
            assert 1 <= torch.linalg.matrix_rank(part, rtol=1e-4) <= 4
        torch.testing.assert_close(dict(model.named_parameters())[name], base[name] + change)
    assert vector.info["factor_bytes"] == 4 * 2 * 2 * 32 * 4
    first, second = lora_adapters(tiny_clip().encoder, 4), lora_adapters(tiny_clip().encoder, 4)
    assert all(torch.equal(a.a, b.a) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].a, first[1].a)
    assert all(0.9 < adapter.a.abs().max() * math.sqrt(32) <= 1 for adapter in first), "Kaiming's bound, of LoRA"


def test_what_a_mask_trains_has_its_whole_gradient_outside_of_the_steps(tmp_path):
    model, batches = case("clip", tmp_path)
    setup = masked(Request(model, default_forward, 1e-3, 0.0, Options(), None), mask_of(model))
    with setup.around():
        pass
    default_forward(model, batches[0]).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in setup.trained.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_the_weight_decay_that_is_asked_for(method, tmp_path):
    model, _ = case("clip", tmp_path)
    mask = mask_of(model)
    changes = {name: SparseDelta.between(name, torch.zeros(m.shape), m.float()) for name, m in mask.items()}
    options = {"talos": Options(mask=mask), "lota": Options(finetuned=TaskVector.from_deltas(changes), density=0.01)}
    request = Request(model, default_forward, 1e-3, 0.3, options.get(method, Options()), None)
    assert {group["weight_decay"] for group in get_method(method).prepare(request).optimizer.param_groups} == {0.3}


def test_adapters_act_by_alpha_over_rank(tmp_path):
    model, _ = case("bert", tmp_path, torch.float64)
    adapters = lora_adapters(model, 4)
    request = Request(model, default_forward, 1e-3, 0.0, Options(rank=4, lora_alpha=8.0), None)
    setup = get_method("l-lora").prepare(request)
    with torch.no_grad():
        for b in setup.trained.values():
            b.fill_(1.0)
        deltas = setup.export()
    for adapter in adapters:
        expected = 8.0 / 4 * torch.ones_like(adapter.b) @ adapter.a
        torch.testing.assert_close(deltas[adapter.name].dense()[adapter.rows], expected)


def test_lota_trains_the_largest_changes(tmp_path):
    model, batches = case("clip", tmp_path)
    start, whole = bits(model), copy.deepcopy(model)
    full = train(whole, batches, "nonlinear", lr=1e-3)
    change = torch.cat([(p - start[name]).abs().flatten() for name, p in bits(whole).items()])
    count = int(0.05 * len(change))
    alone, given = copy.deepcopy(model), copy.deepcopy(model)
    own = train(alone, batches, "lota", density=0.05, lr=1e-3)
    vector = train(given, batches, "lota", density=0.05, finetuned=full, lr=1e-3)
    assert same(bits(alone), bits(given)) and (own - vector).norm() == 0
    assert own.info["density"] == vector.info["density"] == 0.05
    moved = torch.cat([(p != start[name]).flatten() for name, p in bits(given).items()])
    threshold = change.sort(descending=True).values[count - 1]
    assert not moved[change < threshold].any()
    assert 0.9 * count <= moved.sum() <= count
    assert change[moved].min() >= threshold


def test_as_many_changes_as_are_selected_are_enough():
    net, moved = nn.Linear(4, 3), torch.eye(3, 4)
    few = TaskVector({"weight": torch.zeros(3, 4)}, {"weight": moved})
    assert torch.equal(largest_changes(net, few.deltas, 0.2, ["weight", "bias"])["weight"], moved.bool())


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_in_any_run_and_resumed_is_bit_identical(method, tmp_path):
    model, _ = case("bert", tmp_path / "bert")
    backbone = models.load(str(tmp_path / "bert"))
    loader = lambda: backbone.batches(text_task().train, batch_size=4, shuffle=True, seed=3)  # noqa: E731
    options = {"mask": calibrate(model, loader(), density=0.3, rounds=1, progress=False)} if method == "talos" else {}
    whole, calls = copy.deepcopy(model), 0
    expected = train(whole, loader(), method, **options)
    for at in (3, 8, 11) if method == "lota" else (3, 5):

        def forward(of, batch, at=at):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGINT)
            return default_forward(of, batch)

        part = copy.deepcopy(model)
        with pytest.raises(KeyboardInterrupt):
            train(part, loader(), method, forward=forward, checkpoint_dir=tmp_path / "run", **options)
    resumed = copy.deepcopy(model)
    again = train(resumed, loader(), method, checkpoint_dir=tmp_path / "run", **options)
    assert same(bits(resumed), bits(whole)) and (again - expected).norm() == 0


def test_the_flag_survives_a_file_and_vectors_of_two_kinds_do_not_mix(tmp_path):
    model, batches = case("clip", tmp_path)
    base = copy.deepcopy(model)
    line = train(model, batches, "linearized")
    model.load_state_dict(base.state_dict())
    plain = train(model, batches, "nonlinear")
    line.save_pretrained(tmp_path / "v")
    assert TaskVector.from_pretrained(tmp_path / "v").linearized
    with pytest.raises(TalosError, match="one of these task vectors is of a linearized model"):
        merge(base, [line, plain])
    with pytest.raises(TalosError, match=r"inplace=True: the vector is of a linearized model \(method linearized\)"):
        merge(base, [line], inplace=True)
    with pytest.raises(TalosError, match="finetuned=: a vector of a linearized model"):
        train(base, batches, "lota", finetuned=line)


@pytest.mark.parametrize("method, options, message", [
    ("nonlinear", {"density": 0.1}, "density= means nothing to method 'nonlinear'"),
    ("talos", {"rank": 4}, "rank= means nothing to method 'talos', which takes mask"),
    ("l-lora", {"rank": 0}, "rank=0, lora_alpha=32.0: both must be positive"),
    ("l-lora", {"lora_alpha": -1.0}, "lora_alpha=-1.0: both must be positive"),
    ("l-lora", {"lora_alpha": math.inf}, "lora_alpha=inf: both must be positive, the rank an integer, alpha finite"),
    ("l-lora", {"rank": True}, "rank=True, lora_alpha=32.0: both must be positive"),
    ("l-lora", {"lora_alpha": "8"}, "lora_alpha='8': must be a number"),
    ("lota", {"density": 2.0}, "density=2.0"),
    ("lota", {"mask": Mask({"w": torch.ones(1, dtype=torch.bool)})}, "mask= means nothing to method 'lota'"),
])  # fmt: skip
def test_options_are_used_or_refused(method, options, message, tmp_path):
    model, batches = case("clip", tmp_path)
    mask = {} if method != "talos" else {"mask": Mask({})}
    with pytest.raises(TalosError, match=message):
        finetune(model, batches, method=method, steps=1, progress=False, **mask, **options)


def test_vectors_and_models_that_do_not_suit_a_method():
    net = nn.Linear(4, 3)
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with pytest.raises(TalosError, match="adapts queries and values, and Linear has none"):
        finetune(net, data, method="l-lora", steps=1, progress=False)
    few = TaskVector({"weight": torch.zeros(3, 4)}, {"weight": torch.eye(3, 4)})
    few.base = {}
    with pytest.raises(TalosError, match="changed 3 entries, fewer than the 7 to select"):
        finetune(net, data, method="lota", finetuned=few, density=0.5, steps=1, progress=False)
    other = TaskVector({"w": torch.zeros(3)}, {"w": torch.ones(3)})
    with pytest.raises(TalosError, match="finetuned= moves 'w', which is no trainable parameter of Linear"):
        finetune(net, data, method="lota", finetuned=other, steps=1, progress=False)
    net.requires_grad_(False)
    for method in ("nonlinear", "linearized"):
        with pytest.raises(TalosError, match="nothing would train"):
            finetune(net, data, method=method, steps=1, progress=False)
