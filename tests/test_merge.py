"""merge and search_alpha: exact edits, the choice of α by its definition, and a base that comes back."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from talos_fast import TalosError, TaskVector, interference, merge, search_alpha
from talos_fast.alpha_search import AlphaSearch, choose_alpha
from talos_fast.delta import SparseDelta
from talos_fast.edit import Edit


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def base(request) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 4).to(request.param)


def tuned(base: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.weight += torch.randn(4, 5).to(base.weight.dtype) * (torch.rand(4, 5) < 0.4)
    return other


def test_addition_and_subtraction(base):
    a, b = (TaskVector(base, tuned(base, seed)) for seed in (1, 2))
    start = base.weight.detach().clone()
    edited = merge(base, [a, b], alpha=0.4, weights=[1.0, -2.0])
    delta = {vector: vector.to_dense()["weight"].double() for vector in (a, b)}
    expected = (start.double() + 0.4 * (delta[a] - 2 * delta[b])).to(start.dtype)
    torch.testing.assert_close(
        edited.weight, nn.Parameter(expected), rtol=1e-6 if start.dtype == torch.float32 else 1e-2, atol=0
    )
    assert torch.equal(base.weight, start)
    assert torch.equal(merge(base, [a]).weight, tuned(base, 1).weight)
    assert merge(base, [-a], inplace=True) is base and not torch.equal(base.weight, start)


def test_search_alpha_for_addition(base):
    """Accuracies made up from the weights, so that the optimum is known: each task likes its own half of its vector."""
    vectors = [TaskVector(base, tuned(base, seed)) for seed in (1, 2)]
    start = base.weight.detach().clone()
    total = (vectors[0] + vectors[1]).to_dense()["weight"]
    seen = []

    def position(model):
        moved = (model.weight.detach().float() - start.float()).flatten()
        return float(moved @ total.flatten() / total.flatten().square().sum())

    def judge(model):
        seen.append(position(model))
        return 0.9 - abs(position(model) - 0.35)

    found = search_alpha(base, vectors, evaluate=[judge, judge])
    assert found.alpha == pytest.approx(0.35)
    assert len(found.trials) == 21 and found.best.alpha == found.alpha and "smallest" in found.why
    assert torch.equal(base.weight, start)
    assert len(found.references) == 2 and found.best.normalized[0] == found.best.accuracies[0] / found.references[0]
    assert found.to_json()["alpha"] == found.alpha
    assert AlphaSearch.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_each_task_is_held_against_its_own_vector(base):
    own = [tuned(base, seed) for seed in (1, 2)]
    judges = [
        lambda model, one=one, best=best: best * torch.equal(model.weight, one.weight)
        for one, best in zip(own, (0.5, 0.75), strict=True)
    ]
    found = search_alpha(base, [TaskVector(base, one) for one in own], evaluate=judges, grid=[0.0])
    assert found.references == (0.5, 0.75)


class Writes(TorchDispatchMode):
    """Counts the entries that operators write into the storages of some tensors."""

    def __init__(self, tensors):
        self.storages = {t.untyped_storage().data_ptr() for t in tensors}
        self.written = 0
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and value.untyped_storage().data_ptr() in self.storages:
                indexed = func is torch.ops.aten.index_put_.default
                self.written += args[1][0].numel() if indexed else value.numel()
        return func(*args, **(kwargs or {}))


def test_a_sweep_writes_the_selected_entries_and_nothing_else(base):
    """Three α and the way back: four times the entries of the sum, and twice those of each vector alone."""
    vectors = [TaskVector(base, tuned(base, seed)) for seed in (1, 2)]
    union = sum(vectors).nnz
    assert union < base.weight.numel()
    with Writes(base.parameters()) as writes:
        search_alpha(base, vectors, evaluate=[lambda model: 0.5] * 2, grid=[0.1, 0.5, 1.0])
    assert writes.written == 4 * union + 2 * sum(vector.nnz for vector in vectors)


def test_an_edit_along_two_directions(base):
    a, b = (TaskVector(base, tuned(base, seed)) for seed in (1, 2))
    start = base.weight.detach().clone()
    edit = Edit(base, a.deltas, b.deltas)
    edit.move(1.0, 0.0)
    assert torch.equal(base.weight, tuned_from(base, start, a))
    edit.move(-0.7, 2.5)
    dense = [v.to_dense()["weight"].double() for v in (a, b)]
    expected = (start.double() - 0.7 * dense[0] + 2.5 * dense[1]).to(start.dtype)
    torch.testing.assert_close(base.weight.detach(), expected)
    edit.revert()
    assert torch.equal(base.weight, start)
    with pytest.raises(TalosError, match="1 coefficients for 2 directions"):
        edit.move(1.0)


def tuned_from(base, start, vector):
    return vector.apply_to({"weight": start.clone(), "bias": base.bias.detach()}, check_base=False)["weight"]


def test_a_base_in_another_dtype_is_asked_for_by_name(base):
    """Its bits differ, so it counts as another base until it is said to be meant."""
    vector, wide = TaskVector(base, tuned(base, 1)), copy.deepcopy(base).double()
    with pytest.raises(TalosError, match="another base"):
        merge(wide, [vector])
    edited = merge(wide, [vector], check_base=False)
    assert edited.weight.dtype is torch.float64
    torch.testing.assert_close(edited.weight, wide.weight + vector.to_dense()["weight"].double())


def test_ties_take_the_smallest_alpha(base):
    vector = TaskVector(base, tuned(base, 1))
    assert search_alpha(base, [vector], evaluate=lambda model: 0.5).alpha == 0.0
    found = search_alpha(base, [vector], evaluate=lambda model: 0.5, grid=[0.9, 0.3, 0.9])
    assert found.alpha == 0.3 and [trial.alpha for trial in found.trials] == [0.3, 0.9]


def test_search_alpha_for_negation(base):
    vector = -TaskVector(base, tuned(base, 1))
    start = base.weight.detach().clone()
    scale = float(vector.to_dense()["weight"].norm())

    def alpha_of(model):
        return float((model.weight.detach().float() - start.float()).norm()) / scale

    found = search_alpha(
        base, [vector], evaluate=lambda model: 0.8 - 0.5 * alpha_of(model),
        control=lambda model: 0.6 - 0.095 * alpha_of(model),
    )  # fmt: skip
    assert found.alpha == pytest.approx(0.3)
    assert found.best.control >= 0.95 * 0.6 and found.control == pytest.approx(0.6)
    loose = search_alpha(
        base, [vector], evaluate=lambda model: 0.8 - 0.5 * alpha_of(model),
        control=lambda model: 0.6 - 0.095 * alpha_of(model), control_floor=0.9,
    )  # fmt: skip
    assert loose.alpha == pytest.approx(0.6)
    assert torch.equal(base.weight, start)


def test_what_is_forgotten_is_held_against_the_base(base):
    start, vector = base.weight.detach().clone(), -TaskVector(base, tuned(base, 1))
    found = search_alpha(
        base, [vector], evaluate=lambda model: 0.8 if torch.equal(model.weight, start) else 0.4,
        control=lambda model: 0.6, control_floor=1.0, grid=[0.0, 1.0],
    )  # fmt: skip
    assert (found.alpha, found.references, found.best.normalized) == (1.0, (0.8,), (0.5,))


def test_an_evaluation_that_fails_leaves_the_base(base):
    start = base.weight.detach().clone()

    def failing(model):
        if not torch.equal(model.weight, start):
            raise RuntimeError("out of memory")
        return 0.5

    with pytest.raises(RuntimeError, match="out of memory"):
        search_alpha(base, [TaskVector(base, tuned(base, 1))], evaluate=failing)
    assert torch.equal(base.weight, start)


def test_refusals(base):
    vector = TaskVector(base, tuned(base, 1))
    with pytest.raises(TalosError, match="no task vector to merge"):
        merge(base, [])
    with pytest.raises(TalosError, match="2 weights for 1 task vectors"):
        merge(base, [vector], weights=[1, 2])
    with pytest.raises(TalosError, match=r"coefficients \(nan,\): every one must be a finite number"):
        merge(base, [vector], alpha=float("nan"))
    with pytest.raises(TalosError, match=r"weights \[inf\]: every one must be a finite number"):
        merge(base, [vector], weights=[float("inf")])
    with pytest.raises(TalosError, match="found one task vector; give a list, such as"):
        merge(base, vector)
    with pytest.raises(TalosError, match="a task vector times nan: the factor must be a finite number"):
        vector * float("nan")
    with pytest.raises(TalosError, match="an evaluation gave NaN; there is no best alpha"):
        search_alpha(base, [vector], evaluate=lambda m: float("nan"))
    with pytest.raises(TalosError, match="method='average'"):
        merge(base, [vector], method="average")
    with pytest.raises(TalosError, match="another base"):
        merge(tuned(base, 3), [vector])
    with pytest.raises(TalosError, match="2 evaluators for 1"):
        search_alpha(base, [vector], evaluate=[float, float])
    with pytest.raises(TalosError, match="grid is empty"):
        search_alpha(base, [vector], evaluate=lambda m: 0.5, grid=[])
    with pytest.raises(TalosError, match="no alpha of the grid keeps the control"):
        worse = iter([0.9, 0.1])
        search_alpha(base, [vector], evaluate=lambda m: 0.5, control=lambda m: next(worse), grid=[0.5])


def test_a_search_is_shown_task_by_task(base):
    vectors = [TaskVector(base, tuned(base, seed)) for seed in (1, 2)]
    found = search_alpha(base, vectors, evaluate=[lambda model: 0.5, lambda model: 0.25], grid=[0.5, 1.0])
    assert str(found).splitlines() == [
        f"alpha 0.5: {found.why}", "task 0: 50.00%, 1.000 of 50.00%", "task 1: 25.00%, 1.000 of 25.00%",
    ]  # fmt: skip
    assert found.lines(["cars", "dtd"])[1].startswith("dtd: 25.00%")
    negated = search_alpha(base, [-vectors[0]], evaluate=lambda m: 0.5, control=lambda m: 0.75, grid=[0.5])
    assert str(negated).splitlines()[-1] == "control: 75.00%, before 75.00%"


def test_what_judges_is_a_function(base):
    vector = TaskVector(base, tuned(base, 1))
    with pytest.raises(TalosError, match="give functions model -> accuracy"):
        search_alpha(base, [vector], evaluate=[[1, 2]])
    with pytest.raises(TalosError, match="found a float; give functions"):
        search_alpha(base, [vector], evaluate=lambda model: 0.5, control=0.95)


def test_any_numbers_and_iterables_are_taken(base):
    vectors = [TaskVector(base, tuned(base, seed)) for seed in (1, 2)]
    expected = merge(base, vectors, alpha=0.5, weights=[0.5, 0.25]).weight
    found = merge(base, iter(vectors), alpha=torch.tensor(0.5), weights=torch.tensor([0.5, 0.25]))
    assert torch.equal(found.weight, expected)
    for wrong in (["cars-vector"], {"cars": vectors[0]}):
        with pytest.raises(TalosError, match="vectors: found '?cars"):
            merge(base, wrong)
    with pytest.raises(TalosError, match="alpha='search': give a number"):
        merge(base, vectors, alpha="search")


def test_a_search_takes_another_base_where_it_is_told_to(base):
    vector, other = TaskVector(base, tuned(base, 1)), tuned(base, 2)
    with pytest.raises(TalosError, match="another base"):
        search_alpha(other, [vector], evaluate=lambda model: 1.0)
    assert search_alpha(other, [vector], evaluate=lambda model: 1.0, check_base=False).alpha == 0.0
    with pytest.raises(TalosError, match="control_floor=95: give a fraction"):
        search_alpha(base, [-vector], evaluate=lambda model: 1.0, control=lambda model: 1.0, control_floor=95)


def test_one_vector_is_no_list_of_vectors(base):
    vector = TaskVector(base, tuned(base, 1))
    for call in (
        lambda: merge(base, vector),
        lambda: search_alpha(base, vector, evaluate=lambda model: 1.0),
        lambda: interference(vector),
    ):
        with pytest.raises(TalosError, match="give a list"):
            call()


def test_names_of_a_tied_parameter_meet_before_vectors_are_combined():
    base = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(base[0].weight)
    base[1].weight = base[0].weight
    first, second = (
        TaskVector.from_deltas({name: SparseDelta((2, 2), torch.tensor(values))})
        for name, values in (("0.weight", [3.0, 1.0, 0.0, 0.0]), ("1.weight", [-1.0, 1.0, 0.0, 0.0]))
    )
    merged = merge(base, [first, second], method="ties", density=1.0)
    assert merged[0].weight.tolist() == merged[1].weight.tolist() == [[3.0, 1.0], [0.0, 0.0]]
    seen = []
    judge = lambda model: float(seen.append(model[1].weight.detach().clone()) is None)  # noqa: E731
    search_alpha(base, [first, second], evaluate=[judge] * 2, grid=[1.0], method="ties", density=1.0)
    assert torch.equal(seen[-1], merged[1].weight)


def test_what_is_kept_is_measured_where_a_linear_vector_forgets():
    base = nn.Linear(2, 2, bias=False)
    nn.init.ones_(base.weight)
    line = TaskVector.from_deltas({"weight": SparseDelta((2, 2), torch.ones(4))}, info={"linearized": True})
    total = lambda model: float(model(torch.ones(1, 2)).detach().sum())  # noqa: E731
    found = search_alpha(base, [-line], evaluate=total, control=total, control_floor=0.0, grid=[0.0, 0.125])
    assert found.trials[1].control == found.trials[1].accuracies[0] == 3.5


def test_means_that_are_equal_are_ties_in_whatever_order_the_tasks_come():
    accuracies = [(0.3, 0.2, 0.1), (0.1, 0.2, 0.3)]
    first, second = (one + two + three for one, two, three in accuracies)  # since Python 3.12 `sum` rounds once
    assert second > first
    assert choose_alpha([0.1, 0.2], accuracies, [None, None], (1.0, 1.0, 1.0), None).alpha == 0.1


def test_of_equals_the_smallest_forgets():
    assert choose_alpha([0.1, 0.2], [(0.3,), (0.3,)], [0.6, 0.6], (0.8,), 0.6).alpha == 0.1


def test_what_forgets_is_chosen_by_the_accuracy_itself_and_not_by_its_share():
    assert choose_alpha([0.1, 0.2], [(0.9, 0.1), (0.4, 0.5)], [0.6, 0.6], (0.9, 0.1), 0.6).alpha == 0.2


def test_what_was_never_right_has_a_share_of_nothing():
    assert choose_alpha([0.1, 0.2], [(0.0,), (0.0,)], [None, None], (0.0,), None).best.normalized == (0.0,)


@pytest.mark.parametrize("controls, references", [([0.6, float("nan")], (0.8,)), ([0.6, 0.6], (float("nan"),))])
def test_nan_is_refused_wherever_it_comes_from(controls, references):
    with pytest.raises(TalosError, match="an evaluation gave NaN"):
        choose_alpha([0.0, 1.0], [(0.5,), (0.4,)], controls, references, 0.6)
