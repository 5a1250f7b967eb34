"""Every kind of model behind one interface: shared encoder, frozen heads, batches, and errors that say what to do."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    WordTokenizer,
    image_task,
    text_task,
    tiny_clip,
    tiny_timm,
    write_bert,
    write_t5,
)
from torch import nn

from talos_fast import models
from talos_fast.errors import TalosError
from talos_fast.models import Backbone, ChoiceHead, Classifier, CosineHead
from talos_fast.models.encoders import EncoderBackbone
from talos_fast.models.open_clip import OpenClipBackbone
from talos_fast.tasks import Split, Task

KINDS = ["clip", "timm", "bert", "t5"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backbone(kind: str, tmp_path: Path) -> Backbone:
    torch.manual_seed(0)
    if kind == "clip":
        return tiny_clip()
    if kind == "timm":
        return tiny_timm()
    return models.load(str(write_bert(tmp_path) if kind == "bert" else write_t5(tmp_path)))


def task_for(backbone: Backbone, name: str = "one", classes: int = 3) -> Task:
    return image_task(name, classes) if backbone.modality == "image" else text_task(name, classes)


def logits_of(classifier: Classifier, batch) -> torch.Tensor:
    if isinstance(batch, dict):
        return classifier(**{k: v for k, v in batch.items() if k != "labels"})
    return classifier(batch[0])


def test_batch_to_logits(backbone):
    task = task_for(backbone)
    classifier = backbone.classifier(task)
    assert not classifier.training
    sizes = []
    for batch in backbone.batches(task.test, batch_size=8):
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        sizes.append(len(labels))
        logits = logits_of(classifier, batch)
        assert logits.shape == (len(labels), 3)
        assert logits.isfinite().all()
        assert labels.dtype == torch.int64
    assert sizes == [8, len(task.test) - 8]  # the last, smaller batch is there


def test_heads_are_buffers_and_names_agree_between_tasks(backbone):
    one, two = (backbone.classifier(task_for(backbone, name, k)) for name, k in (("one", 3), ("two", 4)))
    assert list(one.head.parameters()) == []
    names = [name for name, _ in one.named_parameters()]
    assert names == [name for name, _ in two.named_parameters()]
    assert all(name.startswith("encoder.") for name in names)
    assert one.encoder is two.encoder is backbone.encoder


def test_every_parameter_receives_a_gradient(backbone):
    task = task_for(backbone)
    classifier = backbone.classifier(task).train()
    assert classifier.encoder.training and classifier.head.training
    batch = next(iter(backbone.batches(task.train, batch_size=8)))
    logits_of(classifier, batch).logsumexp(-1).sum().backward()
    without = [name for name, parameter in classifier.named_parameters() if parameter.grad is None]
    assert without == []


def test_dtype_and_copies(backbone):
    task = task_for(backbone)
    classifier = backbone.classifier(task)
    batch = next(iter(backbone.batches(task.test, batch_size=4)))
    expected = logits_of(classifier, batch)
    double = copy.deepcopy(classifier).double()
    assert torch.allclose(logits_of(double, batch).float(), expected, atol=1e-4)
    half = copy.deepcopy(classifier).bfloat16()
    assert torch.allclose(logits_of(half, batch).float(), expected, atol=0.6)
    assert torch.equal(logits_of(classifier, batch), expected)  # the copies shared nothing


def test_a_head_is_of_the_dtype_that_the_encoder_was_cast_to(backbone):
    task = task_for(backbone)
    backbone.classifier(task).bfloat16()  # and with it the encoder of all
    batch = next(iter(backbone.batches(task.test, batch_size=4)))
    assert logits_of(backbone.classifier(task), batch).isfinite().all()


def test_jvp_goes_through(backbone):
    classifier = backbone.classifier(task_for(backbone))
    parameters = dict(classifier.named_parameters())
    batch = next(iter(backbone.batches(task_for(backbone).test, batch_size=2)))
    inputs = {k: v for k, v in batch.items() if k != "labels"} if isinstance(batch, dict) else {}
    args = () if inputs else (batch[0],)

    def function(values):
        return torch.func.functional_call(classifier, values, args, inputs)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            direction = {name: 0.01 * torch.randn_like(value) for name, value in parameters.items()}
            _, tangent = torch.func.jvp(function, (parameters,), (direction,))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert tangent.abs().max() > 0


def test_loader_order_and_limit(backbone):
    task = task_for(backbone)

    def order(**kwargs) -> list[int]:
        loader = backbone.batches(numbered, batch_size=3, **kwargs)
        return [int(v) for b in loader for v in (b["labels"] if isinstance(b, dict) else b[1])]

    numbered = Split(task.train.inputs, np.arange(len(task.train)))
    everything = list(range(len(task.train)))
    assert order() == everything
    assert sorted(order(shuffle=True)) == everything != order(shuffle=True)
    assert order(shuffle=True, seed=1) == order(shuffle=True, seed=1) != order(shuffle=True, seed=2)
    assert order(limit=5) == sorted(order(limit=5)) == sorted(order(limit=5, shuffle=True))
    assert len(set(order(limit=5))) == 5
    assert everything[:5] != order(limit=5) == order(limit=5) != order(limit=5, seed=1)
    loader = backbone.batches(numbered, batch_size=len(task.train), shuffle=True)
    first, second = (next(iter(loader)) for _ in range(2))
    assert not torch.equal(*(b["labels"] if isinstance(b, dict) else b[1] for b in (first, second)))


@pytest.mark.parametrize("total", [21, 22, 24, 26])
def test_shares_of_a_batch(total):
    """Three ranks have together what one has, but for what does not divide, in as many batches each."""
    numbered = Split(np.zeros((total, 8, 8, 3), np.uint8), np.arange(total))

    def batches(**share) -> list[list[int]]:
        loader = tiny_timm().batches(numbered, batch_size=6, shuffle=True, seed=3, **share)
        found = [labels.tolist() for _, labels in loader]
        assert len(loader) == len(found)
        return found

    shares = [batches(rank=rank, world=3) for rank in range(3)]
    whole = [batch[: len(batch) // 3 * 3] for batch in batches() if len(batch) >= 3]
    dealt = [
        [number for triple in zip(*parts, strict=True) for number in triple] for parts in zip(*shares, strict=True)
    ]
    assert dealt == whole
    with pytest.raises(TalosError, match="batch_size: found 6, for 4 processes; give a multiple of 4"):
        batches(rank=0, world=4)


@pytest.mark.parametrize("argument", ["batch_size", "limit"])
def test_loader_refuses_nothing(argument):
    with pytest.raises(TalosError, match=f"{argument}: found 0"):
        tiny_timm().batches(image_task().train, **{"batch_size": 2, argument: 0})
    with pytest.raises(TalosError, match="seed=-1"):
        tiny_timm().batches(image_task().train, batch_size=2, seed=-1)


def test_texts_are_asked_for(tmp_path):
    backbone = models.load(str(write_bert(tmp_path)))
    for wrong in ([], np.zeros((1, 2)), [b"red"]):
        with pytest.raises(TalosError, match="without texts; give a list of at least one str"):
            backbone.prepare(wrong)
    t5 = models.load(str(write_t5(tmp_path / "t5")))
    assert t5.prepare(["red " * 200])["input_ids"].shape == (1, 128), "the paper's longest input"


def test_other_modality_is_refused(backbone):
    other = text_task() if backbone.modality == "image" else image_task()
    with pytest.raises(TalosError, match=f"takes {backbone.modality} tasks"):
        backbone.classifier(other)
    with pytest.raises(TalosError, match="use another model"):
        backbone.batches(other.test, batch_size=2)


def test_head_with_parameters_is_refused():
    with pytest.raises(TalosError, match=r"found the parameters \['weight', 'bias'\]"):
        Classifier(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.full((2, 3), float("nan")), torch.ones(3)])
def test_directions_are_checked(bad):
    with pytest.raises(TalosError, match="directions"):
        CosineHead(bad, 1.0)


def test_clip_head_is_open_clips_own():
    backbone, task = tiny_clip(), image_task()
    images = next(iter(backbone.batches(task.test, batch_size=6)))[0]
    classifier = backbone.classifier(task)
    with torch.no_grad():
        texts = WordTokenizer()([t.format(c) for c in task.class_names for t in task.templates])
        words = backbone.model.encode_text(texts, normalize=True).view(3, 2, -1).mean(1)
        words = nn.functional.normalize(words, dim=-1)
        expected = backbone.model.logit_scale.exp() * backbone.model.encode_image(images, normalize=True) @ words.T
        assert torch.allclose(classifier(images), expected, atol=1e-5)
    # The text tower made the head and is no part of the encoder.
    assert len(list(classifier.parameters())) == len(list(backbone.model.visual.parameters()))


def test_clip_takes_openai_s_templates_where_a_task_has_none_and_no_tower_that_gives_tokens(monkeypatch):
    backbone, task = tiny_clip(), replace(image_task(), templates=("a photo of the {}",))
    monkeypatch.setattr("open_clip.OPENAI_IMAGENET_TEMPLATES", task.templates)
    heads = [backbone.classifier(each).head for each in (task, replace(task, templates=()))]
    assert torch.equal(heads[0].weight, heads[1].weight)
    backbone.model.visual.output_tokens = True
    with pytest.raises(TalosError, match="returns tokens beside the image vector"):
        OpenClipBackbone("tokens", backbone.model, WordTokenizer())


def test_class_mean_head():
    backbone, task = tiny_timm(), image_task()
    backbone.encoder.norm = nn.Identity()  # features of different lengths
    backbone.encoder.pos_drop = nn.Dropout(0.5)
    backbone.encoder.train()  # without its dropout while heads are made
    head = backbone.classifier(task).head
    backbone.encoder.eval()
    with torch.no_grad():
        features = nn.functional.normalize(backbone.encoder(backbone.prepare(task.train.inputs)), dim=-1)
    for label in range(3):
        mean = features[torch.from_numpy(task.train.labels) == label].mean(0)
        assert torch.allclose(head.weight[:, label], nn.functional.normalize(mean, dim=0), atol=1e-5)
    empty = Task("gap", ("a", "b", "c", "d"), (), task.train, task.validation, task.test)
    with pytest.raises(TalosError, match="class 'd' has no training image"):
        backbone.classifier(empty)


def test_class_means_are_of_a_few_images(monkeypatch):
    monkeypatch.setattr("talos_fast.models.timm.IMAGES_A_CLASS", 2)
    backbone, seen = tiny_timm(), []
    backbone.encoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    task = image_task(classes=3, per_split=24)
    backbone.classifier(task)
    assert sum(map(len, seen)) == 3 * 2
    first = backbone.prepare(task.train.inputs[:6])
    assert not all((first == image).flatten(1).all(1).any() for image in torch.cat(seen)), "they are drawn"


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_text_head_is_the_mean_of_the_normalised_prompts(pooling, tmp_path):
    backbone = models.load(str(write_bert(tmp_path)))
    backbone.pooling = pooling
    task = replace(text_task(), templates=("the {} is", "good {} of the sea"))
    backbone.encoder.train()  # without its dropout while heads are made
    head = backbone.classifier(task).head
    with torch.no_grad():
        for k, name in enumerate(task.class_names):
            alone = [backbone.prepare([template.format(name)]) for template in task.templates]
            hidden = [backbone.encoder(**tokens).last_hidden_state[0] for tokens in alone]
            vectors = [states.mean(0) if pooling == "mean" else states[0] for states in hidden]
            mean = sum(nn.functional.normalize(vector, dim=0) for vector in vectors)
            torch.testing.assert_close(head.weight[:, k], nn.functional.normalize(mean, dim=0), rtol=0, atol=1e-5)
    assert head.scale == 20, "that of sentence-transformers"


def test_encoder_pools_over_tokens_only_and_has_no_pooler(tmp_path):
    backbone = models.load(str(write_bert(tmp_path)))
    assert not any("pooler" in name for name, _ in backbone.encoder.named_parameters())
    classifier = backbone.classifier(text_task())
    alone = classifier(**backbone.prepare(["red is"]))
    padded = classifier(**backbone.prepare(["red is", "the sky is blue the sea is green"]))[:1]
    assert torch.allclose(alone, padded, atol=1e-5)
    (tmp_path / "1_Pooling").mkdir()
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    cls = models.load(f"hf:{tmp_path}")
    hidden = cls.encoder(**cls.prepare(["red is"])).last_hidden_state[:, 0]
    assert torch.allclose(
        cls.classifier(text_task())(**cls.prepare(["red is"])), cls.classifier(text_task()).head(hidden)
    )
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(TalosError, match="pooling other than mean or CLS"):
        models.load(f"hf:{tmp_path}")


def test_t5_scores_are_the_losses_of_a_slow_loop(tmp_path):
    backbone = models.load(str(write_t5(tmp_path)), dtype=torch.float64)
    base = text_task()
    task = Task("t", ("yes", "no the sky is cold", "good sun"), (), base.train, base.validation, base.test)
    classifier = backbone.classifier(task)
    assert classifier.head.choice_ids.tolist()[0][2:] == [0] * 4  # yes </s> and padding
    texts = list(task.test.inputs[:4])
    scores = classifier(**backbone.prepare(texts))
    for i, text in enumerate(texts):
        tokens = backbone.prepare([text])
        for k, name in enumerate(task.class_names):
            labels = backbone.tokenizer([name], return_tensors="pt")["input_ids"]
            loss = backbone.encoder(**tokens, labels=labels).loss  # the mean over tokens
            assert torch.allclose(scores[i, k], -loss * labels.shape[1], atol=1e-10)


def test_t5_choices_of_their_own_for_each_text(tmp_path):
    backbone = models.load(str(write_t5(tmp_path)))
    classifier, tokens = backbone.classifier(text_task()), backbone.prepare(["red is good", "no"])
    ids = classifier.head.choice_ids
    scores = classifier(**tokens)
    mine = classifier(**tokens, choice_ids=torch.stack([ids, ids.flip(0)]))
    assert torch.allclose(mine, torch.stack([scores[0], scores[1].flip(0)]), atol=1e-5)
    assert isinstance(classifier.head, ChoiceHead)


def test_choices_are_scored_in_fp32():
    ids, logits = torch.tensor([[3, 1], [2, 1]]), torch.randn(2, 2, 2, 5).bfloat16()
    scores = ChoiceHead(ids, 0)(logits, ids.expand(2, -1, -1))
    assert scores.dtype is torch.float32
    assert torch.equal(scores, ChoiceHead(ids, 0)(logits.float(), ids.expand(2, -1, -1)))


def test_t5_refuses_choices_that_read_the_same(tmp_path):
    task = Task("t", ("zebra", "gnu"), (), *(Split(["a", "b"], np.array([0, 1])) for _ in range(3)))
    with pytest.raises(TalosError, match="same tokens"):
        models.load(str(write_t5(tmp_path))).classifier(task)


@pytest.mark.parametrize("padding", [0, 1])
def test_texts_are_cut_to_the_positions_that_a_roberta_counts(padding):
    """Its numbers start after that of the padding token, so that a table of 12 places takes 11 or 10 tokens."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12, pad_token_id=padding,
    )  # fmt: skip
    tokenizer = WordTokenizer()
    tokenizer.model_max_length = 10**30
    backbone = EncoderBackbone("hf:roberta", RobertaModel(config), tokenizer)
    assert backbone.max_length == 11 - padding
    ids = torch.full((1, backbone.max_length), 5)
    backbone.encoder(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        longer = torch.full((1, backbone.max_length + 1), 5)
        backbone.encoder(input_ids=longer, attention_mask=torch.ones_like(longer))
