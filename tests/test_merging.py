"""The merging methods: against their definitions in float64, and against peft's and mergekit's implementations."""

import math

import pytest
import torch

from talos_fast import TalosError, TaskVector, merge, merging, search_alpha
from talos_fast.delta import SparseDelta

SHAPES = {"a": (30, 40), "b": (50,), "c": (4, 3, 5), "scalar": ()}


def dense_vectors(count: int = 3, density: float = 1.0) -> list[dict[str, torch.Tensor]]:
    """Random changes of four parameters; the third vector leaves "b" alone."""
    torch.manual_seed(3)
    vectors = []
    for number in range(count):
        vector = {name: torch.randn(shape) * (torch.rand(shape) < density) for name, shape in SHAPES.items()}
        if number == 2:
            vector["b"] = torch.zeros(SHAPES["b"])
        vectors.append(vector)
    return vectors


def task_vectors(dense) -> list[TaskVector]:
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return [TaskVector(base, vector) for vector in dense]


def entries(vector: TaskVector) -> torch.Tensor:
    """All entries of a vector, float64, (N,)."""
    dense = vector.to_dense()
    return torch.cat([dense.get(n, torch.zeros(s)).reshape(-1) for n, s in SHAPES.items()]).double()


def rows(dense) -> torch.Tensor:
    """All entries of several vectors, float64, (T, N)."""
    return torch.stack([torch.cat([v[n].reshape(-1) for n in SHAPES]) for v in dense]).double()


def trimmed(values: torch.Tensor, density: float) -> torch.Tensor:
    kept = torch.zeros_like(values)
    for row, target in zip(values, kept, strict=True):
        largest = row.abs().argsort(descending=True)[: int(density * len(row))]
        target[largest] = row[largest]
    return kept


def elected(values: torch.Tensor) -> torch.Tensor:
    """TIES's election and disjoint mean, entry by entry, in Python."""
    merged = []
    for column in values.T.tolist():
        sign = math.copysign(1.0, sum(column)) if sum(column) else 0.0
        agreeing = [value for value in column if value * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64)


@pytest.fixture(params=[1.0, 0.3], ids=["dense", "sparse"])
def dense(request):
    return dense_vectors(density=request.param)


