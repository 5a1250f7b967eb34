"""The vector: exact both ways, linear, checked against its base, small on disk."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from talos_fast import TalosError, TaskVector, merge
from talos_fast.edit import Edit
from talos_fast.fingerprint import batch_digest, digest, fingerprint, identify, require_base

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def states(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base, and a state with steps of every size in a tenth of a matrix, in a scalar and in a 4-d tensor."""
    base = {
        "w": torch.randn(60, 50),
        "untouched": torch.randn(9),
        "scalar": torch.tensor(1.5),
        "images": torch.randn(4, 5, 6, 7).to(memory_format=torch.channels_last),
    }
    base = {name: t.to(dtype) for name, t in base.items()}
    tuned = {name: t.clone() for name, t in base.items()}
    moved = torch.rand(60, 50) < 0.1
    steps = torch.randn(int(moved.sum())) * 10.0 ** torch.randint(-6, 3, (int(moved.sum()),))
    tuned["w"][moved] += steps.to(dtype)
    tuned["w"][0, 0] = 1e-20  # far below what the difference can say
    tuned["scalar"] += 1
    tuned["images"] = torch.randn_like(base["images"])
    return base, tuned


def equal(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["memory", "delta", "replace"])
def test_apply_restores_the_tuned_bits_and_revert_the_base(tmp_path, dtype, kind):
    base, tuned = states(dtype)
    vector = TaskVector(base, tuned, info={"task": "x"})
    if kind != "memory":
        vector.save_pretrained(tmp_path, kind=kind, base=base)
        vector = TaskVector.from_pretrained(tmp_path, base=base)
        assert vector.info == {"task": "x"}
        assert {f.name for f in tmp_path.iterdir()} == {
            "task_vector.safetensors",
            "task_vector_config.json",
            "README.md",
        }
    model = {name: t.clone() for name, t in base.items()}
    assert vector.apply_to(model) is model
    assert equal(model, tuned)
    vector.revert(model)
    assert equal(model, base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_revert_after_any_coefficient(dtype):
    base, tuned = states(dtype)
    model = {name: t.clone() for name, t in base.items()}
    vector = TaskVector(base, tuned)
    vector.apply_to(model, scaling_coef=-0.37)
    assert not equal(model, base)
    vector.revert(model)
    assert equal(model, base)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_scaled_vector_is_as_exact(dtype, factor):
    base, tuned = states(dtype)
    model = {name: t.clone() for name, t in base.items()}
    assert equal((factor * TaskVector(base, tuned)).apply_to(model, 1 / factor), tuned)


def test_algebra_matches_dense_arithmetic():
    base, first = states(torch.float32)
    torch.manual_seed(1)
    second = {name: t + torch.randn_like(t) * (torch.rand_like(t) < 0.2) for name, t in base.items()}
    a, b = TaskVector(base, first), TaskVector(base, second)

    def dense(vector):
        return {name: vector.to_dense().get(name, torch.zeros_like(base[name])) for name in base}

    da, db = dense(a), dense(b)
    for vector, expected in [
        (a + b, {n: da[n] + db[n] for n in base}),
        (a - b, {n: da[n] - db[n] for n in base}),
        (-a, {n: -da[n] for n in base}),
        (0.25 * a, {n: 0.25 * da[n] for n in base}),
        (a / 4, {n: da[n] / 4 for n in base}),
        (sum([a, b, a]), {n: da[n] + db[n] + da[n] for n in base}),
    ]:
        assert equal(dense(vector), expected)
    flat_a, flat_b = (torch.cat([d[n].reshape(-1).double() for n in base]) for d in (da, db))
    assert a.dot(b) == pytest.approx(float(flat_a @ flat_b))
    assert a.norm() == pytest.approx(float(flat_a.norm()))
    assert a.cosine(b) == pytest.approx(float(torch.cosine_similarity(flat_a, flat_b, dim=0)))
    assert (a - a).norm() == a.cosine(a - a) == a.cosine(TaskVector.from_deltas({})) == 0
    assert a.overlap(a)["total"] == 1


def test_modules_and_checkpoints(tmp_path):
    from safetensors.torch import save_file

    base = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight[0] += 1
        tuned[1].running_mean += 2
    vector = TaskVector(base, tuned)
    assert list(vector) == ["0.weight", "1.running_mean"]
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    assert TaskVector(tmp_path / "base.safetensors", tmp_path).nnz == vector.nnz
    edited = vector.apply_to(copy.deepcopy(base))
    assert equal(edited.state_dict(), tuned.state_dict())


def test_what_else_a_checkpoint_holds_is_no_part_of_a_vector():
    base = {"w": torch.zeros(2), "steps": torch.tensor(3), "epoch": 1, "phases": torch.ones(2, dtype=torch.cfloat)}
    lazy = {"lazy": torch.ones(2, dtype=torch.cfloat, device="meta")}
    assert list(TaskVector(base | lazy, {"w": torch.ones(2), "steps": torch.tensor(4), "epoch": 2, **lazy})) == ["w"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(TalosError, match="model.safetensors: not a readable safetensors checkpoint"):
        TaskVector({"w": torch.zeros(2)}, tmp_path)


def test_buffers_that_are_not_saved_are_no_part_of_a_vector():
    base = nn.Linear(2, 2)
    base.register_buffer("cache", torch.zeros(3), persistent=False)
    tuned = copy.deepcopy(base)
    tuned.cache += 1
    tuned.bias.data += 1
    assert list(TaskVector(base, tuned)) == ["bias"]


def test_files_are_small(tmp_path):
    base = {"w": torch.randn(1000, 1000)}
    tuned = {"w": base["w"] + 1e-3 * (torch.rand(1000, 1000) < 0.1)}
    vector = TaskVector(base, tuned)
    vector.save_pretrained(tmp_path)
    size = (tmp_path / "task_vector.safetensors").stat().st_size
    assert vector.nbytes <= size <= vector.nbytes + 2000
    assert size < 0.15 * 4e6
    assert vector.density == pytest.approx(0.1, rel=0.02)


def test_refuses_another_base():
    base, tuned = states(torch.float32)
    vector = TaskVector(base, tuned)
    other = {name: t.clone() for name, t in base.items()}
    other["untouched"][0] += 1
    with pytest.raises(TalosError, match="another base: 1 of 4 tensors differ, the first is 'untouched'"):
        vector.apply_to(other)
    with pytest.raises(TalosError, match="recorded float32 .* found bfloat16"):
        vector.apply_to({name: t.bfloat16() for name, t in base.items()})
    with pytest.raises(TalosError, match="1 of 1 tensors differ"):
        require_base(vector.base, {"untouched": other["untouched"]}, "it")
    vector.apply_to(other, check_base=False)


def test_refuses_mixed_bases():
    base, tuned = states(torch.float32)
    moved = {name: t + 1 for name, t in base.items()}
    with pytest.raises(TalosError, match="different bases, which differ in"):
        TaskVector(base, tuned) + TaskVector(moved, tuned)


def test_a_sum_is_of_all_that_its_parts_know_of_the_base():
    one, other = (TaskVector({name: torch.zeros(2)}, {name: torch.ones(2)}) for name in "ab")
    assert (one + other).base == {**one.base, **other.base} and sum([one]) is one
    for stranger in (None, torch.zeros(2), np.zeros(2)):
        with pytest.raises(TypeError):
            stranger + one
    for two in (np.float64(2), np.array(2.0), torch.tensor(2.0)):
        assert (two * one).norm() == (one * two).norm() == 2 * one.norm()


def test_a_scalar_is_one_entry_of_the_base():
    base = {"w": torch.zeros(2), "s": torch.tensor(0.0)}
    assert TaskVector(base, {**base, "s": torch.tensor(1.0)}).numel == 3


def test_refuses_vectors_of_other_shapes():
    one, other = (TaskVector({"w": torch.zeros(s)}, {"w": torch.ones(s)}) for s in ((2, 3), (3, 2)))
    with pytest.raises(TalosError, match=r"'w': vectors of shapes \(2, 3\) and \(3, 2\) cannot be combined"):
        TaskVector.from_deltas(one.deltas) + TaskVector.from_deltas(other.deltas)


def test_nothing_is_written_when_a_name_or_shape_is_wrong():
    base = {"a": torch.zeros(3), "b": torch.zeros(3)}
    vector = TaskVector(base, {"a": torch.ones(3), "b": torch.ones(3)})
    lacking = {"a": torch.zeros(3)}
    with pytest.raises(TalosError, match="moves 'b', which the model lacks"):
        vector.apply_to(lacking)
    wrong = {"a": torch.zeros(3), "b": torch.zeros(4)}
    with pytest.raises(TalosError, match=r"'b': the vector has shape \(3,\), the model \(4,\)"):
        vector.apply_to(wrong, check_base=False)
    assert lacking["a"].sum() == wrong["a"].sum() == 0


def test_refuses_what_is_no_pair():
    base, tuned = states(torch.float32)
    with pytest.raises(TalosError, match="only the pretrained model has 'scalar'"):
        TaskVector(base, {name: t for name, t in tuned.items() if name != "scalar"})
    with pytest.raises(TalosError, match="'w': pretrained is torch.float32"):
        TaskVector(base, {**tuned, "w": tuned["w"].half()})
    with pytest.raises(TalosError, match="'w': the difference holds NaN"):
        TaskVector(base, {**tuned, "w": tuned["w"] / 0})


def test_apply_twice_and_revert_unapplied():
    base, tuned = states(torch.float32)
    vector = TaskVector(base, tuned)
    with pytest.raises(TalosError, match="not applied"):
        vector.revert(base)
    vector.apply_to(base)
    with pytest.raises(TalosError, match="applied to this model already"):
        vector.apply_to(base)


@pytest.mark.parametrize("kind", ["module", "state dict"])
def test_what_was_reverted_may_be_applied_again(kind):
    base = nn.Linear(4, 3)
    vector, target = TaskVector(base, nn.Linear(4, 3)), base if kind == "module" else base.state_dict()
    for _ in range(2):
        vector.revert(vector.apply_to(target))
    with pytest.raises(TalosError, match="not applied to this model"):
        vector.revert(target)


def test_replace_needs_its_base(tmp_path):
    base, tuned = states(torch.bfloat16)
    vector = TaskVector(base, tuned)
    with pytest.raises(TalosError, match="pass the pre-trained model as base="):
        vector.save_pretrained(tmp_path, kind="replace")
    with pytest.raises(TalosError, match="kind='x': choose 'delta' or 'replace'"):
        vector.save_pretrained(tmp_path, kind="x")
    with pytest.raises(TalosError, match="kind='replace' would round this vector to torch.bfloat16"):
        (0.3 * vector).save_pretrained(tmp_path, kind="replace", base=base)
    vector.save_pretrained(tmp_path, kind="replace", base=base)
    with pytest.raises(TalosError, match="pass base="):
        TaskVector.from_pretrained(tmp_path)


def test_provenance_that_is_no_json_is_refused(tmp_path):
    vector = TaskVector(*states(torch.float32), info={"accuracy": np.float32(0.5)})
    vector.save_pretrained(tmp_path / "numpy")
    assert TaskVector.from_pretrained(tmp_path / "numpy").info == {"accuracy": 0.5}
    vector.info["model"] = torch.nn.Linear(1, 1)
    with pytest.raises(TalosError, match=r"is no JSON \(a Linear\); give plain numbers and texts"):
        vector.save_pretrained(tmp_path / "odd")


def test_a_mask_of_another_shape_restricts_nothing():
    vector = TaskVector({"w": torch.zeros(2, 3)}, {"w": torch.ones(2, 3)})
    with pytest.raises(TalosError, match=r"'w': the mask has shape \(3, 2\), the vector \(2, 3\)"):
        vector.restrict({"w": torch.ones(3, 2, dtype=torch.bool)})


def test_only_bool_masks_restrict():
    vector = TaskVector(*states(torch.float32))
    name = next(iter(vector))
    with pytest.raises(TalosError, match="the mask is torch.int64, not torch.bool"):
        vector.restrict({name: torch.ones(vector.deltas[name].shape, dtype=torch.int64)})


def test_a_folder_that_holds_a_model_is_left_alone(tmp_path):
    base, tuned = states(torch.float32)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TalosError, match="holds a model"):
        TaskVector(base, tuned).save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]


