"""Selections: what each encoding costs, that none loses an entry, and the operator on each against its reference."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from talos_fast import MaskedAdam, TalosError, ops
from talos_fast.optim.adam_operator import masked_adam_reference
from talos_fast.optim.selection import BLOCK, ROW_BYTES, select

SCALARS = dict(decay=0.999, beta1=0.9, beta2=0.99, step_size=1e-2, correction=0.3, eps=1e-8)
SIZES = [1, 7, 1023, 1024, 1025, 65_535, 65_536, 65_537, 200_000]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def random_mask(size, density):
    return torch.rand(size) < density


def stripes(size, width):
    return torch.arange(size) // width % 2 == 0


def test_bytes_an_entry():
    def cost(mask):
        selection = select(mask, torch.empty(mask.shape))
        assert selection.count == int(mask.sum())
        return selection.encoding, selection.nbytes / selection.count

    size = 2**20
    assert cost(torch.ones(size, dtype=torch.bool)) == ("runs", ROW_BYTES / BLOCK)
    assert cost(stripes(size, 512).view(1024, 1024)) == ("runs", ROW_BYTES / 512)
    kind, bytes_an_entry = cost(random_mask(size, 0.5))
    assert kind == "bits" and bytes_an_entry == pytest.approx(0.15625 / 0.5, rel=0.01)
    kind, bytes_an_entry = cost(random_mask(size, 0.03))
    assert kind == "offsets" and bytes_an_entry == pytest.approx(2 + 32 / 983, rel=0.01)
    assert [cost(random_mask(size, d))[0] for d in (0.045, 0.055)] == ["offsets", "bits"]


def test_an_empty_third_costs_nothing():
    mask = random_mask((3 * 64, 1024), 0.6)
    mask[128:] = False
    assert select(mask, torch.empty(mask.shape)).work.shape[0] == 128


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.sampled_from(SIZES), density=st.sampled_from([0, 0.001, 0.03, 0.1, 0.5, 0.9, 1]), seed=st.integers(0, 9))
def test_no_entry_is_lost(size, density, seed):
    torch.manual_seed(seed)
    mask = random_mask(size, density)
    selection = select(mask, torch.empty(size))
    assert torch.equal(torch.from_numpy(selection.flags()), mask)
    assert torch.equal(selection.positions, mask.nonzero()[:, 0])
    rows = selection.work
    assert int(rows[:, 3].sum()) == selection.count and bool((rows[:, 3] <= BLOCK).all())
    assert torch.equal(rows[:, 2], rows[:, 3].cumsum(0) - rows[:, 3])


def problem(mask, dtype, amsgrad=True, device="cpu"):
    wide = torch.promote_types(dtype, torch.float32)
    param, grad = torch.randn(mask.shape).to(device, dtype), torch.randn(mask.shape).to(device, dtype)
    selection = select(mask, param)
    moments = [torch.rand(selection.count, dtype=wide, device=device) for _ in range(3 if amsgrad else 2)]
    master = param.view(-1)[selection.positions].to(wide) * (1 + 1e-4) if wide != dtype else None
    return [param, grad, *moments, *([] if amsgrad else [None]), master, selection.work, selection.index]


def run(step, *problems, **scalars):
    """``masked_adam_`` or its reference on one tensor or several."""
    columns = [list(column) for column in zip(*problems, strict=True)]
    for n in (4, 5):  # AMSGrad's maxima and masters: of all tensors or none
        columns[n] = [t for t in columns[n] if t is not None]
    steps = dict(steps=[torch.tensor(6.0) for _ in problems], step=7.0)
    step(*columns, **SCALARS | steps | dict(grad_scale=1.0, maximize=False) | scalars)


OPERATOR = torch.ops.talos_fast.masked_adam_
MASKS = {
    "all": torch.ones(65_537, dtype=torch.bool), "runs": stripes(70_000, 300), "bits": torch.rand(70_000) < 0.4,
    "sparse bits": torch.rand(70_000) < 0.07, "offsets": torch.rand(200_000) < 0.03, "edge": torch.rand(1025) < 0.5,
    "scalar": torch.tensor(True),
}  # fmt: skip


def clone(tensors):
    return [None if t is None else t.clone() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("beta1", [0.9, 0.3])
@pytest.mark.parametrize("grad_scale, maximize, amsgrad", [(1.0, False, False), (8.0, True, True)])
def test_the_operator_against_its_reference(dtype, mask, beta1, grad_scale, maximize, amsgrad):
    ours = problem(mask, dtype, amsgrad)
    theirs, before = clone(ours), ours[0].clone()
    for step, arguments in ((OPERATOR, ours), (masked_adam_reference, theirs)):
        run(step, arguments, beta1=beta1, grad_scale=grad_scale, maximize=maximize)
    assert torch.equal(ours[0][~mask], before[~mask])
    assert_close(ours, theirs)


def assert_close(ours, theirs):
    for got, want in zip(ours, theirs, strict=True):
        if got is not None and got.is_floating_point():
            eps = torch.finfo(got.dtype).eps
            torch.testing.assert_close(got, want, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_compact_gradients_step_as_dense_ones(dtype, mask):
    dense = problem(mask, dtype)
    entries = dense[1][mask]
    narrow, wide = ([dense[0].clone(), grad, *clone(dense[2:])] for grad in (entries, entries.to(dense[2].dtype)))
    in_torch = clone(wide)
    run(masked_adam_reference, dense, grad_scale=4.0, maximize=True)
    run(masked_adam_reference, in_torch, grad_scale=4.0, maximize=True)
    assert torch.equal(in_torch[0], dense[0])
    for arguments in (narrow, wide):
        run(OPERATOR, arguments, grad_scale=4.0, maximize=True)
        assert_close([arguments[0], *arguments[2:]], [dense[0], *dense[2:]])


def test_compact_gradients_keep_what_fp32_holds():
    param, _, *rest = problem(MASKS["edge"], torch.bfloat16)
    ours = [param, torch.randn(rest[0].numel()), *rest]
    theirs = clone(ours)
    run(OPERATOR, ours)
    run(masked_adam_reference, theirs)
    assert_close(ours, theirs)


def test_every_place_of_a_tile_and_every_count():
    """Tails of vectors, tails of parts."""
    for mask in (torch.eye(1024, dtype=torch.bool)[::37].reshape(-1), torch.ones(70, 1024).tril().bool().view(-1)):
        ours = problem(mask, torch.float32)
        theirs = clone(ours)
        run(OPERATOR, ours)
        run(masked_adam_reference, theirs)
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tensors_step_as_each_would(dtype):
    ours = [problem(mask, dtype) for mask in MASKS.values()]
    theirs = [clone(arguments) for arguments in ours]
    run(OPERATOR, *ours)
    for got, want in zip(ours, theirs, strict=True):
        run(OPERATOR, want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.parametrize("density", [1.1, 0.4, 0.02])
def test_opcheck(density):
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    arguments = problem(random_mask(3000, density), torch.float32)

    def check(*lists, **scalars):
        torch.library.opcheck(OPERATOR.default, lists, scalars)

    run(check, arguments)


@pytest.mark.parametrize("step", [OPERATOR, masked_adam_reference], ids=["operator", "reference"])
def test_counters_of_any_dtype_become_the_number_of_the_step(step):
    counters = [torch.tensor(6, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.int64)]
    run(step, *(problem(random_mask(50, 0.4), torch.float32) for _ in counters), steps=counters)
    assert [(c.item(), c.dtype) for c in counters] == [(7, torch.float32), (7, torch.float64), (7, torch.int64)]


BAD_GRADS = {
    "grad must have the dtype of param": lambda a: a[1].double(),
    "grad has 2999 entries: neither the 3000 of param nor the": lambda a: a[1][1:],
    "must have the dtype of param or of exp_avg": lambda a: a[1][: len(a[2])].half(),
}


@pytest.mark.parametrize("step", [OPERATOR, masked_adam_reference], ids=["operator", "reference"])
@pytest.mark.parametrize("text", BAD_GRADS)
def test_gradients_that_do_not_fit_are_refused(text, step):
    arguments = problem(random_mask(3000, 0.4), torch.float32)
    arguments[1] = BAD_GRADS[text](arguments)
    with pytest.raises((RuntimeError, TalosError), match=text):
        run(step, arguments)


def spoil(arguments, position, value):
    index = arguments[7].clone()
    index[position] = value
    return [*arguments[:7], index]


SPOILED = {
    "param and grad must be contiguous": lambda a: [a[0], torch.randn(6000)[::2], *a[2:]],
    "and grad must be contiguous": lambda a: [a[0].repeat_interleave(2)[::2], *a[1:]],
    "exp_avg must be contiguous with": lambda a: [*a[:2], a[2].repeat_interleave(2)[::2], *a[3:]],
    "max_exp_avg_sq must be contiguous with": lambda a: [*a[:4], a[4][1:], *a[5:]],
    "max_exp_avg_sq must be float64": lambda a: [*a[:4], a[4].double(), *a[5:]],
    "exp_avg_sq must be contiguous with": lambda a: [*a[:3], a[3][1:], *a[4:]],
    "exp_avg must be float64 for float64 parameters, else float32": lambda a: [*a[:2], a[2].double(), *a[3:]],
    "must be a contiguous int64 table of four columns": lambda a: [*a[:6], a[6][:, :3].contiguous(), a[7]],
    "index must be contiguous": lambda a: [*a[:7], a[7].repeat_interleave(2)[::2]],
    "index must be uint8": lambda a: [*a[:7], a[7].float()],
    "row 0 of work leaves the parameter": lambda a: [*a[:6], a[6] + 4096, a[7]],
    "row 2 of work leaves the parameter, its state or its index": lambda a: spoil(a, -1, 255),
}


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("text", SPOILED)
def test_the_operator_refuses_stray_memory(text):
    arguments = problem(random_mask(3000, 0.4), torch.float32)
    with pytest.raises(RuntimeError, match=text):
        run(OPERATOR, SPOILED[text](arguments))


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
def test_the_operator_refuses_a_master_of_another_length():
    arguments = problem(random_mask(3000, 0.4), torch.bfloat16)
    arguments[5] = arguments[5][1:]
    with pytest.raises(RuntimeError, match="master must be contiguous with"):
        run(OPERATOR, arguments)


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("position, offset", [(5, -1), (-1, 3000)])
def test_the_operator_refuses_stray_offsets(position, offset):
    arguments = problem(random_mask(3000, 0.02), torch.float32)
    with pytest.raises(RuntimeError, match="row 0 of work leaves the parameter"):
        run(OPERATOR, spoil(arguments, position, offset))


EDITS = {  # one number of the table of work: its row, its column, what it becomes
    "fewer than no entries": lambda a: (0, 3, -1),
    "more entries than a block has": lambda a: (0, 3, BLOCK + 1),
    "entries beyond the last": lambda a: (-1, 2, a[2].numel() - int(a[6][-1, 3]) + 1),
    "entries before the first": lambda a: (0, 2, -1),
    "elements beyond the last": lambda a: (-1, 0, a[0].numel()),
    "elements before the first": lambda a: (0, 0, -BLOCK),
    "index beyond the last": lambda a: (-1, 1, a[7].numel() - 1),
    "index before the first": lambda a: (0, 1, -128),
}
WAYS_OUT = [*product(EDITS, ("runs", "bits", "offsets"))]
WAYS_OUT.remove(("index beyond the last", "runs"))  # which have none


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("edit, mask", WAYS_OUT)
def test_the_operator_refuses_each_way_out_of_its_tensors(edit, mask):
    arguments = problem(MASKS[mask], torch.float32)
    row, column, value = EDITS[edit](arguments)
    arguments[6] = arguments[6].clone()
    arguments[6][row, column] = value
    if arguments[7] is not None:  # what lies around it names no stray entry
        arguments[7] = torch.nn.functional.pad(arguments[7], (BLOCK, BLOCK))[BLOCK:-BLOCK]
    with pytest.raises(RuntimeError, match="of work leaves the parameter, its state or its index"):
        run(OPERATOR, arguments)


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
def test_the_operator_refuses_a_stray_row_among_many_tensors():
    whole, stray = (problem(random_mask(300_000, 0.4), torch.float32) for _ in range(2))
    stray[6] = stray[6].clone()
    stray[6][200, 2] = -1
    with pytest.raises(RuntimeError, match="row 200 of work leaves the parameter"):
        run(OPERATOR, whole, stray, whole)


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_bits_without_entries_move_nothing_beyond_the_moments(dtype):
    whole = problem(random_mask(3000, 0.4), dtype)
    work = whole[6].clone()
    work[-1, 3] -= 3  # the last row's bits now name three entries more than it has
    arguments = [*whole[:6], work, whole[7]]
    moments = [t.clone() for t in (whole[2], whole[3])]
    run(OPERATOR, arguments)
    for moment, before in zip(arguments[2:4], moments, strict=True):
        assert torch.equal(moment[-3:], before[-3:])
        assert not torch.equal(moment[:100], before[:100])
    assert arguments[0].isfinite().all()


@pytest.mark.skipif(ops.backend("cpu") != "cpp", reason="the checks are those of the C++ library")
def test_the_operator_refuses_lists_that_do_not_fit():
    one, other = (problem(random_mask(3000, 0.4), dtype, amsgrad=False) for dtype in (torch.float32, torch.float64))
    with pytest.raises(RuntimeError, match="params must have one dtype"):
        run(OPERATOR, one, other)
    lists = [[t] for t in one]
    for n, message in ((1, "must be equally long"), (4, "must be empty or as long as params")):
        spoiled = [[one[2], one[2]] if place == n else column for place, column in enumerate(lists)]
        spoiled = [[t for t in column if t is not None] if place in (4, 5) else column
                   for place, column in enumerate(spoiled)]  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            OPERATOR(*spoiled, steps=[torch.tensor(0.0)], step=1.0, **SCALARS, grad_scale=1.0, maximize=False)


def test_channels_last_weights_step_as_they_lie():
    torch.manual_seed(0)
    start, mask = torch.randn(8, 16, 3, 3), random_mask((8, 16, 3, 3), 0.5)
    weights = [torch.nn.Parameter(start.clone(memory_format=layout)) for layout in
               (torch.channels_last, torch.contiguous_format)]  # fmt: skip
    for p in weights:
        optimizer = MaskedAdam([p], masks=[mask])
        for step in range(3):
            torch.manual_seed(step)
            p.grad = torch.randn(8, 16, 3, 3)
            optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0][~mask], start[~mask])


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_weights_that_are_laid_out_anew_under_the_optimizer(layout, steps, compact):
    """Their entries stay numbered by the strides that they had."""
    torch.manual_seed(0)
    start, mask = torch.randn(8, 16, 3, 3), random_mask((8, 16, 3, 3), 0.3)
    other = {torch.channels_last, torch.contiguous_format}.difference({layout}).pop()
    weights = [torch.nn.Parameter(start.clone(memory_format=layout)) for _ in (0, 1)]
    for p, moves in zip(weights, (True, False), strict=True):
        optimizer = MaskedAdam([p], masks=[mask])
        if compact:
            optimizer.compact_gradients()
        for step in range(4):
            if moves and step == steps:
                p.data = p.data.contiguous(memory_format=other)
            torch.manual_seed(step)
            (p * torch.randn(8, 16, 3, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
    assert torch.equal(weights[0][~mask], start[~mask])
