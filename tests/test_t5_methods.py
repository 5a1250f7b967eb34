"""T5 under all five methods: a small one on real texts, and T5-Large's own configuration without its memory."""

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from talos_fast import calibrate, finetune, tasks
from talos_fast.evaluate import evaluate_along
from talos_fast.methods import METHODS
from talos_fast.methods.l_lora import lora_adapters
from talos_fast.models.t5 import T5Backbone
from talos_fast.restoring import restoring_parameters
from talos_fast.sensitivity.selection import maskable_parameters
from talos_fast.tasks import Split, Task

RATES = {"nonlinear": 2e-3, "linearized": 2e-3, "l-lora": 3e-2, "lota": 5e-3, "talos": 1e-2}


def shortened(task: Task, keep: tuple[int, ...], words: int = 12) -> Task:
    """Some classes of a task of real texts, each text cut off after some words."""

    def split(of: Split, size: int) -> Split:
        chosen = [i for i, label in enumerate(of.labels) if label in keep][:size]
        part = of.select(chosen)
        return Split(
            [" ".join(str(t).lower().split()[:words]) for t in part.inputs], [keep.index(y) for y in part.labels]
        )

    names = tuple(task.class_names[label].lower() for label in keep)
    return Task(task.name, names, (), split(task.train, 600), split(task.validation, 100), split(task.test, 150))


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """The most frequent words of some texts, with `<pad>` 0, `</s>` 1 and `<unk>` 2."""
    splitter = pre_tokenizers.Whitespace()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = ["<pad>", "</s>", "<unk>", *(word for word, _ in counts.most_common(1500))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


@pytest.fixture(scope="module")
def pretrained(data_dir):
    """A small T5 that has learned three intents of snips, and a task of three others that it has not seen."""
    snips = tasks.load(data_dir / "snips.jsonl.gz")
    known, new = shortened(snips, (0, 1, 2)), shortened(snips, (3, 4, 5))
    names = [name for task in (known, new) for name in task.class_names] * 100
    tokenizer = word_tokenizer([*known.train.inputs, *new.train.inputs, *names])
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    backbone = T5Backbone("small T5", T5ForConditionalGeneration(config), tokenizer)
    options = {"method": "nonlinear", "lr": 3e-3, "steps": 40, "clip": None, "progress": False}
    finetune(backbone.classifier(known), backbone.batches(known.train, batch_size=16, shuffle=True), **options)
    return backbone, new, backbone.classifier(new)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_t5_learns_real_texts_by_every_method(pretrained, method):
    backbone, task, classifier = pretrained
    batches = backbone.batches(task.train, batch_size=16, shuffle=True)
    options = {}
    if method == "talos":
        sample = backbone.batches(task.train, batch_size=16, limit=64)
        options["mask"] = calibrate(classifier, sample, density=0.1, progress=False)
    with restoring_parameters(dict(classifier.named_parameters())):
        vector = finetune(
            classifier, batches, method=method, lr=RATES[method], steps=40, weight_decay=0.0, schedule="constant",
            progress=False, **options,
        )  # fmt: skip
    test = list(backbone.batches(task.test, batch_size=75))
    before, after = (float(accuracy) for accuracy in evaluate_along(classifier, vector, test, [0.0, 1.0]))
    assert after > before + 0.15, (before, after)


def test_t5_large_is_covered_by_name():
    """On the meta device: every query and value has its adapter, and a mask may select all but the embeddings."""
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
        )
    model.tie_weights()  # which transformers 5.0 leaves out on meta
    total = sum(p.numel() for p in model.parameters())
    assert 737e6 < total < 738e6
    adapters = lora_adapters(model, 16)
    assert len(adapters) == (24 + 2 * 24) * 2  # encoder, decoder and cross attention; q and v
    assert sum(adapter.b.numel() for adapter in adapters) == 144 * 1024 * 16
    maskable = maskable_parameters(model)
    left_out = {name for name, _ in model.named_parameters()} - maskable.keys()
    assert {name.rsplit(".", 2)[-2] for name in left_out} == {"shared", "relative_attention_bias"}
