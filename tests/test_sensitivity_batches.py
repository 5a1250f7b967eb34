"""Batches, outputs and labels out of the ordinary: taken apart, or refused with the reason."""

import os
from collections import UserDict
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from oracles import assert_equal, by_loop, data, randomized, scores, uncovered
from sensitivity_cases import Net, expected
from torch import nn

from talos_fast import TalosError
from talos_fast.batch import take, to_device
from talos_fast.sensitivity import sensitivities

pytestmark = pytest.mark.usefixtures("logged")


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


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [list, tuple])
def test_texts_are_cut_with_their_labels(kind, size):
    """A forward that tokenizes by itself; a list of as many columns as samples is no column."""
    net, (x, y) = randomized(Net(lambda layer, x: torch.tanh(layer(x)))), data(size, 3, 6)
    rows = {f"text {n}": row for n, row in enumerate(x)}

    def forward(model, batch):
        first, second = batch["pairs"]
        assert batch["size"] == [3, 6] and batch["maybe"] == [1, None] and first == second == batch["texts"]
        assert batch["classes"] == ["a", "b", "c"] and batch["scale"] == 2
        return model(torch.stack([rows[text] for text in batch["texts"]]))

    texts = kind(rows)
    batch = {"texts": texts, "pairs": [texts, texts], "size": [3, 6], "maybe": [1, None], "labels": y}
    batch |= {"classes": ["a", "b", "c"], "scale": torch.tensor(2.0)}
    found = sensitivities(net, [batch], forward=forward, estimator="empirical")
    assert_equal(found, sensitivities(net, [(x, y)], estimator="empirical"))


@pytest.mark.parametrize("make", [os.fsencode, Path])
def test_bytes_and_paths_are_cut_as_texts_are(make):
    column = [make(name) for name in "abc"]
    assert take({"files": column}, 1, 3, 3) == {"files": column[1:]}


def test_a_tuple_with_names_is_no_column_of_texts():
    class Pair(NamedTuple):
        question: str
        answer: str

    assert take(Pair("q", "a"), 0, 1, 2) == Pair("q", "a")


def test_a_mapping_keeps_its_type():
    """A forward may ask for what only that type has, such as its keys as attributes."""
    batch = (encoding({"ids": torch.ones(2)}), torch.ones(2))
    assert torch.equal(to_device(batch, torch.device("cpu"))[0].ids, torch.ones(2))
