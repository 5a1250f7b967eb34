"""Models, data and options out of the ordinary: scored exactly, or refused with the reason."""

import copy
import logging
from collections import UserDict
from types import MappingProxyType

import pytest
import torch
from oracles import assert_equal, by_loop, data, randomized, scores, uncovered
from torch import nn
from torch.nn import functional as F

from talos_fast import TalosError, evaluate
from talos_fast.sensitivity import sensitivities
from talos_fast.sensitivity.selection import maskable_parameters


@pytest.fixture(autouse=True)
def logged(caplog):
    with caplog.at_level(logging.INFO, "talos_fast"):
        yield


class Net(nn.Module):
    """A linear layer ``first``, whatever ``use`` makes of it, and a head."""

    def __init__(self, use) -> None:
        super().__init__()
        self.first, self.out, self.use = nn.Linear(6, 6), nn.Linear(6, 4), use

    def forward(self, x):
        return self.out(self.use(self.first, x).sum(1))


def mapped(layer, x):
    return torch.vmap(lambda row: torch.tanh(F.linear(row, layer.weight, layer.bias)))(x)


def expected(model, batch):
    return by_loop(model, lambda m, b: m(b[0]), batch, batch[1])


@pytest.mark.parametrize("samples", [1, 4])
def test_the_first_output_may_be_written_to(samples, caplog):
    """Of three dimensions it is a view, and nothing before it has a gradient."""
    model = randomized(Net(lambda layer, x: F.relu(layer(x), inplace=True)))
    batch = data(samples, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))
    assert not uncovered(caplog)


def test_a_transform_of_torch_func_inside_the_model(caplog):
    model, batch = randomized(Net(mapped)), data(4, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))
    assert uncovered(caplog) == ["first.weight", "first.bias"] and "a transform of torch.func" in caplog.text


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_traced_model_is_left_to_torch_func(caplog):
    model, batch = randomized(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))), data(4, 6)
    traced = torch.jit.trace(model, batch[0])
    assert_equal(scores(traced, batch), expected(model, batch))
    assert len(uncovered(caplog)) == 4


def test_a_parameter_without_entries():
    model, batch = randomized(Net(lambda layer, x: torch.tanh(layer(x)))), data(4, 3, 6)
    model.nothing = nn.Parameter(torch.zeros(0, 6).double())
    found = scores(model, batch)
    assert found.pop("nothing").shape == (0, 6)
    assert_equal(found, expected(model, batch))


def test_rounding_to_bfloat16_is_not_taken_for_a_wrong_rule(caplog):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Flatten(), nn.Linear(160, 4))
    x, y = torch.randn(4, 5, 32), torch.randint(0, 4, (4,))
    exact = scores(model.double(), (x.double(), y))
    for name, score in scores(model.bfloat16(), (x.bfloat16(), y)).items():
        assert score.dtype is torch.float32 and (score - exact[name]).abs().max() < 0.2 * exact[name].max(), name
    assert not uncovered(caplog)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_under_a_mode_without_gradients_and_with_tensors_made_there(mode):
    model, (x, y) = randomized(Net(lambda layer, x: torch.tanh(layer(x)))), data(4, 3, 6)
    truth = expected(model, (x, y))
    with mode():
        assert_equal(scores(model, (x * 1.0, y)), truth)


