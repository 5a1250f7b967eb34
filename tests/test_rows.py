"""Selected rows against plain autograd in float64: any module class, eager and compiled; and the work that is saved."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import WORDS, write_bert, write_t5
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import Mask, MaskedAdam
from talos_fast.methods import Options, Request
from talos_fast.methods.masked import masked
from talos_fast.optim.compact_gradient import CompactGradient
from talos_fast.optim.rows import select_rows
from talos_fast.optim.selection import select

WIDTH = 8


class Attention(nn.Module):
    """MHA in both layouts, cross-attention, a linear map used twice, one without a bias."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 2)
        self.twice, self.plain = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x, x, x, need_weights=False)[0]
        x = self.cross(x, x.tanh(), x.tanh(), need_weights=True)[0]
        return self.plain(self.twice(self.twice(x)).sin())


def masks(model: nn.Module, queries_and_keys=("in_proj", "qkv")) -> dict[str, torch.Tensor]:
    """Fused projections without V, scattered rows elsewhere, an empty mask, and a few parameters without one."""
    torch.manual_seed(1)
    chosen = {}
    for number, (name, p) in enumerate(model.named_parameters()):
        mask = torch.rand(p.shape) < 0.5
        if any(part in name for part in queries_and_keys):
            mask[2 * len(mask) // 3 :] = False
        elif p.dim() == 2:
            mask &= torch.arange(len(mask))[:, None] % 3 == number % 3
            mask &= number % 5 != 0
        if number % 7 != 6:
            chosen[name] = mask
    return chosen


def gradients(model, run, x, how, amp=False):
    """The gradients that a backward pass over ``run`` leaves: name -> its selected entries, or all without a mask."""
    chosen = masks(model)
    optimizer = MaskedAdam(model.named_parameters(), masks=chosen)
    if how == "compact":
        optimizer.compact_gradients()
    context = torch.autocast("cpu", torch.bfloat16, enabled=amp)
    for scale in (1.0, 0.5):  # accumulates
        if how == "plain":
            with context:
                run(x * scale).float().square().sum().backward()
        else:
            with optimizer.selected_rows(), context:
                run(x * scale).float().square().sum().backward()
    found = {}
    for name, p in model.named_parameters():
        mask = chosen.get(name, torch.ones(p.shape, dtype=torch.bool))
        if isinstance(p.grad, CompactGradient):
            found[name] = p.grad.values
        else:
            found[name] = torch.zeros(int(mask.sum())) if p.grad is None else p.grad[mask]
    return found


def assert_equal(got, want, tolerance=1e-9):
    """Within ``tolerance`` of each tensor's norm; of all together where it vanishes in theory, as a key's bias does."""
    floor = 1e-3 * torch.linalg.vector_norm(torch.cat([g.double() for g in want.values()]))
    for name, gradient in want.items():
        error = torch.linalg.vector_norm(got[name].double() - gradient.double())
        assert error <= tolerance * torch.linalg.vector_norm(gradient.double()).clamp(min=floor), name


X = torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["rows", "compact"])
def test_values_are_those_of_autograd(how):
    ours, theirs = Attention(), Attention()
    assert_equal(gradients(ours, ours, X, how), gradients(theirs, theirs, X, "plain"))
    if how == "rows":
        assert ours.first.in_proj_weight.grad[2 * WIDTH :].abs().max() == 0


@pytest.mark.parametrize("how", ["rows", "compact"])
@pytest.mark.parametrize("amp", [False, True])
def test_under_autocast_and_in_bf16(how, amp):
    dtype = torch.float32 if amp else torch.bfloat16
    ours, theirs = Attention(dtype), Attention(dtype)
    x = X.to(dtype)
    assert_equal(gradients(ours, ours, x, how, amp), gradients(theirs, theirs, x, "plain", amp), 1e-2)


@pytest.mark.parametrize("how", ["rows", "compact"])
def test_compiled_without_a_graph_break_and_only_once(how):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    ours, theirs = Attention(), Attention()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, fullgraph=True)
    want = gradients(theirs, theirs, X, "plain")
    assert_equal(gradients(ours, compiled, X, "plain"), want)
    ours.zero_grad()
    assert_equal(gradients(ours, compiled, X, how), want)  # not what was compiled outside the context
    assert counter.frame_count == 2


