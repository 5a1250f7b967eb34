"""Loading by name, and what is said when that does not work."""

import dataclasses
import logging
import subprocess
import sys

import pytest
import torch
from tiny_models import WordTokenizer, image_task, text_task, tiny_clip, write_bert, write_t5, write_tokenizer
from torch import nn

from talos_fast import models
from talos_fast.demo import coverage
from talos_fast.errors import TalosError
from talos_fast.models.timm import _load_weights


def test_load_by_name(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "talos_fast"):
        backbone = models.load("vit_tiny_patch16_224", dtype=torch.bfloat16)
    assert "random weights" in caplog.text
    assert next(backbone.encoder.parameters()).dtype == torch.bfloat16
    assert "blocks.0.attn.qkv.weight" in dict(backbone.encoder.named_parameters())
    assert (backbone.preprocess.crop_fraction, backbone.preprocess.interpolation) == (0.9, "bicubic")
    t5 = write_t5(tmp_path / "t5")
    assert models.load(f"t5:{t5}").name.startswith("t5:")
    config = t5 / "config.json"
    config.write_text(config.read_text().replace('"t5"', '"mt5"').replace("T5For", "MT5For"))
    assert models.load(str(t5)).name == f"t5:{t5}"


def test_pictures_are_prepared_as_the_timm_model_was_trained():
    found = models.load("timm:resnet18.tv_in1k").preprocess
    assert found.mean == (0.485, 0.456, 0.406) and found.std == (0.229, 0.224, 0.225)
    assert (found.size, found.interpolation, found.crop_fraction) == ((224, 224), "bilinear", 0.875)


def test_a_timm_model_that_takes_squashed_pictures_gets_them(monkeypatch):
    import timm

    config = timm.data.resolve_data_config({"crop_mode": "squash"})
    monkeypatch.setattr(timm.data, "resolve_model_data_config", lambda model: config)
    assert models.load("timm:vit_tiny_patch16_224").preprocess.resize_mode == "squash"


def test_timm_weights_of_a_model_with_two_heads(tmp_path, caplog):
    import timm

    full = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3)
    torch.save(full.state_dict(), tmp_path / "deit.pth")
    encoder = models.load("timm:deit_tiny_distilled_patch16_224", pretrained=str(tmp_path / "deit.pth")).encoder
    expected = {name: p for name, p in full.named_parameters() if not name.startswith(("head.", "head_dist."))}
    assert encoder.state_dict().keys() == expected.keys() and "random weights" not in caplog.text
    assert all(torch.equal(p, expected[name]) for name, p in encoder.named_parameters())


def test_only_the_head_is_left_out_of_timm_weights_not_what_begins_like_it(tmp_path):
    class Encoder(nn.Module):
        pretrained_cfg = {"classifier": "fc"}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.fc_norm = nn.LayerNorm(3)

    torch.save({"fc_norm.weight": torch.ones(3), "fc_norm.bias": torch.ones(3), "fc.weight": torch.ones(2, 3)},
               tmp_path / "model.pth")  # fmt: skip
    encoder = Encoder()
    _load_weights(encoder, tmp_path / "model.pth")
    assert torch.equal(encoder.fc_norm.bias, torch.ones(3))


def test_open_clip_by_name_knows_quick_gelu(tmp_path, monkeypatch, caplog):
    import open_clip

    asked = {}

    def create(name, pretrained, **kwargs):
        asked.update(kwargs, name=name)
        return tiny_clip().model

    monkeypatch.setattr(open_clip, "create_model", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: WordTokenizer())
    models.load("ViT-B-32", pretrained="openai")
    assert asked["force_quick_gelu"] is True
    models.load("open_clip:ViT-B-32", pretrained="laion2b_s34b_b79k")
    assert asked["force_quick_gelu"] is False and asked["device"] == torch.device("cpu") and not caplog.text
    half = models.load("open_clip:local-dir:here", dtype=torch.bfloat16)
    assert asked["name"] == "local-dir:here" and not caplog.text
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    with pytest.raises(TalosError, match="local-dir:here carries its own weights, found 'openai'"):
        models.load("open_clip:local-dir:here", pretrained="openai")
    models.load("ViT-B-32")
    assert "ViT-B-32: random weights" in caplog.text


