"""What code written for torch.optim.AdamW may expect of MaskedAdam, on every backend."""

import inspect

import pytest
import torch
from adam_cases import (
    CLOSE_ON,
    SHAPES,
    assert_same_on_selected,
    assert_stepped_by,
    device_of,
    give_gradients,
    launches,
    masks,
    on_cpu,
    parameters,
    run,
)
from torch.optim import AdamW
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from talos_fast import MaskedAdam, TalosError


def test_argument_names_and_kinds_are_those_of_adamw():
    for name, method in vars(MaskedAdam).items():
        inherited = getattr(AdamW, name, None)
        if not inspect.isfunction(method) or inherited is None or name == "__getstate__":
            continue
        ours, theirs = ({p.name: p for p in inspect.signature(f).parameters.values()} for f in (method, inherited))
        extra = ours.pop("masks", None)
        assert extra is None or (name == "__init__" and extra.kind is extra.KEYWORD_ONLY and extra.default is None)
        assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()], name
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()], name


def test_groups_closures_and_missing_gradients(place):
    params = parameters(place=place)
    optimizer = MaskedAdam([{"params": params[:1], "masks": masks()[:1], "lr": 0.5}, {"params": params[1:2]}])
    optimizer.add_param_group({"params": params[4:], "masks": [masks()[4]]})
    assert "masks" not in optimizer.state_dict()["param_groups"][0]

    def closure():
        assert torch.is_grad_enabled()
        params[0].grad = torch.ones_like(params[0])
        return 3.0

    assert optimizer.step(closure) == 3.0
    assert torch.equal(on_cpu(params[0]) != on_cpu(parameters()[0]), masks()[0])
    assert torch.equal(on_cpu(params[1]), on_cpu(parameters()[1]))
    assert list(optimizer.state) == params[:1]
    assert_stepped_by(optimizer, place)


def test_groups_of_the_caller_keep_their_masks():
    groups = [{"params": parameters()[:1], "masks": masks()[:1]}]
    for _ in range(2):
        assert f"{int(masks()[0].sum())} of" in repr(MaskedAdam(groups))


def test_a_group_whose_masks_do_not_fit_is_not_added():
    params = parameters()
    optimizer = MaskedAdam(params[:1])
    with pytest.raises(TalosError, match="2 masks for 1 parameters"):
        optimizer.add_param_group({"params": params[1:2], "masks": masks()[1:3]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_without_a_gradient_stands_still(place):
    """Its step, moments and value; and the tables of the launch stay as they are."""
    masked, dense = parameters(place=place), parameters(place=place)
    ours, theirs = MaskedAdam(masked, masks=masks()), AdamW(dense)
    tables = []
    for step in range(4):
        for optimizer, params in ((ours, masked), (theirs, dense)):
            give_gradients(params, step)
            params[step % 2].grad = None if step else params[step % 2].grad
            optimizer.step()
        tables.append(launches(ours))
    assert_same_on_selected(masked, dense, place)
    assert [float(ours.state[p]["step"]) for p in masked[:2]] == [float(theirs.state[p]["step"]) for p in dense[:2]]
    assert all(now == tables[0] for now in tables)


def test_hooks(place):
    params = parameters(place=place)
    optimizer = MaskedAdam(params, masks=masks())
    called = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("global pre")),
        optimizer.register_step_pre_hook(lambda *_: called.append("pre")),
        optimizer.register_step_post_hook(lambda *_: called.append("post")),
        register_optimizer_step_post_hook(lambda *_: called.append("global post")),
    ]
    run(optimizer, params, range(1))
    for handle in handles:
        handle.remove()
    run(optimizer, params, range(1))
    assert called == ["global pre", "pre", "post", "global post"]


def test_gradients_and_parameters_of_any_strides(place):
    """channels_last weights, gradients laid out otherwise than their parameter, a parameter with gaps."""
    base, mask = torch.randn(8, 16, 3, 3), torch.rand(8, 16, 3, 3) < 0.5
    device = device_of(place)
    with_gaps = torch.zeros(8, 32, 3, 3, device=device)[:, ::2].copy_(base)
    values = [base.to(device, memory_format=torch.channels_last), base.to(device, copy=True), with_gaps]
    params = [torch.nn.Parameter(value) for value in values]
    wanted = torch.nn.Parameter(base.clone())
    reference, optimizer = AdamW([wanted]), MaskedAdam(params, masks=[mask] * 3)
    for step in range(3):
        gradient = torch.randn(8, 16, 3, 3)
        wanted.grad = gradient.clone()
        reference.step()
        for n, p in enumerate(params):
            flipped = (n + step) % 2 == 1
            p.grad = gradient.to(device, memory_format=torch.channels_last if flipped else torch.contiguous_format)
        optimizer.step()
    for p in params:
        assert torch.equal(on_cpu(p)[~mask], base[~mask])
        torch.testing.assert_close(on_cpu(p)[mask], wanted.detach()[mask], **CLOSE_ON[place])