def close(vector: TaskVector, expected: torch.Tensor) -> None:
    torch.testing.assert_close(entries(vector), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weights", [None, [1.0, -0.5, 2.0]])
def test_ties_by_its_definition(dense, weights):
    values = rows(dense) * torch.tensor(weights or [1.0] * 3).double()[:, None]
    merged = merging.combine(task_vectors(dense), weights, "ties", density=0.2)
    close(merged, elected(trimmed(values, 0.2)))
    assert all((delta.values != 0).all() for delta in merged.deltas.values()), "zeros are stored"
    close(merging.ties(task_vectors(dense), density=1.0), elected(rows(dense)))


def test_ties_where_the_changes_balance():
    base = {"w": torch.zeros(3)}
    vectors = [TaskVector(base, {"w": torch.tensor(w)}) for w in ([1.0, 1.0, 0.0], [-1.0, 3.0, 0.0], [0.0, -2.0, 5.0])]
    assert merging.ties(vectors, density=1.0).to_dense()["w"].tolist() == [0.0, 2.0, 5.0]
    alone = {"w": torch.zeros(1)}
    nearly = [TaskVector(alone, {"w": torch.tensor([w])}) for w in (2.0**30, 2.0, -(2.0**30))]
    assert merging.ties(nearly, density=1.0).to_dense()["w"].tolist() == [2.0**29], "float32 loses the 2"


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_against_peft(dense, method):
    """peft trims tensor by tensor, and elects by the unweighted mass: the same with equal weights."""
    peft = pytest.importorskip("peft.utils.merge_utils")
    merged = getattr(merging, method)(task_vectors(dense), density=0.2, scope="per_tensor").to_dense()
    for name in ("a", "b", "c"):  # peft keeps nothing of a tensor of one entry
        stacked = [vector[name] for vector in dense]
        expected = getattr(peft, method)(stacked, torch.ones(3), density=0.2)
        torch.testing.assert_close(merged.get(name, torch.zeros(SHAPES[name])), expected)


@pytest.mark.parametrize("method, ours, theirs", [
    ("ties", {"density": 0.2, "scope": "per_tensor"}, {"density": 0.2}),
    ("breadcrumbs", {"beta": 0.85, "gamma": 0.01}, {"density": 0.14, "gamma": 0.01, "normalize": False}),
    ("task_arithmetic", {}, {"normalize": False}),
])  # fmt: skip
def test_against_mergekit(dense, method, ours, theirs):
    api = pytest.importorskip("mergekit.merge_methods.api")
    merged = merging.combine(task_vectors(dense), None, method, **ours).to_dense()
    names = {"ties": ("a", "b", "c", "scalar"), "breadcrumbs": ("a",)}.get(method, SHAPES)  # where no count is rounded
    for name in names:
        models = [torch.zeros(SHAPES[name]), *(vector[name] for vector in dense)]
        expected = api.merge_tensors(models, method, base_index=0, parameters={"weight": 1.0, **theirs})
        torch.testing.assert_close(merged.get(name, torch.zeros(SHAPES[name])), expected)


def test_dare_by_its_definition(dense):
    vectors, density = task_vectors(dense), 0.3
    alone = [merging.dare_linear([vector], density=density, seed=5) for vector in vectors]
    for vector, thinned in zip(vectors, alone, strict=True):
        before, after = entries(vector), entries(thinned)
        kept = after != 0
        torch.testing.assert_close(after[kept], before[kept] / density, rtol=1e-6, atol=0)
        moving = int((before != 0).sum())
        assert abs(int(kept.sum()) - density * moving) < 4 * math.sqrt(moving * density * (1 - density))
    again, other = (merging.dare_linear(vectors[:1], density=density, seed=seed) for seed in (5, 6))
    assert torch.equal(entries(again), entries(alone[0])) and not torch.equal(entries(other), entries(alone[0]))
    close(merging.dare_linear(vectors, density=1.0), rows(dense).sum(0))


def test_dare_keeps_the_expectation_and_draws_for_each_vector():
    base = {"w": torch.zeros(1000)}
    twins = [TaskVector(base, {"w": torch.ones(1000)})] * 2
    merged = merging.dare_linear(twins, density=0.5).to_dense()["w"]
    assert set(merged.tolist()) == {0.0, 2.0, 4.0}, "both vectors lost the same entries"
    assert abs(merged.mean() - 2.0) < 0.15


def test_dare_ties_against_peft_given_the_same_draws(dense, monkeypatch):
    peft = pytest.importorskip("peft.utils.merge_utils")
    from talos_fast.merging.dare import drop_and_rescale

    vectors = task_vectors(dense)
    thinned = [vector.to_dense() for vector in drop_and_rescale(vectors, 0.4, seed=1)]
    merged = {method: getattr(merging, method)(vectors, density=0.4, seed=1) for method in ("dare_linear", "dare_ties")}
    for name, shape in SHAPES.items():
        drawn = iter([vector.get(name, torch.zeros(shape)) for vector in thinned] * 2)
        monkeypatch.setattr(peft, "random_pruning", lambda *_, drawn=drawn, **__: next(drawn))
        for method, vector in merged.items():
            expected = getattr(peft, method)([vector[name] for vector in dense], torch.ones(3), density=0.4)
            torch.testing.assert_close(vector.to_dense().get(name, torch.zeros(shape)), expected)


def test_dare_does_not_depend_on_the_order_of_the_tensors(tmp_path):
    (vector,) = task_vectors(dense_vectors(1))
    vector.save_pretrained(tmp_path)
    loaded = TaskVector.from_pretrained(tmp_path)
    turned = TaskVector.from_deltas(dict(reversed(vector.deltas.items())), base=vector.base)
    first, second = (merging.dare_linear([v], seed=2) for v in (loaded, turned))
    assert torch.equal(entries(first), entries(second))


def test_breadcrumbs_by_its_definition(dense):
    beta, gamma = 0.6, 0.05
    expected = []
    for name in SHAPES:
        total = torch.zeros(dense[0][name].numel(), dtype=torch.float64)
        for vector in dense:
            row = vector[name].reshape(-1).double()
            rank = row.abs().argsort(stable=True).argsort()
            n = len(row)
            total += row * ((rank >= int(beta * n)) & (rank < n - int(gamma * n)))
        expected.append(total)
    close(merging.breadcrumbs(task_vectors(dense), beta=beta, gamma=gamma), torch.cat(expected))
    close(merging.breadcrumbs(task_vectors(dense), beta=0, gamma=0), rows(dense).sum(0))


def test_breadcrumbs_cut_the_share_as_it_is_written():
    vector = TaskVector({"w": torch.zeros(100)}, {"w": torch.arange(1.0, 101.0)})
    assert merging.breadcrumbs([vector], beta=0.29, gamma=0).nnz == 71


@pytest.mark.parametrize("lam", [0.2, 0.6, 1.0])
def test_tall_masks_and_consensus_by_their_definitions(dense, lam):
    values = rows(dense)
    total = values.sum(0)
    claimed = values.abs() >= lam * (total - values).abs()
    vectors = task_vectors(dense)
    for mask, wanted in zip(merging.tall_masks(vectors, lam=lam), claimed, strict=True):
        reconstructed = sum(vectors).restrict(mask)
        close(reconstructed, total * wanted)
        assert mask.base == vectors[0].base and mask.info["lam"] == lam
    for agreement in (1, 2, 3):
        merged = merging.consensus(vectors, lam=lam, agreement=agreement)
        close(merged, total * (claimed.sum(0) >= agreement))


def test_consensus_is_not_the_released_rule():
    """The missing absolute value would claim this entry for both tasks."""
    base = {"w": torch.zeros(1)}
    small, large = (TaskVector(base, {"w": torch.tensor([w])}) for w in (-0.1, -2.0))
    masks = merging.tall_masks([small, large], lam=0.2)
    assert [bool(mask["w"]) for mask in masks] == [False, True]


def test_nothing_is_claimed_where_others_cancel():
    base = {"w": torch.zeros(2)}
    vectors = [TaskVector(base, {"w": torch.tensor(w)}) for w in ([1.0, 0.0], [-1.0, 0.0], [0.0, 2.0])]
    assert merging.tall_masks(vectors)[2]["w"].tolist() == [False, True]
    assert merging.tall_masks(vectors[:2], lam=1.0)[0]["w"].tolist() == [True, False], "as much as the others is enough"


def test_restrict_keeps_exactness():
    base = {"w": torch.tensor([1.0, 1.0, 1e8])}
    tuned = {"w": torch.tensor([1e-20, 2.0, 1.0])}
    kept = TaskVector(base, tuned).restrict({"w": torch.tensor([True, False, True])})
    assert kept.apply_to(base)["w"].tolist() == [tuned["w"][0].item(), 1.0, 1.0]
    with pytest.raises(TalosError, match=r"'w': the mask has shape \(2,\), the vector \(3,\)"):
        kept.restrict({"w": torch.tensor([True, False])})
    assert len(kept.restrict({})) == 0


def test_merge_and_search_alpha_take_the_method():
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4)
    start = base.weight.detach().clone()
    vectors = []
    for _ in range(2):
        tuned = torch.nn.Linear(5, 4)
        vectors.append(TaskVector(base, tuned))
    merged = merging.ties(vectors, density=0.5)
    edited = merge(base, vectors, method="ties", density=0.5, alpha=0.3)
    torch.testing.assert_close(edited.weight, start + 0.3 * merged.to_dense()["weight"])
    seen = []
    judge = lambda model: float(seen.append(model.weight.detach().clone()) is None)  # noqa: E731
    search_alpha(base, vectors, evaluate=[judge, judge], grid=[0.3], method="ties", density=0.5)
    assert torch.equal(seen[-1], edited.weight) and torch.equal(base.weight, start)