@pytest.mark.parametrize("how", ["rows", "compact"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(how, reentrant):
    ours, theirs = Attention(), Attention()

    def run(x):
        return checkpoint(ours, x.requires_grad_(), use_reentrant=reentrant)

    assert_equal(gradients(ours, run, X.clone(), how), gradients(theirs, theirs, X, "plain"))


@pytest.mark.parametrize("inside", ["forward", "backward"])
def test_checkpointing_half_inside_is_refused_by_torch(inside):
    model = Attention()
    optimizer = MaskedAdam(model.named_parameters(), masks=masks(model))
    contexts = [optimizer.selected_rows(), nullcontext()]
    if inside == "backward":
        contexts.reverse()
    with contexts[0]:
        loss = checkpoint(model, X, use_reentrant=False).sum()
    with contexts[1], pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def open_clip_vit():
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(
        image_size=16, patch_size=8, width=24, layers=2, heads=2, mlp_ratio=2.0, output_dim=8
    ), torch.randn(2, 3, 16, 16)


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3), torch.randn(
        2, 3, 16, 16
    )


@pytest.mark.parametrize("how", ["rows", "compact"])
@pytest.mark.parametrize("make, fused", [(open_clip_vit, "attn.in_proj_weight"), (timm_vit, "attn.qkv.weight")])
def test_vision_transformers(make, fused, how):
    pytest.importorskip("open_clip"), pytest.importorskip("timm")
    torch.manual_seed(0)
    model, images = make()
    model, images = model.double().train(), images.double()
    want = gradients(model, model, images, "plain")
    model.zero_grad()
    assert_equal(gradients(model, model, images, how), want)
    if how == "rows":
        weights = [model.get_parameter(name) for name in masks(model) if name.endswith(fused)]
        assert weights
        assert all(p.grad[:48].abs().max() > 0 and p.grad[48:].abs().max() == 0 for p in weights)


@pytest.mark.parametrize("how", ["rows", "compact"])
@pytest.mark.parametrize("write", [write_bert, write_t5])
def test_language_models(write, how, tmp_path):
    pytest.importorskip("transformers")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(write(tmp_path)).double().eval()
    tokens = torch.randint(3, len(WORDS), (2, 6))
    extra = {"decoder_input_ids": tokens} if write is write_t5 else {}

    def run(scale):
        return model(input_ids=tokens, **extra).last_hidden_state * scale

    want = gradients(model, run, torch.tensor(1.0), "plain")
    model.zero_grad()
    assert_equal(gradients(model, run, torch.tensor(1.0), how), want)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def count_flops(weight_mask, context=None):
    """Forward and backward FLOPs of one fused projection, and the operators of the backward pass."""
    layer = nn.Linear(16, 48)
    optimizer = MaskedAdam(layer.parameters(), masks=[weight_mask, weight_mask[:, 0]])
    x = torch.randn(10, 16, requires_grad=True)
    with FlopCounterMode(display=False) as flops, Operators() as operators:
        if context == "rows":
            with optimizer.selected_rows():
                layer(x).sum().backward()
        else:
            layer(x).sum().backward()
    return flops.get_total_flops(), operators.names


def test_an_empty_third_takes_a_third_of_the_weight_gradients_work():
    mask = torch.ones(48, 16, dtype=torch.bool)
    mask[32:] = False
    product = 2 * 10 * 16 * 48
    assert count_flops(mask)[0] == 3 * product
    flops, operators = count_flops(mask, "rows")
    assert flops == 2 * product + 2 * product // 3
    assert "index_select" not in operators


def test_scattered_rows_are_selected():
    mask = torch.zeros(48, 16, dtype=torch.bool)
    mask[[3, 20, 40]] = True
    product = 2 * 10 * 16 * 48
    flops, operators = count_flops(mask, "rows")
    assert flops == 2 * product + product // 16
    assert "index_select" in operators


def test_without_a_selected_entry_nothing_is_kept_for_the_weight():
    layer = nn.Linear(16, 48)
    optimizer = MaskedAdam(layer.parameters(), masks=[torch.zeros(48, 16, dtype=torch.bool), torch.ones(48) > 0])
    kept = []

    def pack(tensor):
        kept.append(tensor.shape)
        return tensor

    with optimizer.selected_rows(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(10, 16)).sum().backward()
    assert kept == [] and layer.weight.grad is None and layer.bias.grad is not None


@pytest.mark.parametrize("rows, expected", [
    (range(0, 10), (0, 10, False)), (range(5, 30), (5, 30, False)), ([0, 30], (0, 31, True)), ([], (0, 0, False)),
    ([r for r in range(40) if r != 7], (0, 40, False)),
], ids=str)  # fmt: skip
def test_which_rows(rows, expected):
    mask = torch.zeros(40, 600, dtype=torch.bool)
    mask[list(rows), 5:300] = True
    weight = torch.randn(40, 600)
    found = select_rows(weight, select(mask, weight))
    assert (found.start, found.stop, found.index is not None) == expected
    part = found.of(weight.t()).t()
    compact = found.gradient(part, 40, torch.float64, compact=True)
    assert torch.equal(compact, weight[mask])
    whole = found.gradient(part, 40, torch.float64, compact=False)
    assert whole.dtype is torch.float64 and torch.equal(whole[mask], weight[mask].double())
    assert not whole[: found.start].any() and not whole[found.stop :].any()


def halves():
    """A layer, a mask of two of its six rows, and inputs."""
    layer, mask = nn.Linear(4, 6), torch.zeros(6, 4, dtype=torch.bool)
    mask[2:4] = True
    return layer, mask, torch.randn(3, 4)


@pytest.mark.parametrize("compact", [False, True])
def test_a_hook_on_a_weight_is_shown_its_whole_gradient(compact):
    layer, mask, x = halves()
    (whole,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    optimizer = MaskedAdam([layer.weight], masks=[mask])
    if compact:
        optimizer.compact_gradients()
    seen = []
    layer.weight.register_hook(seen.append)
    with optimizer.selected_rows():
        layer(x).square().sum().backward()
    assert len(seen) == 1 and torch.equal(seen[0], whole)


def test_transforms_of_functions_are_left_alone():
    layer, mask, x = halves()
    optimizer = MaskedAdam([layer.weight], masks=[mask])
    with optimizer.selected_rows():
        found = torch.vmap(layer)(x[:, None])[:, 0]
    torch.testing.assert_close(found, layer(x))


def under_distributed_data_parallel(rank: int, folder: Path) -> None:
    layer, mask, x = halves()
    optimizer = MaskedAdam([layer.weight], masks=[mask & ~mask])
    wrapped = nn.parallel.DistributedDataParallel(layer)
    with optimizer.selected_rows():
        for _ in range(2):
            wrapped(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(6, 4)) and (layer.bias.grad == 6).all()


@needs_gloo
def test_distributed_data_parallel_gets_zeros_for_a_weight_without_entries(tmp_path):
    """It waits for the gradient of whatever requires one."""
    on_two_ranks(under_distributed_data_parallel, tmp_path)


def test_autocast_leaves_float64_alone():
    layer, mask, x = halves()
    layer, x = layer.double(), x.double()
    optimizer = MaskedAdam([layer.weight], masks=[mask])
    with optimizer.selected_rows(), torch.autocast("cpu", torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x)) and inside.dtype is torch.float64


def test_the_weight_is_kept_for_inputs_that_need_a_gradient_only():
    layer, mask, x = halves()
    optimizer = MaskedAdam([layer.weight], masks=[mask])
    kept = []
    for needed in (False, True):
        shapes = []
        with (
            optimizer.selected_rows(),
            torch.autograd.graph.saved_tensors_hooks(lambda t, shapes=shapes: shapes.append(t.shape) or t, lambda t: t),
        ):
            layer(x.requires_grad_(needed))
        kept.append(layer.weight.shape in shapes)
    assert kept == [False, True]


def test_a_frozen_bias_with_a_mask_gets_no_gradient():
    layer, mask, x = halves()
    optimizer = MaskedAdam(layer.parameters(), masks=[mask, mask[:, 0]])
    optimizer.compact_gradients()
    layer.bias.requires_grad_(False)
    with optimizer.selected_rows():
        layer(x).sum().backward()
    assert layer.bias.grad is None and layer.weight.grad is not None


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (4, 0)], ids=str)
def test_what_has_no_rows_may_have_a_mask(shape):
    p = nn.Parameter(torch.ones(shape))
    optimizer = MaskedAdam([p], masks=[torch.ones(shape) > 0])
    with optimizer.selected_rows():
        (p * 2).sum().backward()
    assert torch.equal(p.grad, torch.full(shape, 2.0))


