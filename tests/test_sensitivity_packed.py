"""Rows that are not one a sample: of what is there, packed by lengths, or as many as samples by chance."""

import pytest
import torch
from oracles import assert_equal, by_loop, data, randomized, uncovered
from torch import nn

from talos_fast.sensitivity import sensitivities

pytestmark = pytest.mark.usefixtures("logged")


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