class Text(nn.Module):
    """Takes its input by name; only one of its layers has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Bilinear(6, 6, 6), nn.Linear(6, 4)

    def forward(self, ids):
        return self.out(torch.tanh(self.first(ids, ids)))


def encoding(batch):
    from transformers import BatchEncoding

    return BatchEncoding(batch)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("make", [
    encoding, lambda batch: UserDict(batch), lambda batch: MappingProxyType(batch),
], ids=["BatchEncoding", "UserDict", "read-only"])  # fmt: skip
def test_mappings_of_every_type_are_taken_apart(make, caplog):
    model, (x, y) = randomized(Text()), data(4, 6)
    options = dict(estimator="sampled-logit", labels=[y], include=["*"])
    found = sensitivities(model, [make({"ids": x, "labels": y})], **options)
    assert_equal(found, expected(model, (x, y)))
    assert uncovered(caplog) == ["first.weight", "first.bias"]
    forward = lambda model, batch: model(batch[0]["ids"])  # noqa: E731
    assert_equal(sensitivities(model, [(make({"ids": x}), y)], forward=forward, **options), found)


class Wrapped(nn.Linear):
    """Its logits inside what ``wrap`` makes of them."""

    def __init__(self, wrap) -> None:
        super().__init__(5, 4)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


def test_logits_in_a_mapping_are_found_and_in_a_tuple_asked_for():
    batch = data(4, 5)
    assert scores(randomized(Wrapped(lambda logits: {"loss": 0, "logits": logits})), batch)["weight"].max() > 0
    with pytest.raises(TalosError, match=r"batch 0: the model gave a tuple, not logits \(N, K\); pick them with forw"):
        scores(randomized(Wrapped(lambda logits: (logits, None))), batch)


def test_interaction_shows_once_there_is_a_second_sample():
    model, batch = randomized(Wrapped(lambda logits: logits - logits.mean(0))), data(4, 5)
    with pytest.raises(TalosError, match="batch 1: logits change with the other samples"):
        scores(model, (batch[0][:1], batch[1][:1]), batch)


def test_samples_that_are_not_in_the_first_dimension_are_asked_for():
    x, y = data(4, 3, 6)
    model = randomized(Net(lambda layer, x: torch.tanh(layer(x.transpose(0, 1)))))
    with pytest.raises(TalosError, match=r"logits of shape \(4, 4\) for 2 labels.*samples come first"):
        scores(model, (x.transpose(0, 1), y))
    turned = scores(model, (x, y), forward=lambda m, b: m(b[0].transpose(0, 1)))
    assert_equal(turned, by_loop(model, lambda m, b: m(b[0].transpose(0, 1)), (x, y), y))


def test_a_single_logit_is_refused_where_its_probability_is_asked_for():
    model, (x, _) = randomized(nn.Linear(5, 1)), data(4, 5)
    batch = (x, torch.zeros(4, dtype=torch.int64))
    for estimator in ("fisher", "sampled-logprob", "empirical"):
        with pytest.raises(TalosError, match=f"batch 0: a single logit.*estimator='{estimator}' would give 0"):
            sensitivities(model, [batch], estimator=estimator)
    assert sensitivities(model, [batch], estimator="jacobian")["weight"].min() > 0


@pytest.mark.parametrize("estimator, labels, message", [
    ("fisher", [torch.zeros(4, dtype=torch.int64)], "estimator='fisher' samples none"),
    ("empirical", [torch.zeros(4, dtype=torch.int64)], "estimator='empirical' samples none"),
    ("sampled-logit", [], "batch 0: labels= holds one tensor a batch, but only 0"),
    ("sampled-logit", [torch.zeros(1, dtype=torch.int64)], r"batch 0: labels= must be \(4,\) int64, but is \(1,\)"),
    ("sampled-logit", [torch.zeros(4)], r"must be \(4,\) int64, but is \(4,\) of torch.float32"),
    ("sampled-logprob", [torch.tensor([0, 1, 2, 4])], "batch 0: labels= 0 … 4, but the model has 4 classes, 0 … 3"),
])  # fmt: skip
def test_labels_that_cannot_be_injected_are_refused(estimator, labels, message):
    with pytest.raises(TalosError, match=message):
        sensitivities(nn.Linear(5, 4).double(), [data(4, 5)], estimator=estimator, labels=labels)


class Unpadded(nn.Module):
    """Computes on the tokens that are there, as encoders without padding and experts do: rows depend on the data."""

    def __init__(self, choose) -> None:
        super().__init__()
        self.body, self.norm, self.out = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4)
        self.choose = choose

    def forward(self, x, there):
        hidden = torch.zeros_like(x)
        index = self.choose(there)
        hidden[index] = self.norm(torch.tanh(self.body(x[index])))
        return self.out(hidden.sum(1))


@pytest.mark.parametrize("choose", [lambda there: there, lambda there: there.nonzero(as_tuple=True), torch.where])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_that_belong_to_other_samples_in_every_batch(choose, order, caplog):
    """The second batch has as many tokens as the first, and other samples have them."""
    model = randomized(Unpadded(choose))
    there = [torch.arange(8) < torch.tensor(lengths)[:, None] for lengths in ([8, 8, 8, 8], [8, 5, 2, 1])]
    there[0] &= torch.arange(8) < 4
    batches = [((torch.randn(4, 8, 6).double(), mask), torch.arange(4)) for mask in there]
    batches = [batches[n] for n in order]

    def forward(m, b):
        return m(*b[0])

    truth = [by_loop(model, forward, batch, batch[1]) for batch in batches]
    found = sensitivities(
        model, batches, forward=forward, estimator="sampled-logit", labels=[b[1] for b in batches], include="*"
    )
    assert_equal(found, {name: truth[0][name] + truth[1][name] for name in found})
    assert {"body.weight", "norm.weight"} <= set(uncovered(caplog))


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


class Packed(nn.Module):
    """Samples of several lengths in one axis of rows, packed and taken apart again in one of the usual ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.norm, self.out, self.how = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4), how

    def forward(self, x, lengths):
        return self.out(getattr(self, self.how)(x, lengths))

    def made(self, rows):
        return self.norm(self.first(rows).tanh())

    def cat(self, x, lengths):
        counts = lengths.tolist()
        rows = self.made(torch.cat([one[:n] for one, n in zip(x, counts, strict=True)]))
        return torch.stack([part.sum(0) for part in rows.split(counts)])

    def sequence(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        whole, _ = nn.utils.rnn.pad_packed_sequence(packed._replace(data=self.made(packed.data)), batch_first=True)
        return whole.sum(1)

    def argwhere(self, x, lengths):
        n, t = torch.argwhere(torch.arange(x.shape[1]) < lengths[:, None]).T
        return torch.zeros_like(x).index_put((n, t), self.made(x[n, t])).sum(1)

    def repeated(self, x, lengths):
        n = torch.repeat_interleave(input=torch.arange(len(x)), repeats=lengths)
        t = torch.cat([torch.arange(count) for count in lengths])
        return torch.zeros(len(x), 6, dtype=x.dtype).index_add(0, n, self.made(x[n, t]))


@pytest.mark.parametrize("how", ["cat", "sequence", "argwhere", "repeated"])
@pytest.mark.parametrize("batches", [[[4, 4, 3, 1]], [[4, 4, 4], [6, 4, 2], [5, 4, 3]]])
def test_samples_that_are_packed_by_their_lengths(how, batches):
    """Of equal lengths at first, so that their rows could be taken for those of all batches."""
    model, total = randomized(Packed(how)), {}
    given = []
    for lengths in batches:
        x, y = torch.randn(len(lengths), 6, 6).double(), torch.arange(len(lengths)) % 4
        batch = {"x": x, "lengths": torch.tensor(lengths), "labels": y}
        given.append(batch)
        for name, score in by_loop(model, lambda m, b: m(b["x"], b["lengths"]), batch, y).items():
            total[name] = total.get(name, 0) + score
    found = sensitivities(model, given, labels=[b["labels"] for b in given], estimator="sampled-logit", include=["*"])
    assert_equal(found, total)


@pytest.mark.parametrize("samples", [1, 4])
def test_an_output_that_is_a_view_may_be_written_to(samples, caplog):
    """As Longformer scales its queries; one sample alone loses the place that a hook is put on."""

    def scaled(layer, x):
        rows = layer(
            layer(x).tanh().transpose(0, 1).contiguous()
        )  # of the first layer nothing before it has a gradient
        rows *= 0.5
        return rows.transpose(0, 1).tanh()

    model, batch = randomized(Net(scaled)), data(samples, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))
    assert not uncovered(caplog)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_what_is_not_led_by_samples_is_not_cut(size, monkeypatch):
    """Two samples are examined, and `torch.func` gets chunks of some: what is as long as those is no row a sample."""
    monkeypatch.setattr("talos_fast.sensitivity.per_sample.CHUNK_ENTRIES", 3 * 36)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.out = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 4)

        def forward(self, x, shift):
            return self.out(torch.einsum("ni,oi->no", x, self.weight).tanh() + shift.sum())

    model, (x, y) = randomized(Scaled()), data(8, 6)
    batch = {"x": x, "shift": torch.randn(size).double(), "labels": y}
    found = sensitivities(model, [batch], labels=[y], estimator="sampled-logit", include=["*"])
    assert_equal(found, by_loop(model, lambda m, b: m(b["x"], b["shift"]), batch, y))


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