def test_a_vector_is_found_by_its_folder_and_by_its_file(tmp_path):
    base, tuned = states(torch.float32)
    vector = TaskVector(base, tuned)
    vector.save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "task_vector.safetensors"):
        assert equal(TaskVector.from_pretrained(place).to_dense(), vector.to_dense())


@pytest.mark.parametrize("where", ["save", "load"])
def test_replacing_entries_needs_a_base_with_the_same_names(tmp_path, where):
    base, tuned = states(torch.float32)
    other = {f"encoder.{name}": t for name, t in base.items()}
    vector = TaskVector(base, tuned)
    if where == "load":
        vector.save_pretrained(tmp_path, kind="replace", base=base)
    with pytest.raises(TalosError, match="which base= lacks; its names are like 'encoder.w'"):
        if where == "save":
            vector.save_pretrained(tmp_path, kind="replace", base=other)
        TaskVector.from_pretrained(tmp_path, base=other)


def test_what_does_not_move_is_left_out_whoever_makes_the_vector():
    base, tuned = states(torch.float32)
    vector = TaskVector(base, tuned)
    assert "untouched" not in vector.deltas
    empty = vector.restrict({name: torch.zeros(t.shape, dtype=torch.bool) for name, t in base.items()})
    assert len(empty) == len(TaskVector.from_deltas(empty.deltas)) == 0


