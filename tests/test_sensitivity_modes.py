"""Models that are another in evaluation mode, or write to themselves in their forward; modes of torch around them."""

import copy
import threading

import pytest
import torch
from oracles import assert_equal, data, randomized, scores
from sensitivity_cases import Net, expected
from torch import nn
from torch.nn import functional as F

from talos_fast import evaluate
from talos_fast.sensitivity import sensitivities

pytestmark = pytest.mark.usefixtures("logged")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_a_mode_without_gradients_and_with_tensors_made_there(mode):
    model, (x, y) = randomized(Net(lambda layer, x: torch.tanh(layer(x)))), data(4, 3, 6)
    truth = expected(model, (x, y))
    with mode():
        assert_equal(scores(model, (x * 1.0, y)), truth)


class Caster(nn.Module):
    """Casts a layer in its forward, as the routers of Switch Transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.odd, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        self.router = self.router.to(torch.float64)
        hidden = x * self.router(x).softmax(-1)
        return self.out(torch.einsum("ntd,ed->nte", hidden, self.odd.weight).mean(1))


def test_a_model_that_casts_itself_in_its_forward(caplog):
    """Under torch.func that wrote a transform's tensors into the model, and the process crashed."""
    model = randomized(Caster())
    batch = torch.randn(4, 5, 6).double(), torch.arange(4)
    found = sensitivities(
        model, [batch], estimator="sampled-logit", labels=[batch[1]], include=["router.*", "odd.weight"]
    )
    truth = expected(model, batch)
    assert_equal(found, {name: truth[name] for name in found})
    assert "Linear is cast or moved in the forward" in caplog.text
    copy.deepcopy(model)


class Caching(nn.Module):
    """Keeps in evaluation mode what its parameter was, as LeViT keeps attention biases."""

    def __init__(self) -> None:
        super().__init__()
        self.biases, self.attention_bias_cache = nn.Parameter(torch.randn(2, 6)), {}
        self.register_buffer("index", torch.tensor([0, 1, 1, 0, 1]))

    def train(self, mode=True):
        if mode:
            self.attention_bias_cache = {}
        return super().train(mode)

    def forward(self, x):
        if self.training:
            return x + self.biases[self.index]
        if "kept" not in self.attention_bias_cache:
            self.attention_bias_cache["kept"] = self.biases[self.index]
        return x + self.attention_bias_cache["kept"]


def test_what_a_model_caches_in_evaluation_mode_has_its_gradient():
    model = randomized(nn.Sequential(nn.Linear(6, 6), Caching(), nn.Tanh(), nn.Flatten(1), nn.Linear(30, 4))).eval()
    batches = [(torch.randn(4, 5, 6).double(), torch.arange(4)) for _ in range(2)]
    with torch.no_grad():
        model(batches[0][0])
    found = sensitivities(
        model, batches, estimator="sampled-logit", labels=[y for _, y in batches], include=["0.*", "1.*"]
    )
    assert not model[1].attention_bias_cache
    model.train()
    truth = [expected(model, batch) for batch in batches]
    assert_equal(found, {name: truth[0][name] + truth[1][name] for name in found})
    x = batches[0][0]
    with torch.no_grad():
        model.eval()(x)
        model[1].biases.mul_(-100)
        stale, labels = model(x).argmax(-1), copy.deepcopy(model).train()(x).argmax(-1)
    assert not torch.equal(stale, labels) and evaluate(model, [(x, labels)]).value == 1.0