def test_outputs_may_be_written_to():
    """As Swin v2 and an inplace ReLU do."""
    linear, mask = nn.Linear(4, 6), torch.zeros(6, 4, dtype=torch.bool)
    mask[2:4] = True
    optimizer = MaskedAdam([linear.weight], masks=[mask])
    x = torch.randn(2, 3, 4)
    found = []
    for context in (optimizer.selected_rows(), nullcontext()):
        with context:
            hidden = linear(x)
            hidden += 1
            torch.relu_(hidden).square().sum().backward()
        found.append(linear.weight.grad[2:4])
        linear.weight.grad = None
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("compact", [False, True])
def test_a_weight_that_was_made_contiguous_under_the_optimizer(compact):
    """Its selected entries are numbered by the strides that it had."""
    linear = nn.Linear(6, 8, bias=False)
    linear.weight = nn.Parameter(torch.randn(6, 8).t())
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[2, 1] = mask[2, 3] = mask[5, 0] = True
    optimizer = MaskedAdam([linear.weight], lr=0.1, masks=[mask], weight_decay=0.0)
    linear.weight.data = linear.weight.data.contiguous()
    if compact:
        optimizer.compact_gradients()
    before, x = linear.weight.detach().clone(), torch.randn(4, 6)
    whole = torch.autograd.grad(linear(x).square().sum(), linear.weight)[0]
    with optimizer.selected_rows():
        linear(x).square().sum().backward()
    optimizer.step()
    moved = linear.weight.detach() - before
    torch.testing.assert_close(moved, torch.where(mask, -0.1 * whole.sign(), 0.0), rtol=1e-4, atol=1e-6)