def test_tied_weights_may_go_by_each_of_their_names():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    base, tuned = Tied(), Tied()
    vector = TaskVector(base.state_dict(), tuned.state_dict())
    assert sorted(vector.deltas) == ["embed.weight", "head.weight"]
    for target in (copy.deepcopy(base), copy.deepcopy(base).state_dict()):
        vector.apply_to(target)
        moved = target.embed.weight if isinstance(target, nn.Module) else target["embed.weight"]
        assert torch.equal(moved, tuned.embed.weight)
    target, by_one_name = copy.deepcopy(base), TaskVector(base, tuned)
    Edit(target, vector.deltas, by_one_name.deltas).move(1.0, -1.0)  # both of them, though their names differ
    torch.testing.assert_close(target.embed.weight, base.embed.weight)
    for pair in ([vector, by_one_name], [by_one_name, vector]):
        merged = merge(base, pair, alpha=0.5)
        torch.testing.assert_close(merged.embed.weight, tuned.embed.weight)
    assert merge(base, [vector, vector], method="dare_linear", density=0.5).head.weight.isfinite().all()
    vector.deltas["head.weight"] = vector.deltas["head.weight"].scaled(2.0)
    with pytest.raises(TalosError, match="are names of one parameter of the model, but the task"):
        vector.apply_to(target)


