"""Per-sample squared gradients of whole architectures, in float64: every parameter, without the fallback."""

import logging

import pytest
import torch
from oracles import assert_equal, by_loop, by_vmap, logit, randomized, uncovered
from torch import nn

from talos_fast.sensitivity import sensitivities


@pytest.fixture(autouse=True)
def all_covered(caplog):
    """Nothing here may need torch.func, unless the test says so."""
    with caplog.at_level(logging.WARNING, "talos_fast"):
        yield
    assert not uncovered(caplog)


def images(samples: int = 4, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, 3, 32, 32).double(), torch.randint(0, classes, (samples,))


def texts(vocabulary: int = 40, samples: int = 4, classes: int = 3) -> dict[str, torch.Tensor]:
    mask = torch.ones(samples, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(3, vocabulary, (samples, 9)), "attention_mask": mask,
            "labels": torch.randint(0, classes, (samples,))}  # fmt: skip


def check(model, forward, batch, zero=(), include=("*",)) -> None:
    labels = batch["labels"] if isinstance(batch, dict) else batch[1]
    options = {"forward": forward, "estimator": "sampled-logit", "labels": [labels]}
    found = sensitivities(model, [batch], include=include, **options)
    if include == ("*",):
        assert len(found) == len(list(model.parameters()))
    assert_equal(found, by_loop(model, forward, batch, labels), zero)


def on_images(model, batch):
    return model(batch[0])


def test_open_clip_vision_transformer():
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(32, 8, 48, 2, 3, 4.0, output_dim=24)
    model, batch = randomized(nn.Sequential(tower, nn.Linear(24, 5))), images()
    found = sensitivities(model, [batch], estimator="sampled-logit", labels=[batch[1]], include=["*"])
    assert len(found) == len(list(model.parameters()))
    assert_equal(found, by_vmap(model, logit, batch))


def test_timm_vision_transformer():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3,
                              num_classes=5, init_values=0.1)  # fmt: skip
    check(randomized(model), on_images, images())


def test_resnet_in_evaluation_mode():
    """Convolutions of every stride, batch norms with running statistics, in-place activations."""
    import timm

    check(randomized(timm.create_model("resnet10t", num_classes=5)), on_images, images())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                        num_labels=3, attn_implementation=attention)  # fmt: skip
    model = randomized(BertForSequenceClassification(config))
    check(model, lambda m, b: m(b["input_ids"], b["attention_mask"]).logits, texts(), zero=["key.bias"])


def test_gpt2_with_transposed_weights():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, num_labels=3, pad_token_id=0, bos_token_id=1,
                        eos_token_id=2)  # fmt: skip
    check(randomized(GPT2ForSequenceClassification(config)), lambda m, b: m(b["input_ids"]).logits, texts())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_t5_choice_scores(attention, tied, masked):
    """Encoder, decoder, cross attention, RMS norms, relative positions, and one embedding used three times.

    The decoder's tokens are the same for every sample, so that only gradients tell whose rows they are.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    if attention == "sdpa" and not T5ForConditionalGeneration._supports_sdpa:
        pytest.skip("this transformers knows no sdpa of T5")
    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=tied)  # fmt: skip
    model = randomized(T5ForConditionalGeneration._from_config(config, attn_implementation=attention))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn(40, 32).double() * 0.3)
    choices = torch.randint(1, 40, (2, 5))

    def forward(model, batch):
        samples = len(batch["labels"])
        mask = batch["attention_mask"] if masked else None
        encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=mask)[0].repeat_interleave(2, 0)
        logits = model(encoder_outputs=(encoded,), labels=choices.repeat(samples, 1)).logits
        return logits.log_softmax(-1).gather(-1, choices.repeat(samples, 1)[..., None]).view(samples, 2, -1).sum(-1)

    check(model, forward, texts(samples=3, classes=2))


def test_a_decoder_of_one_token(caplog):
    """Its own queries and keys have no gradient: what either side computes is rounding, and no reason to fall back."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)

    def forward(model, batch):
        start = torch.zeros(len(batch["labels"]), 1, dtype=torch.long)
        return model(input_ids=batch["input_ids"], decoder_input_ids=start).logits[:, -1, :4]

    batch = {"input_ids": torch.randint(0, 40, (8, 10)), "labels": torch.arange(8) % 4}
    sensitivities(model, [batch], forward=forward)
    assert "disagrees" not in caplog.text


def clip_model():
    from transformers import CLIPConfig, CLIPModel

    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        vision_config={**common, "image_size": 32, "patch_size": 8}, projection_dim=16,
        text_config={**common, "vocab_size": 40, "max_position_embeddings": 9, "eos_token_id": 2, "bos_token_id": 1,
                     "pad_token_id": 0},
    )  # fmt: skip
    return randomized(CLIPModel(config))


def test_hugging_face_clip_on_images():
    model, (pixels, labels), directions = clip_model(), images(), torch.randn(5, 16).double()

    def forward(model, batch):
        features = model.get_image_features(pixel_values=batch["pixel_values"])
        features = getattr(features, "pooler_output", features)
        return model.logit_scale.exp() * nn.functional.normalize(features, dim=-1) @ directions.T

    include = ("vision*", "visual_projection*", "logit_scale")
    check(model, forward, {"pixel_values": pixels, "labels": labels}, ["k_proj.bias"], include)


def test_hugging_face_clip_on_texts():
    """Pooled at the end-of-text token, which is somewhere else in every text."""
    model, batch, directions = clip_model(), texts(), torch.randn(3, 16).double()
    batch["input_ids"][torch.arange(4), torch.tensor([3, 5, 8, 2])] = 2

    def forward(model, batch):
        features = model.get_text_features(input_ids=batch["input_ids"])
        features = getattr(features, "pooler_output", features)
        return model.logit_scale.exp() * nn.functional.normalize(features, dim=-1) @ directions.T

    check(model, forward, batch, ["k_proj.bias"], ("text*", "logit_scale"))