def test_what_moves_between_steps_is_followed(place):
    """Parameters put elsewhere, state cleared, moved or replaced: the kernels never step what was there before."""

    def move_parameters(optimizer, params):
        for p in params:
            p.data = p.data.clone()

    def clear_state(optimizer, params):
        optimizer.state.clear()

    def move_state(optimizer, params):
        for state in optimizer.state.values():
            for value in state.values():
                value.data = value.data.clone()

    def replace_state(optimizer, params):
        optimizer.state[params[0]] = {key: value.clone() for key, value in optimizer.state[params[0]].items()}

    def other_path(optimizer, params):
        optimizer.param_groups[0]["foreach"] = True

    for change in (move_parameters, clear_state, move_state, replace_state, other_path):
        changed, plain = parameters(place=place), parameters(place=place)
        optimizer, reference = MaskedAdam(changed, masks=masks()), MaskedAdam(plain, masks=masks(), fused=False)
        run(optimizer, changed, range(2))
        run(reference, plain, range(2))
        change(optimizer, changed)
        if change is clear_state:
            reference.state.clear()
        run(optimizer, changed, range(2, 4))
        run(reference, plain, range(2, 4))
        for p, q in zip(changed, plain, strict=True):
            torch.testing.assert_close(p, q, **CLOSE_ON[place])


def test_groups_that_come_and_go(place):
    """A group taken away and another put in its place: no launch of the old one is used for the new."""
    params, plain = parameters(place=place), parameters(place=place)
    for optimizer, given in ((MaskedAdam(params[:1], masks=masks()[:1]), params), (AdamW(plain[:1]), plain)):
        run(optimizer, given, range(1))
        optimizer.param_groups.clear()
        optimizer.add_param_group({"params": given[1:2]})
        run(optimizer, given, range(1, 3))
    torch.testing.assert_close(params[1], plain[1], **CLOSE_ON[place])


def test_parameters_that_change_groups_step_in_the_new_one(place):
    """And one that is put in another's place begins anew, on the same memory too."""
    ours, theirs = (parameters(place=place) for _ in range(2))
    pairs = []
    for kind, params in ((MaskedAdam, ours), (AdamW, theirs)):
        optimizer = kind([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.01}])
        first, second = (group["params"] for group in optimizer.param_groups)
        run(optimizer, params, range(1))
        second.insert(0, first.pop())
        run(optimizer, params, range(1, 3))
        first[0] = params[0] = torch.nn.Parameter(params[0].data)
        run(optimizer, params, range(3, 5))
        pairs.append(params)
    for p, q in zip(*pairs, strict=True):
        torch.testing.assert_close(p, q, **CLOSE_ON[place])


def test_amsgrad_that_is_turned_on_in_between_fails_as_in_torch(place):
    for kind in (MaskedAdam, AdamW):
        params = parameters(place=place)
        optimizer = kind(params)
        run(optimizer, params, range(1))
        optimizer.param_groups[0]["amsgrad"] = True
        with pytest.raises(KeyError, match="max_exp_avg_sq"):
            run(optimizer, params, range(1))


def test_repr_counts_the_selected_entries():
    optimizer = MaskedAdam(parameters(), masks=masks())
    numel = sum(torch.Size(shape).numel() for shape in SHAPES)
    selected = sum(int(mask.sum()) for mask in masks())
    assert repr(optimizer).startswith("MaskedAdam (\nParameter Group 0\n    amsgrad: False\n")
    assert repr(optimizer).endswith(f"\nSelected entries: {selected:,} of {numel:,}\n)")


def test_misaligned_views(place):
    """Parameters and gradients that begin 4 bytes after a boundary of 16."""
    device, mask = device_of(place), torch.rand(3000) < 0.5
    p = torch.nn.Parameter(torch.zeros(3001, device=device)[1:])
    optimizer, wanted = MaskedAdam([p], masks=[mask]), torch.nn.Parameter(torch.zeros(3000))
    reference = AdamW([wanted])
    for _ in range(2):
        wanted.grad = torch.randn(3000)
        p.grad = torch.zeros(3001, device=device)[1:].copy_(wanted.grad)
        assert p.data_ptr() % 16 == 4 and p.grad.data_ptr() % 16 == 4
        optimizer.step()
        reference.step()
    assert_stepped_by(optimizer, place)
    torch.testing.assert_close(on_cpu(p)[mask], wanted.detach()[mask], **CLOSE_ON[place])
    assert not on_cpu(p)[~mask].any()


def test_distributed_tensors_are_refused_by_name(place):
    """With a mask; without, torch's AdamW steps them."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,))))
        with pytest.raises(NotImplementedError, match="parameter 0 is a DTensor: masks do not work with FSDP2"):
            MaskedAdam([p], masks=[torch.ones(4, dtype=torch.bool)])
        optimizer = MaskedAdam([p, torch.nn.Parameter(torch.ones(3))])
        for _ in range(3):
            for q in optimizer.param_groups[0]["params"]:
                q.grad = torch.ones_like(q)
            optimizer.step()
        assert float(optimizer.state[p]["step"]) == 3.0
    finally:
        destroy_process_group()


def test_inside_torch_compile():
    params, plain = parameters(), parameters()
    optimizer = MaskedAdam(params, masks=masks())

    def train():
        optimizer.zero_grad()
        sum(p.square().sum() for p in params).backward()
        optimizer.step()

    compiled = torch.compile(train, backend="eager")
    for _ in range(2):
        compiled()
    reference = MaskedAdam(plain, masks=masks())
    for _ in range(2):
        reference.zero_grad()
        sum(p.square().sum() for p in plain).backward()
        reference.step()
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_every_optimizer_method_is_torchs_or_overridden_knowingly():
    public = {name for name in vars(MaskedAdam) if not name.startswith("_")}
    assert public - set(dir(Optimizer)) == {"set_masks"}