def test_errors_name_what_was_tried(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "config.json").write_text("{}")
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    t5 = write_t5(tmp_path / "t5")
    bert, bart = write_bert(tmp_path / "bert"), tmp_path / "bart"
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    BartForConditionalGeneration(BartConfig(vocab_size=24, **small)).save_pretrained(bart)
    write_tokenizer(bart, eos=True)
    write_tokenizer(tmp_path / "hollow", eos=True)
    (tmp_path / "hollow" / "config.json").write_text((t5 / "config.json").read_text())
    for arguments, message in [
        ({"name": "no-such-model"}, r"tried a directory with config\.json, \d+ names of open_clip, \d+ names of timm"),
        ({"name": "open_clip:ViT-B-33"}, "did you mean ViT-B-32"),
        ({"name": "timm:vit_tinny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"name": "RN50", "pretrained": str(tmp_path / "weights.pth")}, "open_clip:RN50 with .* could not be loaded"),
        ({"name": "ViT-B-32", "pretrained": "nobody"}, "neither a file nor a tag of ViT-B-32"),
        ({"name": "timm:vit_tiny_patch16_224", "pretrained": "nowhere.pth"}, "no file nowhere.pth"),
        ({"name": "timm:vit_tiny_patch16_224", "pretrained": str(tmp_path / "weights.pth")}, "not a whole file"),
        ({"name": str(tmp_path / "junk")}, "no model_type"),
        ({"name": f"hf:{t5}"}, "use t5:"),
        ({"name": f"t5:{bart}"}, "found 'bart'; give a T5"),
        ({"name": f"t5:{bert}"}, "could not be loaded|found 'bert'"),
        ({"name": "t5:./none"}, "t5:./none: no such folder"),
        ({"name": str(tmp_path / "hollow")}, "could not be loaded"),
        ({"name": str(bert), "pretrained": "x"}, "carries its own weights"),
        ({"name": "hf:nobody/nothing-here"}, "could not be loaded"),
        ({"name": "tiny", "device": "cuda:99"}, "device: cuda:99 cannot be used"),
        *(({"name": "tiny", "device": device}, f"device: {device} cannot be used") for device in ("meta", "hpu")),
    ]:
        with pytest.raises(TalosError, match=message):
            models.load(**arguments)


def test_timm_weights_of_another_model(tmp_path):
    from safetensors.torch import save_file

    save_file({"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(TalosError, match="of another model") as refusal:
        models.load("timm:vit_tiny_patch16_224", pretrained=str(tmp_path / "other.safetensors"))
    assert len(str(refusal.value)) < 600
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(TalosError, match=r"list\.pth: "):
        models.load("timm:vit_tiny_patch16_224", pretrained=str(tmp_path / "list.pth"))


@pytest.mark.parametrize("weights, said", [
    ({"positional_embedding": torch.zeros(9, 8)}, "width changed"), ({"w": torch.zeros(1)}, "Missing key"), ([1], ""),
])  # fmt: skip
def test_open_clip_weights_of_another_model(tmp_path, weights, said):
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(TalosError, match=r"open_clip:RN50 with .*other\.pt' could not be loaded: .*" + said) as refusal:
        models.load("open_clip:RN50", pretrained=str(tmp_path / "other.pt"))
    assert len(str(refusal.value)) < 600


def test_hf_weights_that_lack_a_tensor(tmp_path):
    from safetensors.torch import load_file, save_file

    file = write_bert(tmp_path) / "model.safetensors"
    state = {k: v for k, v in load_file(file).items() if "pooler" not in k}
    save_file(state, file, metadata={"format": "pt"})
    models.load(str(tmp_path))  # which drops the pooler
    state = {k: v for k, v in state.items() if "layer.1.output" not in k}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(TalosError, match="weights lack"):
        models.load(str(tmp_path))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TalosError, match="could not be loaded"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("write", [write_bert, write_t5])
def test_a_model_without_its_tokenizer(tmp_path, write):
    """transformers makes one that knows no word, without a warning."""
    for file in write(tmp_path).glob("*token*"):
        file.unlink()
    with pytest.raises(TalosError, match="its tokenizer knows no word; add its files, such as tokenizer.json"):
        models.load(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "3"])
def test_hf_pooling_that_is_no_object(tmp_path, content):
    (write_bert(tmp_path) / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(content)
    with pytest.raises(TalosError, match=r"1_Pooling/config\.json: not a JSON object"):
        models.load(str(tmp_path))


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setattr("talos_fast.models.registry._names", lambda package: [])
    with pytest.raises(TalosError, match=r"pip install 'talos-fast\[clip\]'"):
        models.load("open_clip:ViT-B-32")
    with pytest.raises(TalosError, match="0 names of timm"):
        models.load("vit_tiny_patch16_224")


@pytest.mark.parametrize(("package", "name", "extra"), [
    ("transformers", "hf:nowhere", "t5"), ("transformers", "t5:nowhere", "t5"), ("open_clip", "tiny", "demo"),
])  # fmt: skip
def test_an_extra_that_is_not_installed_is_named(monkeypatch, package, name, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(TalosError, match=rf"{package}.*; pip install 'talos-fast\[{extra}\]'"):
        models.load(name)


def test_letters_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TalosError, match=r"matplotlib.*; pip install 'talos-fast\[demo\]'"):
        # A height that no test has cached.
        coverage.glyph("a", "DejaVuSans.ttf", centre=(0.5, 0.5), height=0.123, tilt=0)
    monkeypatch.undo()
    assert coverage.glyph("a", "DejaVuSans.ttf", centre=(0.5, 0.5), height=0.123, tilt=0).max() > 0.5


def test_commands_without_pillow_name_the_extra():
    """In a process of its own, since the demo's tasks import it with their module."""
    code = "import sys; sys.modules['PIL'] = None; from talos_fast.cli import main; main()"
    for line in ("calibrate --model tiny --data demo:digits", "demo"):
        done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "talos-fast[demo]" in done.stderr and "Traceback" not in done.stderr


def test_classes_with_the_same_tokens_are_named(tmp_path, caplog):
    classes = text_task("letters", 3, per_split=6)
    twins = dataclasses.replace(classes, class_names=("unknown1", "unknown2", classes.class_names[2]))
    models.load(f"hf:{write_bert(tmp_path)}").classifier(twins)
    assert "cannot tell the class 'unknown2' from 'unknown1', which has the same tokens" in caplog.text
    dotted = dataclasses.replace(image_task(), class_names=("red", "red.", "blue"))
    tiny_clip().classifier(dotted)
    assert "tiny-clip cannot tell the class 'red.' from 'red'" in caplog.text