def test_models_that_a_vector_is_applied_to_may_go():
    base = nn.Linear(100, 100)
    tuned = copy.deepcopy(base)
    tuned.bias.data.add_(1)
    vector = TaskVector(base, tuned)
    size = len(pickle.dumps(vector))
    applied = vector.apply_to(copy.deepcopy(base))
    gone = weakref.ref(applied)
    assert len(pickle.dumps(vector)) == size
    vector.note = "a subclass's or a user's"
    again = copy.deepcopy(vector)
    assert again.note == vector.note
    with pytest.raises(TalosError, match="not applied to this model"):
        again.revert(applied)
    del applied
    gc.collect()
    assert gone() is None


def test_a_digest_asks_for_no_order_and_no_strides():
    strided = fingerprint({"w": torch.arange(6.0)[::2]})
    assert strided == fingerprint({"w": torch.arange(6.0)[::2].clone()})
    assert digest({"v": "x", **strided}) == digest({**strided, "v": "x"})


def test_batches_may_be_sparse():
    one, same, other = (batch_digest((factor * torch.eye(3).to_sparse(), torch.arange(3))) for factor in (1, 1, 2))
    assert one == same != other


def test_counters_are_no_part_of_a_base():
    model = nn.Linear(2, 2)
    model.steps = nn.Parameter(torch.tensor(3), requires_grad=False)
    assert fingerprint(model).keys() == {"weight", "bias"}


def test_a_norm_may_have_squares_beyond_float32():
    vector = TaskVector({"w": torch.zeros(2)}, {"w": torch.tensor([3e30, 4e30])})
    assert vector.norm() == pytest.approx(5e30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_are_of_shapes_and_bits_but_for_the_sign_of_zeros(dtype):
    tensor = torch.tensor([1.5, torch.finfo(dtype).smallest_normal / 2, 0.0, float("nan")], dtype=dtype)
    expected = identify(tensor)
    torch.set_flush_denormal(True)
    try:
        assert identify(tensor) == expected
    finally:
        torch.set_flush_denormal(False)
    assert identify(torch.where(tensor == 0, -0.0, tensor)) == expected
    assert identify(torch.where(tensor == 1.5, -1.5, tensor)) != expected
    assert identify(tensor.new_zeros(4)) != expected
    assert identify(tensor.view(2, 2)) != expected


def test_the_sign_of_a_zero_makes_no_other_base():
    """A pruned model has both, and a difference cannot tell them apart."""
    base = {"w": torch.tensor([1.0, -1.0, 2.0])}
    pruned = {"w": base["w"] * torch.tensor([0.0, 0.0, 1.0])}
    further = {"w": pruned["w"] + 1}
    edited = TaskVector(base, pruned).apply_to({"w": base["w"].clone()})
    assert torch.equal(TaskVector(pruned, further).apply_to(edited)["w"], further["w"])