@pytest.mark.parametrize("method, options", [
    ("ties", {"density": 0.2, "scope": "global"}), ("magnitude_prune", {"density": 0.2, "scope": "global"}),
    ("dare_linear", {"density": 0.1, "seed": 0}), ("dare_ties", {"density": 0.1, "seed": 0}),
    ("breadcrumbs", {"beta": 0.85, "gamma": 0.01}), ("consensus", {"lam": 0.4, "agreement": 2}),
])  # fmt: skip
def test_defaults_are_those_that_are_documented(method, options):
    vectors = task_vectors(dense_vectors())
    plain, named = (merging.combine(vectors, method=method, **given) for given in ({}, options))
    assert torch.equal(entries(plain), entries(named))


def test_refusals():
    vectors = task_vectors(dense_vectors(2))
    with pytest.raises(TalosError, match="method='averaging': choose one of task_arithmetic, ties"):
        merging.combine(vectors, method="averaging")
    with pytest.raises(TalosError, match="method 'ties' has no option 'lam'; it has density, scope"):
        merging.combine(vectors, method="ties", lam=1)
    with pytest.raises(TalosError, match="'task_arithmetic' has no option 'density'; it has no options"):
        merging.combine(vectors, density=1)
    for method in ("ties", "dare_ties", "dare", "magnitude_prune"):
        with pytest.raises(TalosError, match="density=0"):
            merging.combine(vectors, method=method, density=0)
    for method, option, said in (
        ("ties", {"density": "abc"}, "density='abc': an option of method 'ties'; give a number"),
        ("magnitude_prune", {"scope": "tensor"}, "scope='tensor': .* give one of global, per_tensor"),
        ("dare", {"seed": 0.5}, "seed=0.5: .* give an integer"),
        ("dare_ties", {"seed": -1}, r"seed=-1: must be an integer, from 0 to 2\*\*63 - 1"),
        ("breadcrumbs", {"beta": None}, "beta=None: "),
        ("consensus", {"agreement": True}, "agreement=True: "),
    ):
        with pytest.raises(TalosError, match=said):
            merging.combine(vectors, method=method, **option)
    with pytest.raises(TalosError, match="beta=0.9, gamma=0.1"):
        merging.breadcrumbs(vectors, beta=0.9, gamma=0.1)
    with pytest.raises(TalosError, match="beta=0.5, gamma=-0.1"):
        merging.breadcrumbs(vectors, beta=0.5, gamma=-0.1)
    for lam in (0, math.nan):
        with pytest.raises(TalosError, match=f"lam={lam}"):
            merging.tall_masks(vectors, lam=lam)
    for agreement in (0, 3):
        with pytest.raises(TalosError, match=f"agreement={agreement} of 2 tasks"):
            merging.consensus(vectors, agreement=agreement)
    with pytest.raises(TalosError, match="no task vector to merge"):
        merging.ties([])
    odd = TaskVector.from_deltas({"a": SparseDelta((2,), torch.ones(2))})
    with pytest.raises(TalosError, match=r"'a': vectors of shapes \(30, 40\) and \(2,\)"):
        merging.ties([vectors[0], odd])
    with pytest.raises(TalosError, match=r"'a': vectors of shapes \(2,\) and \(3,\) cannot be combined"):
        odd + TaskVector.from_deltas({"a": SparseDelta((3,), torch.ones(3))})