def test_outside_and_without_gradients_it_changes_nothing():
    model = Attention()
    optimizer = MaskedAdam(model.named_parameters(), masks=masks(model))
    with optimizer.selected_rows(), torch.no_grad():
        inside = model(X)
    assert torch.equal(inside, model(X))
    model(X).sum().backward()
    assert model.first.in_proj_weight.grad[2 * WIDTH :].abs().max() > 0
    with optimizer.selected_rows():
        model.requires_grad_(False)
        assert not model(X).requires_grad
    with optimizer.selected_rows(), pytest.raises(RuntimeError, match="dtype"):
        F.linear(X.float(), model.twice.weight.requires_grad_())


def test_training_on_rows_is_the_same_training():
    runs = []
    for how in ("plain", "rows", "compact"):
        model = Attention()
        optimizer = MaskedAdam(model.named_parameters(), lr=0.01, masks=masks(model))
        if how == "compact":
            optimizer.compact_gradients()
        for step in range(5):
            with optimizer.selected_rows() if how != "plain" else torch.enable_grad():
                model(X + step).square().sum().backward()
            optimizer.clip_grad_norm_(0.5, "selected")
            optimizer.step()
            optimizer.zero_grad()
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(runs[1], runs[0])
    torch.testing.assert_close(runs[2], runs[0])


def test_a_method_under_a_mask_computes_selected_rows_only():
    model, mask, x = halves()
    setup = masked(Request(model, lambda model, x: model(x), 1e-3, 0.1, Options(), None), Mask({"weight": mask}))
    with setup.around():
        loss = setup.forward(model, x).sum()
        with FlopCounterMode(display=False) as flops:
            loss.backward()
    assert flops.get_total_flops() == 2 * 3 * 4 * int(mask.any(1).sum())
