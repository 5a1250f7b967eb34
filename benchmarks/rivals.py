"""The methods as the paper ran them: autocast, a GradScaler, a dense clip, foreach AdamW or a dense masked AdamW."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.optim import AdamW, Optimizer
from workloads import Workload

from talos_fast.batch import Batch, labels_of
from talos_fast.forward import Forward, default_forward, functional_forward
from talos_fast.linear import differentiable_forward
from talos_fast.methods import Setup
from talos_fast.methods.l_lora import LORA_ALPHA, RANK, lora_adapters, lora_changes
from talos_fast.profiling.iteration import FinetuneIteration, Mark
from talos_fast.step import Amp, Loss, autocasts

OPTIONS = {"lr": 1e-5, "weight_decay": 0.1}


class DenseMaskedAdamW(Optimizer):
    """AdamW with a learning rate times a dense score, one an entry; moments of everything, a loop over tensors.

    Written from the formula: θ ← θ(1 - s·lr·wd);  m, v as in Adam;  θ ← θ - s·lr/(1 - β1ⁿ) · m / (√v/√(1 - β2ⁿ) + ε).

    Args:
        params: parameters.
        scores: parameter -> s, of its shape and dtype; 1 where it is missing.
        lr, weight_decay: AdamW's.
    """

    def __init__(
        self, params: Iterable[Tensor], scores: Mapping[Tensor, Tensor], lr: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self._scores = {p: scores.get(p, torch.ones_like(p)) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter with a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group["lr"], group["weight_decay"])

    def _update(self, p: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        state["step"] += 1
        m, v, score = state["exp_avg"], state["exp_avg_sq"], self._scores[p]
        p.mul_(1 - score * (lr * weight_decay))
        m.mul_(0.9).add_(p.grad, alpha=0.1)
        v.mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
        denominator = (v.sqrt() / (1 - 0.999 ** state["step"]) ** 0.5).add_(1e-8)
        p.sub_(score * (lr / (1 - 0.9 ** state["step"])) * (m / denominator))


class PaperIteration(FinetuneIteration):
    """The released loop: scaled loss, `unscale_`, the norm of all gradients, `scaler.step`, `scaler.update`."""

    def __init__(self, setup: Setup, model: nn.Module, batch: Batch, loss: Loss, clip: float | None, amp: Amp) -> None:
        super().__init__(setup, model, batch, loss, clip, amp)
        self._model, self._loss = model, loss
        self._parameters = list(setup.trained.values())
        device = self._parameters[0].device.type
        self._autocast = torch.autocast(device, torch.bfloat16, enabled=autocasts(amp, self._parameters[0]))
        self._scaler = torch.amp.GradScaler(device)

    def forward_loss(self) -> Tensor:
        """The scalar loss of the batch, of which nothing is checked."""
        with self._autocast:
            logits = self.setup.forward(self._model, self._batch)
            return self._loss(logits.float(), labels_of(self._batch, "the batch"))

    def run(self, mark: Mark) -> None:
        """One iteration, calling ``mark`` at the end of each of `PHASES`."""
        scaler, optimizer = self._scaler, self.setup.optimizer
        scaler.scale(self.forward_loss()).backward()
        mark()
        scaler.unscale_(optimizer)
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        mark()
        scaler.step(optimizer)
        scaler.update()
        mark()
        optimizer.zero_grad(set_to_none=True)
        mark()

    def check(self) -> None:
        """Refuses timings of steps that the scaler skipped."""
        if self._scaler.get_scale() < 2.0**16:
            raise RuntimeError("the scaler found infinite gradients and skipped steps; their time means nothing")


def through_torch(method: str, setup: Setup, workload: Workload) -> Setup:
    """The setup of a linearized method on torch.func.jvp along dense directions, as the released code has it."""
    model, parameters = workload.model, dict(workload.model.named_parameters())
    if method == "linearized":
        trained, origin = setup.trained, {name: p.detach().clone() for name, p in setup.trained.items()}
        forward = _by_jvp(model, lambda: {name: p - origin[name] for name, p in trained.items()})
        return replace(setup, forward=forward, around=nullcontext, fixed=())
    adapters = lora_adapters(model.requires_grad_(True), RANK)
    model.requires_grad_(False)
    factors = {f"{adapter.name}{adapter.rows}": adapter.b for adapter in adapters}
    forward = _by_jvp(
        model,
        lambda: {n: change.dense() for n, change in lora_changes(adapters, parameters, LORA_ALPHA / RANK).items()},
    )
    optimizer = AdamW(factors.values(), fused=True, **OPTIONS)
    return replace(setup, trained=factors, optimizer=optimizer, forward=forward, around=nullcontext)


def _by_jvp(model: nn.Module, directions: Callable[[], Mapping[str, Tensor]]) -> Forward:
    origin = {name: p.detach() for name, p in model.named_parameters()}

    def forward(_: nn.Module, batch: Batch) -> Tensor:
        tangents = dict(directions())

        def logits(values: Mapping[str, Tensor]) -> Tensor:
            return functional_forward(default_forward, model, {**origin, **values}, batch)

        with differentiable_forward(model):
            value, slope = jvp(logits, ({name: origin[name] for name in tangents},), (tangents,))
        moved: Tensor = value + slope
        return moved

    return forward


def as_the_paper_ran_it(method: str, setup: Setup, workload: Workload) -> tuple[dict[str, Tensor], Optimizer]:
    """What trains, and the optimizer over it, in the released code.

    TaLoS froze tensors without a selected entry, but not the raw parameters, which no maskable module owns. LoTA froze
    nothing on vision models: what was not selected trained at a tenth of the rate.
    """
    parameters = dict(workload.model.named_parameters())
    if method not in ("talos", "lota"):
        return dict(setup.trained), AdamW(setup.trained.values(), foreach=True, **OPTIONS)
    mask, rest = (workload.talos, 0.0) if method == "talos" else (workload.lota, workload.spec.soft)
    raw = workload.spec.dense
    for name, p in parameters.items():
        p.requires_grad_(name in raw or bool(mask[name].any()) or rest > 0)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    scores = {p: mask[name].to(p) * (1 - rest) + rest for name, p in trained.items() if name not in raw}
    return trained, DenseMaskedAdamW(trained.values(), scores, **OPTIONS)
