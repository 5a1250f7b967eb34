"""Interference, function localization and disentanglement: against dense definitions, and the pictures of each."""

import copy
import json

import pytest
import torch
from tiny_models import image_task, text_task, tiny_clip, tiny_timm, write_bert, write_t5
from torch import nn

import talos_fast as talos
from talos_fast import Mask, TalosError, TaskVector, models, plots
from talos_fast.along import moved
from talos_fast.disentanglement import GRID, disentanglement_error
from talos_fast.forward import default_forward
from talos_fast.localization import accuracy_matrix, activation_matrix, directional_derivative

NAMES = ("a", "b", "c")


def vectors(density: float = 0.4) -> tuple[list[TaskVector], list[torch.Tensor]]:
    """Three vectors over two tensors, and all their entries in float64; the third moves one tensor only."""
    torch.manual_seed(1)
    base = {"w": torch.zeros(20, 30), "v": torch.zeros(40)}
    made, dense = [], []
    for number in range(3):
        tuned = {name: torch.randn_like(t) * (torch.rand_like(t) < density) for name, t in base.items()}
        if number == 2:
            tuned["v"] = torch.zeros(40)
        made.append(TaskVector(base, tuned, info={"task": NAMES[number]}))
        dense.append(torch.cat([t.reshape(-1) for t in tuned.values()]).double())
    return made, dense


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_interference_by_its_definition(density):
    made, dense = vectors(density)
    report = talos.interference(made)
    assert report.names == NAMES
    total = sum(float(d.square().sum()) for d in dense)
    for i, a in enumerate(dense):
        assert report.entries[i] == int((a != 0).sum())
        assert report.norms[i] == pytest.approx(float(a.norm()))
        assert report.norm_shares[i] == pytest.approx(float(a.square().sum()) / total)
        for j, b in enumerate(dense):
            shared, either = (a != 0) & (b != 0), (a != 0) | (b != 0)
            conflicts = int((a * b < 0).sum())
            assert report.cosine[i][j] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-12)
            assert report.overlap[i][j] == pytest.approx(int(shared.sum()) / int(either.sum()))
            assert report.sign_conflict[i][j] == pytest.approx(conflicts / int(shared.sum()))
            assert report.shared_norm[i][j] == pytest.approx(float(a[shared].square().sum() / a.square().sum()))
            assert report.cosine[i][j] == pytest.approx(made[i].cosine(made[j]))
            assert report.overlap[i][j] == pytest.approx(made[i].overlap(made[j])["total"])


def test_interference_does_not_depend_on_the_block(monkeypatch):
    import sys

    made, _ = vectors()
    whole = talos.interference(made)
    monkeypatch.setattr(sys.modules["talos_fast.interference"], "BLOCK", 7)
    blocks = talos.interference(made)
    for field in ("cosine", "overlap", "sign_conflict", "shared_norm"):
        torch.testing.assert_close(torch.tensor(getattr(blocks, field)), torch.tensor(getattr(whole, field)))