class Folding(nn.Linear):
    """LoRA in the manner of many: in evaluation mode the product is added to the weight."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2)), False

    def train(self, mode: bool = True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, x):
        out = F.linear(x, self.weight, self.bias)
        return out if self.merged else out + x @ self.a.T @ self.b.T


def test_weights_that_evaluation_mode_folds_are_left_as_they_were():
    model, batch = nn.Sequential(Folding(), nn.Tanh(), nn.Linear(6, 4)).double(), data(4, 6)
    before = copy.deepcopy(model.state_dict())
    found = sensitivities(model, [batch], include=["*"])
    assert found["0.a"].max() > 0
    assert model.training and not model[0].merged
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    evaluate(model, [batch])
    assert model.training and not model[0].merged
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize("whole", [False, True])
def test_weights_that_are_not_folded_though_the_flag_says_so(whole):
    """A flag that was set by hand: what eval() then folds is unfolded again."""
    model, batch = nn.Sequential(Folding(), nn.Tanh(), nn.Linear(6, 4)).double(), data(4, 6)
    for module in model.modules() if whole else [model[0]]:
        module.training = False
    before, wanted = copy.deepcopy(model.state_dict()), expected(model, batch)
    found = scores(model, batch)
    assert not model[0].merged and not model[0].training and model.training is not whole
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert_equal(found, wanted)


def test_what_a_forward_stores_is_no_tensor_of_a_transform():
    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out, self.seen = nn.Conv1d(6, 6, 1), nn.Linear(6, 4), None
            self.register_buffer("mean", torch.zeros(3, 6))

        def forward(self, x):
            rows = self.first(x.transpose(1, 2)).transpose(1, 2).tanh()
            self.seen, self.mean = rows.detach(), rows.detach().mean(0)
            return self.out(rows.sum(1))

    model = randomized(Storing())
    scores(model, data(4, 3, 6))
    copy.deepcopy(model)
    assert model.state_dict()["mean"].numpy().shape == (3, 6)


def test_a_mode_that_is_passed_on_by_hand_reaches_what_no_one_registered():
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out, self.parts = nn.Linear(6, 6), nn.Linear(6, 4), [nn.Dropout(0.9)]

        def train(self, mode: bool = True):
            for part in self.parts:
                part.train(mode)
            return super().train(mode)

        def forward(self, x):
            return self.out(self.parts[0](self.first(x).tanh()).sum(1))

    model, batch = randomized(Passing()).train(), data(4, 3, 6)
    found = scores(model, batch)
    assert model.training and model.parts[0].training
    assert_equal(found, expected(model.eval(), batch))


def test_a_module_that_overrules_its_mode_evaluates_all_the_same():
    class Always(nn.Dropout):
        def train(self, mode: bool = True):
            return super().train(True)

    model, batch = randomized(Net(lambda layer, x: torch.tanh(layer(x)))), data(4, 3, 6)
    plain = expected(model, batch)
    model.drop = Always(0.9)
    model.out = nn.Sequential(model.drop, model.out)
    found = {name.replace("out.1.", "out."): score for name, score in scores(model, batch).items()}
    assert_equal(found, plain)


def test_one_sample_behind_a_batch_norm():
    """torch 2.14 on the CPU gives wrong gradients where that of the output is laid out as after a transposition."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(2))
    model = randomized(nn.Sequential(model, Net(lambda layer, x: layer(x.transpose(1, 2)[..., :6]))))
    x, y = torch.randn(4, 3, 4, 4).double(), torch.arange(4)
    whole = scores(model, (x, y))
    alone = [(x[n : n + 1], y[n : n + 1]) for n in range(4)]
    labels = [label for _, label in alone]
    found = sensitivities(model, alone, labels=labels, estimator="sampled-logit", include=["*"])
    assert_equal(found, whole)


def test_threads_that_score_at_once_leave_the_process_as_it_was():
    """What is switched off is the process's. The second began within the first and ended after it: it kept it off."""
    plain = torch.utils.checkpoint.CheckpointFunction.apply
    first_in, second_in = threading.Event(), threading.Event()

    class Waiting(nn.Linear):
        def __init__(self, then) -> None:
            super().__init__(4, 3)
            self.then = then

        def forward(self, x):
            self.then()
            return super().forward(x)

    def run(then) -> None:
        sensitivities(Waiting(then), [(torch.randn(5, 4), torch.arange(5) % 3)])

    first = threading.Thread(target=run, args=(lambda: first_in.set() or second_in.wait(0.5),))
    second = threading.Thread(target=run, args=(lambda: second_in.set() or first.join(0.5),))
    first.start()
    assert first_in.wait(60)
    second.start()
    first.join()
    second.join()
    assert torch.utils.checkpoint.CheckpointFunction.apply == plain
    assert torch.backends.mha.get_fastpath_enabled() and torch._dynamo.eval_frame._stance.stance == "default"
