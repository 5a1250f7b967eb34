"""Text tasks whose answers differ from example to example, scored by a T5."""

import numpy as np
import pytest
import torch
from tiny_models import text_task, write_bert, write_t5

from talos_fast import TalosError, calibrate, evaluate, models
from talos_fast.tasks import Split, Task


def choice_task() -> Task:
    """Ten questions whose answers differ, in words the tiny tokenizer knows."""
    rows = [("red", "green"), ("blue", "warm cold"), ("sky", "sea"), ("fire", "grass"), ("ice", "good")] * 2
    split = Split([f"{a} of the {b}" for a, b in rows], np.array([0, 1] * 5), choices=rows)
    return Task("choices", ("A", "B"), (), split, split.select([0, 1, 2]), split)


def test_t5_scores_the_choices_of_each_example(tmp_path):
    """Each row's scores are those of a model whose class names are that row's choices."""
    torch.manual_seed(0)
    backbone, task = models.load(f"t5:{write_t5(tmp_path)}"), choice_task()
    model = backbone.classifier(task)
    batch = next(iter(backbone.batches(task.test, batch_size=10)))
    assert batch["choice_ids"].shape[:2] == (10, 2)
    with torch.no_grad():
        scores = model(**{key: value for key, value in batch.items() if key != "labels"})
        for row in range(5):
            one = task.test.select([row])
            alone = Task("one", one.choices[0], (), *(Split(one.inputs, one.labels),) * 3)
            inputs = backbone.prepare(one.inputs)
            torch.testing.assert_close(backbone.classifier(alone)(**inputs)[0], scores[row], rtol=1e-4, atol=1e-4)
    assert 0 <= float(evaluate(model, backbone.batches(task.test, batch_size=4))) <= 1
    mask = calibrate(model, backbone.batches(task.train, batch_size=5), rounds=1, progress=False)
    assert mask.selected == int(0.1 * mask.numel)


def test_choices_are_checked(tmp_path):
    with pytest.raises(TalosError, match="choices: found 1 for 2 inputs"):
        Split(["x", "y"], np.array([0, 1]), choices=[("a", "b")])
    two, three = (Split(["x", "y"], np.array([0, 1]), choices=[names] * 2) for names in (("a", "b"), ("a", "b", "c")))
    with pytest.raises(TalosError, match=r"found \[3\] choices an example for 2 class names"):
        Task("t", ("A", "B"), (), two, two, three)
    with pytest.raises(TalosError, match="found no choices an example"):
        Task("t", ("A", "B"), (), two, two, Split(["x"], np.array([0])))
    with pytest.raises(TalosError, match="use a T5"):
        models.load(f"hf:{write_bert(tmp_path)}").classifier(choice_task())
    assert not text_task().has_choices