ODD = {
    "a vector": (lambda m, x: (F.linear(x, m.p[0]).softmax(-1)[..., None] * x).sum(1), (1, 6)),
    "complex numbers": (lambda m, x: F.linear(torch.fft.fft(x, dim=1), m.p.to(torch.complex128)).abs().sum(1), (6, 6)),
    "a complex product": (lambda m, x: (torch.fft.fft(x, dim=1) @ m.p.to(torch.complex128)).abs().sum(1), (6, 6)),
    "broadcast_to(*sizes)": (lambda m, x: (x + m.p.broadcast_to(len(x), 3, 6)).tanh().sum(1), (3, 6)),
    "repeat(repeats=)": (lambda m, x: (x + m.p.repeat(repeats=(len(x), 1, 1))).tanh().sum(1), (3, 6)),
    "no features": (lambda m, x: torch.cat([F.linear(x, m.p[:0]), x.tanh() * m.p[0]], -1).sum(1), (1, 6)),
}


@pytest.mark.parametrize("use", ODD)
def test_odd_uses_of_a_parameter(use):
    class Odd(nn.Module):
        def __init__(self, shape) -> None:
            super().__init__()
            self.p, self.out = nn.Parameter(torch.randn(shape)), nn.Linear(6, 4)

        def forward(self, x):
            return self.out(ODD[use][0](self, x))

    model, batch = randomized(Odd(ODD[use][1])), data(4, 3, 6)
    assert_equal(scores(model, batch), expected(model, batch))


@pytest.mark.parametrize("bag", [False, True])
def test_sparse_tables(bag):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.EmbeddingBag(4, 6, sparse=True) if bag else nn.Embedding(4, 6, sparse=True)
            self.out = nn.Linear(6, 4)

        def forward(self, x):
            rows = self.table((x[..., 0] > 0).long())
            return self.out(rows if bag else rows.tanh().sum(1))

    model, batch = randomized(Table()), data(4, 3, 6)
    dense = copy.deepcopy(model)
    dense.table.sparse = False
    assert_equal(scores(model, batch), expected(dense, batch))


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


@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "dinov2", "xlnet"])
def test_tables_of_positions_and_tokens_stay_frozen(name):
    names = {
        "tnt_s_patch16_224": ["encoder.patch_pos", "encoder.pixel_pos"],
        "dinov2": ["encoder.embeddings.register_tokens", "embeddings.mask_token"],
        "xlnet": ["transformer.mask_emb"],
    }[name]
    model = nn.Module()
    model.linear = nn.Linear(2, 2)
    for full in names:
        *path, last = full.split(".")
        owner = model
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    assert set(maskable_parameters(model)) == {"linear.weight", "linear.bias"}


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
