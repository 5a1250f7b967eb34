"""The rounds of a calibration: what each of them keeps, draws, watches, and takes up again."""

from dataclasses import replace

import pytest
import torch
from test_calibrate import batches, model

from talos_fast import TalosError, calibrate
from talos_fast.ranks import Ranks
from talos_fast.rounds import RoundFile, Survivors, data_digest
from talos_fast.sensitivity.scorer import Scorer
from talos_fast.stability import watched_rows


def test_one_entry_at_least_is_selected():
    assert calibrate(model(), batches(), density=1e-9, progress=False).selected == 1


def test_the_watched_rows_have_their_share_of_few_entries(monkeypatch):
    """Of 100 watched rows' entries less than half of one would be selected."""
    monkeypatch.setattr("talos_fast.stability.WATCHED", 100)
    mask = calibrate(model(), batches(), density=1e-3, progress=False)
    assert 0 < mask.selected <= 2 and 0 <= mask.info["stability"] <= 1


def test_every_round_draws_probes_of_its_own(monkeypatch):
    seeds, score = [], Scorer.score

    def watched(self, data, ledger, seed, *rest, **options):
        seeds.append(seed)
        return score(self, data, ledger, seed, *rest, **options)

    monkeypatch.setattr(Scorer, "score", watched)
    calibrate(model(), batches(), rounds=3, seed=5, progress=False)
    assert len(set(seeds)) == 3


def test_the_rows_that_are_watched_are_those_of_every_run(monkeypatch):
    monkeypatch.setattr("talos_fast.stability.WATCHED", 100)
    parameters = dict(model().named_parameters())
    once, again = watched_rows(parameters), watched_rows(parameters)
    assert len(once["2.weight"]) < 20 and all(torch.equal(once[name], again[name]) for name in once)


def test_before_the_first_round_nothing_is_stable():
    assert Survivors.all(dict(model().named_parameters()), halves=True).stability is None


def test_what_a_file_keeps_is_what_is_taken_up(tmp_path):
    parameters = {"odd:name": torch.zeros(3), **dict(model().named_parameters())}
    file = RoundFile(tmp_path, {}, resume=True)
    state = replace(Survivors.all(parameters, halves=True), round=2, seconds=3.5, samples=7)
    file.save(state, Ranks())
    found = file.load(parameters, Ranks())
    assert (found.round, found.seconds, found.samples, len(found.halves)) == (2, 3.5, 7, 2)
    del parameters["odd:name"]
    with pytest.raises(TalosError, match="of a run with parameters="):
        file.load(parameters, Ranks())


def test_of_no_batch_there_is_a_digest_too():
    """What is missing is said by who reads them."""
    assert data_digest([], Ranks()) == "0"


def test_ranks_that_see_different_checkpoints_are_refused(tmp_path, monkeypatch):
    parameters, file = dict(model().named_parameters()), RoundFile(tmp_path, {}, resume=True)
    file.save(replace(Survivors.all(parameters, halves=True), round=1), Ranks())
    assert file.load(parameters, Ranks()).round == 1
    monkeypatch.setattr(Ranks, "agree", lambda self, number: number == 0)  # another rank sees none
    with pytest.raises(TalosError, match="not the same file on all ranks; put checkpoint_dir on a shared"):
        file.load(parameters, Ranks())
