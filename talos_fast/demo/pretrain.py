"""Pre-train the demo's tiny CLIP: `python -m talos_fast.demo.pretrain` (about ten minutes on one idle CPU core).

Contrastive learning (open_clip's ClipLoss) on the images and captions of `corpus.py`. The same seed, threads and
versions give the same weights.
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from talos_fast.demo.corpus import corpus, vocabulary
from talos_fast.demo.model import CONFIG_NAME, FOLDER, MEAN, STD, WEIGHTS_NAME, build
from talos_fast.demo.tokenizer import WordTokenizer

logger = logging.getLogger("talos_fast")

CONTEXT_LENGTH = 12
# 17 tokens an image: a training step of 32 images must take tens of milliseconds on two CPU cores
VISION = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 1}


def pretrain(*, steps: int, batch_size: int, images: int, lr: float, seed: int) -> tuple[Any, WordTokenizer, float]:
    """Train a tiny CLIP from random weights.

    Args:
        steps: optimizer steps.
        batch_size: image-caption pairs a step.
        images: size of the corpus, drawn once; each use is shifted and brightened anew.
        lr: peak learning rate of AdamW; linear warm-up over a tenth of the steps, then cosine to zero.
        seed: of the corpus, the weights and the order.

    Returns:
        The `open_clip.CLIP`, its tokenizer, and the mean loss (nats) of the last tenth of the steps.
    """
    from open_clip.loss import ClipLoss

    torch.manual_seed(seed)
    tokenizer = WordTokenizer(vocabulary(), CONTEXT_LENGTH)
    model = build(_architecture(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    criterion, losses = ClipLoss(), []
    batches = _batches(*corpus(images, seed), tokenizer, steps, batch_size, seed)
    for pixels, tokens in tqdm(batches, total=steps, desc="pre-training", disable=None):
        features = model(pixels, tokens)
        loss = criterion(*features[:3])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=float(np.log(50)))
        losses.append(loss.item())
    return model, tokenizer, float(np.mean(losses[-max(1, steps // 10) :]))


def _architecture(tokenizer: WordTokenizer) -> dict[str, Any]:
    return {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": tokenizer.vocab_size}}


def save(model: Any, tokenizer: WordTokenizer, made: dict[str, Any], folder: Path) -> None:
    """Write weights (fp16) and description to a folder."""
    from safetensors.torch import save as serialize

    description = {"architecture": _architecture(tokenizer), "words": list(tokenizer.words), "made": made}
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    # not save_file, which makes a file that only its owner can read: the package is for everyone
    (folder / WEIGHTS_NAME).write_bytes(serialize(weights))
    (folder / CONFIG_NAME).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _batches(
    images: np.ndarray[Any, np.dtype[np.uint8]],
    captions: list[str],
    tokenizer: WordTokenizer,
    steps: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    tokens, pixels = tokenizer(captions), torch.from_numpy(images).permute(0, 3, 1, 2)
    rng = np.random.default_rng([seed, 1])
    for _ in range(steps):
        chosen = torch.from_numpy(rng.choice(len(images), batch_size, replace=len(images) < batch_size))
        batch = pixels[chosen].float() / 255
        batch = batch.roll(tuple(rng.integers(-1, 2, 2)), (2, 3))
        batch = batch * torch.from_numpy(rng.uniform(0.8, 1.2, (batch_size, 1, 1, 1))).float()
        batch = batch + 0.04 * torch.randn_like(batch)
        yield (batch.clamp(0, 1) - mean) / std, tokens[chosen]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images", type=int, default=16_000, help="image-caption pairs to draw")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the two files")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "threads")}
    started = time.perf_counter()
    model, tokenizer, loss = pretrain(**settings)
    made = {
        "by": "python -m talos_fast.demo.pretrain",
        **settings,
        "threads": options.threads,
        "torch": torch.__version__,
        "loss": round(loss, 4),
        "seconds": round(time.perf_counter() - started),
    }
    save(model, tokenizer, made, options.out)
    logger.info("%s: %s", options.out, json.dumps(made))


if __name__ == "__main__":
    main()