def test_interference_as_table_and_json():
    made, _ = vectors()
    report = talos.interference({"cars": made[0], "dtd": made[1]})
    lines = str(report).splitlines()
    assert len(lines) == 3 and lines[2].startswith(f"| cars, dtd | {report.cosine[0][1]:.4f} |")
    content = json.loads(json.dumps(report.to_json()))
    assert content["names"] == ["cars", "dtd"] and content["overlap"][0][1] == report.overlap[0][1]
    apart = TaskVector({"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.0])})
    other = TaskVector({"w": torch.zeros(2)}, {"w": torch.tensor([0.0, 3.0])})
    nothing = talos.interference([apart, other], names=["x", "y"])
    assert nothing == talos.interference({"a": apart, "b": other}, names=["x", "y"])
    assert nothing.overlap[0][1] == nothing.sign_conflict[0][1] == nothing.shared_norm[0][1] == 0.0
    assert nothing.norm_shares == pytest.approx((0.1, 0.9))
    with pytest.raises(TalosError, match="1 names for 2 task vectors"):
        talos.interference(made[:2], names=["x"])
    with pytest.raises(TalosError, match="no task vector"):
        talos.interference([])
    with pytest.raises(TalosError, match="different bases"):
        talos.interference([apart, TaskVector({"w": torch.ones(2)}, {"w": torch.zeros(2)})])


def test_a_row_holds_the_figures_of_its_columns():
    report = talos.interference(vectors()[0])
    figures = (report.cosine[0][1], report.overlap[0][1], report.sign_conflict[0][1])
    shares = f"{report.shared_norm[0][1]:.4f}, {report.shared_norm[1][0]:.4f}"
    assert report.rows()[0] == ("a, b", *(f"{figure:.4f}" for figure in figures), shares)


def wiggled(model: nn.Module, seed: int, density: float = 0.3) -> TaskVector:
    """A vector of a few small changes of every parameter."""
    torch.manual_seed(seed)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = {name: p + 0.05 * torch.randn_like(p) * (torch.rand_like(p) < density) for name, p in base.items()}
    return TaskVector(base, tuned)


KINDS = {
    "open_clip": lambda folder: tiny_clip(),
    "timm": lambda folder: tiny_timm(),
    "bert": lambda folder: models.load(f"hf:{write_bert(folder)}"),
    "t5": lambda folder: models.load(f"t5:{write_t5(folder)}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_along_a_vector_is_the_difference_quotient(kind, tmp_path):
    """In double precision, on every kind of model; fast paths and modes are as before."""
    torch.manual_seed(0)
    backbone = KINDS[kind](tmp_path)
    backbone.encoder.double()
    task = image_task() if backbone.modality == "image" else text_task()
    model = backbone.classifier(task).double()
    batch = next(iter(backbone.batches(task.test, batch_size=6)))
    vector = wiggled(model, 2)
    model.train()
    fast = torch.backends.mha.get_fastpath_enabled()
    slopes = directional_derivative(model, vector, batch, default_forward)
    assert model.training and torch.backends.mha.get_fastpath_enabled() == fast
    model.eval()
    # T5 computes norms and softmaxes in fp32 whatever its dtype, so a small step would only measure rounding.
    step, tolerance = (1e-2, 5e-3) if kind == "t5" else (1e-4, 1e-5)
    ends = []
    for sign in (1, -1):
        with moved(model, vector, sign * step), torch.no_grad():
            ends.append(default_forward(model, batch))
    assert slopes.abs().max() > 100 * tolerance
    torch.testing.assert_close(slopes, (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=tolerance)


def test_matrices_of_localization():
    """Two tasks that read two outputs of one linear map: a vector of one row acts on one task."""
    torch.manual_seed(0)
    base = nn.Linear(3, 4, bias=False).double()

    def vector(rows: slice) -> TaskVector:
        tuned = nn.Linear(3, 4, bias=False).double()
        tuned.weight.data = base.weight.data.clone()
        tuned.weight.data[rows] += 1.0
        return TaskVector(base, tuned)

    both = [vector(slice(0, 2)), vector(slice(2, 4))]
    start = base.weight.detach().clone()
    judges = [lambda m, rows=rows: (m.weight - start)[rows].mean().item() for rows in (slice(0, 2), slice(2, 4))]
    assert accuracy_matrix(base, both, judges, alpha=0.5).tolist() == [[0.5, 0.0], [0.0, 0.5]]
    assert torch.equal(base.weight, start)
    inputs = [torch.randn(5, 3).double(), torch.randn(2, 3).double()]
    tasks = [(base, [(x, torch.zeros(len(x)).long()) for x in inputs])] * 2
    halves = [lambda model, batch, part=part: model(batch[0])[:, part] for part in (slice(0, 2), slice(2, 4))]
    everything = torch.cat(inputs).sum(-1).abs().mean()
    for column, forward in enumerate(halves):
        found = activation_matrix(both, tasks[:1], forward=forward)[:, 0]
        expected = torch.zeros(2).double()
        expected[column] = everything
        torch.testing.assert_close(found, expected)
    with pytest.raises(TalosError, match="task 0 has no batch"):
        activation_matrix(both, [(base, [])])
    with pytest.raises(TalosError, match="another base"):
        accuracy_matrix(nn.Linear(3, 4, bias=False).double(), both, judges)


def test_activations_are_those_of_the_base():
    base, batches = nn.Linear(5, 4), [(torch.randn(2, 5), torch.zeros(2).long())]
    with pytest.raises(TalosError, match="another base"):
        activation_matrix([wiggled(base, 1)], [(nn.Linear(5, 4), batches)])


def test_logits_that_move_against_each_other_do_not_cancel():
    base, tuned = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    tuned.weight.data = base.weight.data + torch.tensor([[1.0], [-1.0]])
    x = torch.randn(5, 3)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        found = activation_matrix([TaskVector(base, tuned)], [(base, [(x, torch.zeros(5).long())])])
        assert not torch.backends.mha.get_fastpath_enabled(), "as it was found"
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(found[0, 0], x.sum(-1).abs().mean().double())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_other_names_of_a_parameter_and_wrappers_of_the_model_are_looked_through():
    """As by `merge`: state dicts call a tied parameter by each of its names, those of wrapped models with a prefix."""
    base, tuned, x = Tied(), Tied(), torch.randn(8, 3)
    plain, wrapped = TaskVector(base, tuned), nn.DataParallel(base)
    by_state = TaskVector(base.state_dict(), tuned.state_dict())
    prefixed = TaskVector(wrapped.state_dict(), nn.DataParallel(tuned).state_dict())
    assert [len(vector) for vector in (plain, by_state, prefixed)] == [1, 2, 2]
    tasks = [(model, [(x, torch.zeros(8).long())]) for model in (base, wrapped)]
    found = activation_matrix([plain, by_state, prefixed], tasks)
    assert found[0, 0] > 0 and torch.equal(found, found[:1, :1].expand(3, 2))
    lines = [
        TaskVector.from_deltas(v.deltas, base=v.base, info={"linearized": True}) for v in (plain, by_state, prefixed)
    ]
    judges = (lambda model: model(x).argmax(-1),) * 2
    errors = [
        disentanglement_error(model, (line, -line), judges, (0.0, 1.0)) for model in (base, wrapped) for line in lines
    ]
    assert errors[0].max() > 0 and all(torch.equal(errors[0], others) for others in errors)
    expected = talos.merge(base, lines[:1])(x)
    assert all(torch.equal(talos.merge(model, [line])(x), expected) for model in (base, wrapped) for line in lines)


def test_buffers_are_no_part_of_a_derivative_and_nothing_has_none():
    base, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), torch.randn(8, 3)
    tuned = copy.deepcopy(base)
    tuned[1].running_mean += 1.0
    still = TaskVector(base, tuned)
    tuned[0].bias.data += 1.0
    found = activation_matrix([TaskVector(base, tuned), still], [(base, [(x, torch.zeros(8).long())])])
    torch.testing.assert_close(found, torch.tensor([[1 / (1 + 1e-5) ** 0.5], [0.0]]).double())


def threshold_task(column: int):
    return lambda model: (model.weight[0, column : column + 1] > 0.5).long()


def coordinate_vector(base: nn.Module, x: float, y: float) -> TaskVector:
    tuned = nn.Linear(2, 1, bias=False)
    tuned.weight.data = torch.tensor([[float(x), float(y)]])
    return TaskVector(base, tuned)


def test_disentanglement_error_by_its_definition():
    """Two tasks that read two coordinates: a vector moves its own only, then both; the errors of the tasks add up."""
    base = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(base.weight)
    judges, alphas = (threshold_task(0), threshold_task(1)), [0.0, 1.0]
    apart = (coordinate_vector(base, 1, 0), coordinate_vector(base, 0, 1))
    assert disentanglement_error(base, apart, judges, alphas).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    mixed = (coordinate_vector(base, 1, 0), coordinate_vector(base, 1, 1))
    assert disentanglement_error(base, mixed, judges, alphas).tolist() == [[0.0, 1.0], [0.0, 0.0]]
    crossed = (coordinate_vector(base, 1, -1), coordinate_vector(base, -1, 1))
    assert disentanglement_error(base, crossed, judges, alphas)[1, 1] == 2.0
    assert base.weight.abs().sum() == 0
    assert GRID[0] == -3 and GRID[-1] == 3 and 0 in GRID
    with pytest.raises(TalosError, match="grid of alphas is empty"):
        disentanglement_error(base, apart, judges, [])
    with pytest.raises(TalosError, match="another base"):
        disentanglement_error(nn.Linear(2, 1, bias=False), apart, judges, alphas)


def test_each_task_is_asked_of_its_own_model():
    shared = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(shared.weight)
    bases, asked = (nn.Sequential(shared, nn.Identity()), nn.Sequential(shared, nn.ReLU())), ([], [])
    judges = tuple(lambda model, into=into: into.append(model) or torch.zeros(1) for into in asked)
    pair = (coordinate_vector(shared, 1, 0), coordinate_vector(shared, 0, 1))
    prefixed = tuple(TaskVector.from_deltas({"0.weight": vector.deltas["weight"]}) for vector in pair)
    disentanglement_error(bases, prefixed, judges, [0.0, 1.0])
    assert [{id(model) for model in seen} for seen in asked] == [{id(model)} for model in bases]
    apart = (shared, copy.deepcopy(shared))
    disentanglement_error(apart, pair, judges, [0.0, 1.0])
    assert not any(model.weight.any() for model in apart), "left moved"
    with pytest.raises(TalosError, match="another base"):
        disentanglement_error((shared, nn.Linear(2, 1, bias=False)), pair, judges, [0.0])


def picture(path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 24)) > 20


def test_pictures(tmp_path):
    made, _ = vectors()
    plots.plot_interference(talos.interference(made), tmp_path / "interference.png")
    plots.plot_matrix(torch.rand(3, 2), tmp_path / "matrix.png", rows=NAMES, columns=["x", "y"], label="accuracy")
    masks = {}
    for number in range(2):
        torch.manual_seed(number)
        masks[f"task {number}"] = Mask({"blocks.0.attn.qkv.weight": torch.rand(6, 4) < 0.5, "w": torch.rand(3) < 0.5})
    plots.plot_mask_overlap(masks, tmp_path / "masks.png")
    rows = [{"method": "x", "seconds": 0.3, "memory_gib": 6.5, "accuracy": 0.77},
            {"method": "y", "seconds": 0.1, "memory_gib": None, "accuracy": 0.91}]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    plots.plot_efficiency(tmp_path / "rows.json", tmp_path / "efficiency.png")
    plots.plot_disentanglement(torch.rand(21, 21), GRID, tmp_path / "xi.png", tasks=("a", "b"))
    plots.plot_disentanglement(torch.rand(1, 1), [0.3], tmp_path / "point.png", tasks=("a", "b"))
    for name in ("interference", "matrix", "masks", "efficiency", "xi", "point"):
        picture(tmp_path / f"{name}.png")


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The axes of the figures that would be written."""
    found = []
    for module in (plots.disentanglement, plots.efficiency, plots.masks, plots.matrices):
        monkeypatch.setattr(module, "save", lambda figure, path: found.append(figure.axes))
    return found


def images(axes) -> list:
    return [axis.images[0] for axis in axes if axis.images]


def test_a_matrix_has_its_numbers_in_its_cells_and_none_where_there_is_none(drawn):
    plots.plot_matrix([[0.0, 1.0], [0.25, float("nan")]], "m.png", rows="ab", columns="xy", label="accuracy")
    axis = drawn[0][0]
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axis.texts}
    assert texts == {(0, 0): ("0.00", "w"), (1, 0): ("1.00", "k"), (0, 1): ("0.25", "w")}
    assert axis.images[0].get_clim() == (0, 1)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("task", "task vector")
    assert ["".join(tick.get_text() for tick in ticks()) for ticks in (axis.get_xticklabels, axis.get_yticklabels)] == [
        "xy", "ab",
    ]  # fmt: skip


def test_each_panel_of_the_interference_shows_what_it_says(drawn):
    report = talos.interference(vectors()[0])
    plots.plot_interference(report, "i.png")
    panels = {axis.get_title(): axis.images[0] for axis in drawn[0] if axis.images}
    assert {name.split()[0]: image.get_array().tolist() for name, image in panels.items()} == {
        "cosine": [*map(list, report.cosine)], "overlap": [*map(list, report.overlap)],
        "opposite": [*map(list, report.sign_conflict)], "share": [*map(list, report.shared_norm)],
    }  # fmt: skip
    assert [image.get_clim() for image in panels.values()] == [(-1, 1), (0, 1), (0, 1), (0, 1)]


def test_the_heat_map_of_a_pair_has_the_first_task_from_left_to_right(drawn):
    errors = torch.tensor([[0.0, 0.5], [1.0, 1.5]])
    plots.plot_disentanglement(errors, [0.0, 1.0], "xi.png", tasks=("a", "b"))
    plots.plot_disentanglement(errors[:1, :1], [0.25], "xi.png", tasks=("a", "b"))
    pair, single = (images(axes)[0] for axes in drawn)
    assert pair.get_array().tolist() == errors.T.tolist() and pair.origin == "lower" and pair.get_clim() == (0, 2)
    assert tuple(pair.get_extent()) == (-0.5, 1.5, -0.5, 1.5) and tuple(single.get_extent())[:2] == (-0.25, 0.75)
    assert (drawn[0][0].get_xlabel(), drawn[0][0].get_ylabel()) == ("α of a", "α of b")


def test_efficiency_is_drawn_in_percent_from_zero_and_for_many_methods(drawn):
    rows = [{"method": str(n), "seconds": 1.0 + n, "memory_gib": None, "accuracy": 0.5} for n in range(9)]
    plots.plot_efficiency(rows, "e.png")
    time, memory = drawn[0]
    assert [tuple(points.get_offsets()[0]) for points in time.collections] == [(1.0 + n, 50.0) for n in range(9)]
    assert time.get_xlim() == pytest.approx((0, 1.2 * 9.0))
    assert not memory.collections and [text.get_text() for text in memory.texts] == ["not measured"]


def test_a_kind_that_one_mask_lacks_has_no_density_there(drawn):
    masks = {name: Mask({f"a.{name}.weight": torch.ones(2, 2) > 0}) for name in "qk"}
    plots.plot_mask_overlap(masks, "m.png")
    overlap, density = (image.get_array().tolist() for image in images(drawn[0]))
    assert overlap == [[1.0, 0.0], [0.0, 1.0]] and density == [[1.0, None], [None, 1.0]]


def test_pictures_refuse(tmp_path):
    with pytest.raises(TalosError, match="row 0: lacks memory_gib, accuracy"):
        plots.plot_efficiency([{"method": "x", "seconds": 1}], tmp_path / "a.png")
    with pytest.raises(TalosError, match="no row to draw"):
        plots.plot_efficiency([], tmp_path / "a.png")
    (tmp_path / "rows.json").write_text("{")
    with pytest.raises(TalosError, match=r"rows\.json: not a JSON list"):
        plots.plot_efficiency(tmp_path / "rows.json", tmp_path / "a.png")
    with pytest.raises(TalosError, match="no mask to draw"):
        plots.plot_mask_overlap({}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_vectors_of_a_linearized_model_are_measured_as_directions():
    """A model that is linear in its parameters is its own expansion, so both kinds of vector say the same."""
    torch.manual_seed(0)
    base = nn.Linear(6, 3)
    plain = [wiggled(base, seed, density=0.8) * 30 for seed in (1, 2)]
    lines = [TaskVector.from_deltas(v.deltas, base=v.base, info={"linearized": True}) for v in plain]
    inputs = [torch.randn(50, 6), torch.randn(50, 6)]
    judges = tuple(lambda model, x=x: model(x).argmax(-1).detach() for x in inputs)
    grid = (-2.0, 0.0, 0.5, 2.0)
    start = base.weight.detach().clone()
    errors = disentanglement_error(base, tuple(plain), judges, grid)
    assert errors.max() > 0 and torch.equal(errors, disentanglement_error((base, base), tuple(lines), judges, grid))
    agree = [lambda model, judge=judge: float((judge(model) == 0).float().mean()) for judge in judges]
    torch.testing.assert_close(accuracy_matrix(base, plain, agree), accuracy_matrix(base, lines, agree))
    assert torch.equal(base.weight, start)
    assert talos.merging.ties(lines).linearized and talos.merging.dare_linear(lines).linearized
    for mixed in (lambda v: talos.interference(v), lambda v: talos.merging.consensus(v), lambda v: v[0] + v[1]):
        with pytest.raises(TalosError, match="of a linearized model and the other is not"):
            mixed([plain[0], lines[1]])


def test_a_derivative_is_one_of_parameters_inside_of_wrappers():
    base, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), torch.randn(8, 3)
    tuned = copy.deepcopy(base)
    tuned[0].bias.data += 1.0
    vector, batch = TaskVector(base, tuned), (x, torch.zeros(8).long())
    slopes = [directional_derivative(model, vector, batch, default_forward) for model in (base, nn.DataParallel(base))]
    assert torch.equal(*slopes) and slopes[0].any()
    tuned[1].running_mean += 1.0
    both = TaskVector(base, tuned)
    assert torch.equal(directional_derivative(base, both, batch, default_forward), slopes[0])
    line = TaskVector.from_deltas(both.deltas, base=both.base, info={"linearized": True})
    looks = (
        lambda: talos.merge(base, [line], alpha=1.0),
        lambda: disentanglement_error(base, (line, line), (len, len)),
    )
    for look in looks:
        with pytest.raises(TalosError, match="moves the buffer '1.running_mean', by which a linearized model has no"):
            look()
