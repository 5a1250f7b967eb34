"""`MaskedAdam` in loops that are not ours: Hugging Face's Trainer, Accelerate, and DistributedDataParallel.

The oracle is torch's AdamW in the same loop, whose gradients are masked by hooks: without weight decay that moves the
selected entries as AdamW would, and no other.
"""

import copy
from contextlib import nullcontext
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from two_ranks import needs_gloo, on_two_ranks

from talos_fast import Mask, MaskedAdam

LR = 1e-2


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    return [{"input_ids": draw(50, 8), "labels": draw(3)} for _ in range(32)]


def mask_of(model: nn.Module) -> Mask:
    """A tenth of the encoder's matrices, the first third of their rows left out; all else is frozen."""
    generator, flags = torch.Generator().manual_seed(2), {}
    for name, p in model.named_parameters():
        if "encoder" in name and p.dim() == 2:
            flags[name] = torch.rand(p.shape, generator=generator) < 0.1
            flags[name][: len(p) // 3] = False
    mask = Mask(flags)
    mask.freeze(model)
    return mask


def masked_adam(model: nn.Module, compact: bool = False, **options: float) -> MaskedAdam:
    optimizer = MaskedAdam(model.named_parameters(), lr=LR, masks=mask_of(model), **options)
    if compact:
        optimizer.compact_gradients()
    return optimizer


def hooked_adamw(model: nn.Module) -> torch.optim.AdamW:
    mask, parameters = mask_of(model), dict(model.named_parameters())
    for name, flags in mask.items():
        parameters[name].register_hook(flags.to(torch.float32).mul)
    return torch.optim.AdamW([parameters[name] for name in mask], lr=LR, weight_decay=0.0)


def moved(model: nn.Module) -> dict[str, torch.Tensor]:
    before = dict(bert().named_parameters())
    return {name: (p - before[name]).detach() for name, p in model.named_parameters()}


def assert_only_the_mask_moved(model: nn.Module) -> None:
    mask = mask_of(bert())
    for name, change in moved(model).items():
        assert torch.equal(change != 0, mask[name] if name in mask else torch.zeros_like(change, dtype=torch.bool))


def assert_same_training(model: nn.Module, oracle: nn.Module) -> None:
    assert_only_the_mask_moved(model)
    for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02 * LR)


class RowsTrainer(Trainer):
    """Computes the gradients of rows with selected entries only."""

    def training_step(self, *arguments, **options):
        with getattr(self.optimizer, "optimizer", self.optimizer).selected_rows():  # Accelerate wraps it
            return super().training_step(*arguments, **options)


def train(folder, make, kind=Trainer, resume=None, **options) -> nn.Module:
    model = bert()
    arguments = TrainingArguments(
        str(folder), max_steps=12, per_device_train_batch_size=4, save_steps=6, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", lr_scheduler_type="cosine", warmup_steps=2, **options,
    )  # fmt: skip
    trainer = kind(model, arguments, train_dataset=examples(), optimizers=(make(model), None))
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"gradient_checkpointing": True},
], ids=lambda options: next(iter(options), "plain"))  # fmt: skip
@pytest.mark.parametrize("compact, kind", [(False, Trainer), (True, Trainer), (True, RowsTrainer)])
def test_hugging_face_s_trainer(tmp_path, options, compact, kind):
    """With compacted gradients the Trainer's clipping sees the selected entries, as under the oracle's hooks."""
    options = options | {"max_grad_norm": 1e-2 if compact else 0.0}
    model = train(tmp_path, lambda model: masked_adam(model, compact, weight_decay=0.0), kind, **options)
    assert_same_training(model, train(tmp_path, hooked_adamw, **options))


@pytest.mark.parametrize("compact, kind", [(False, Trainer), (True, RowsTrainer)])
def test_a_trainer_s_checkpoint_is_taken_up_exactly(tmp_path, compact, kind):
    make = lambda model: masked_adam(model, compact, weight_decay=0.1)  # noqa: E731
    straight = train(tmp_path, make, kind)
    resumed = train(tmp_path, make, kind, resume=str(tmp_path / "checkpoint-6"))
    assert_only_the_mask_moved(straight)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))


def accelerated(make, place=None, load=False, rows=False, precision="no", accumulate=1) -> nn.Module:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.utils.set_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate)
    model = bert()
    own = make(model)
    model, optimizer, loader, schedule = accelerator.prepare(
        model, own, DataLoader(examples(), batch_size=4), LinearLR(own, 1.0, 0.1, 12)
    )
    batches, first = list(loader), 0
    if load:
        accelerator.load_state(place)
        first = 6
    for step in range(first, 12):
        with accelerator.accumulate(model), own.selected_rows() if rows else nullcontext():
            accelerator.backward(model(**batches[step % len(batches)]).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if place and step == 5 and not load:
            accelerator.save_state(place)
    return accelerator.unwrap_model(model)


@pytest.mark.parametrize("options", [{}, {"precision": "bf16"}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("rows", [False, True])
def test_accelerate(tmp_path, options, rows):
    make = lambda model: masked_adam(model, True, weight_decay=0.0)  # noqa: E731
    place = str(tmp_path / "state")
    model = accelerated(make, place, rows=rows, **options)
    assert_same_training(model, accelerated(hooked_adamw, **options))
    resumed = accelerated(make, place, load=True, rows=rows, **options)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4)).double()


def steps(model: nn.Module, optimizer: MaskedAdam, batches, rows: bool) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        with optimizer.selected_rows() if rows else nullcontext():
            cross_entropy(model(x), y).backward()
        optimizer.clip_grad_norm_(0.1, entries="selected")
        optimizer.step()


def masked_net() -> tuple[nn.Sequential, MaskedAdam]:
    model = net()
    masks = {name: torch.rand(p.shape) < 0.3 for name, p in model.named_parameters()}
    masks["0.weight"][:5] = False
    return model, MaskedAdam(model.named_parameters(), lr=LR, masks=masks)


def net_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(4, (8,), generator=generator))
        for _ in range(5)
    ]


def on_rank(rank: int, folder: Path) -> None:
    for rows in (False, True):
        model, optimizer = masked_net()
        steps(DistributedDataParallel(model), optimizer, [(x[rank::2], y[rank::2]) for x, y in net_batches()], rows)
        torch.save(model.state_dict(), folder / f"{rank}{rows}.pt")


@needs_gloo
def test_two_ranks_under_distributed_data_parallel_train_as_one(tmp_path):
    on_two_ranks(on_rank, tmp_path)
    model, optimizer = masked_net()
    before = copy.deepcopy(model.state_dict())
    steps(model, optimizer, net_batches(), rows=False)
    found = [torch.load(tmp_path / f"{rank}{rows}.pt") for rank in (0, 1) for rows in (False, True)]
    for name, expected in model.state_dict().items():
        assert not torch.equal(expected, before[name])
        for trained in found:
            torch.testing.assert_close(trained[name], expected, rtol=0, atol=1e-12)
            assert torch.equal(trained[name] == before[name], expected == before[name])
