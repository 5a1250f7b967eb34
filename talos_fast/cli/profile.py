"""``talos-fast profile``."""

from pathlib import Path
from typing import Annotated

import typer

import talos_fast as talos
from talos_fast import writing
from talos_fast.cli import options as o
from talos_fast.step import Amp

app = typer.Typer()


@app.command()
@o.with_run
def profile(
    run: o.Run,
    data: o.Data,
    weights: o.Weights = None,
    method: Annotated[str, typer.Option(help="Measured beside full fine-tuning.")] = "talos",
    mask: Annotated[Path | None, typer.Option(help="talos: what calibrate wrote.")] = None,
    density: Annotated[float | None, typer.Option(help="lota: fraction that trains.")] = None,
    finetuned: Annotated[Path | None, typer.Option(help="lota: vector of a full fine-tuning.")] = None,
    rank: Annotated[int | None, typer.Option(help="l-lora: rank of the adapters.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="l-lora: adapters act times this / rank.")] = None,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    amp: Annotated[Amp, typer.Option(help="bf16 autocast; auto: on CUDA.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile, around forward and backward.")] = False,
    rounds: Annotated[int, typer.Option(help="Measurements of each, interleaved.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before those.")] = 2,
    trace: Annotated[Path | None, typer.Option(help="One iteration as a Chrome trace: .json or .json.gz.")] = None,
    out: Annotated[Path | None, typer.Option(help="Everything measured, as JSON.")] = None,
    batch_size: o.BatchSize = 128,
) -> None:
    """Time and memory of a training iteration, beside full fine-tuning, with the counted floor."""
    writing.require_file(trace, "--trace")
    writing.require_file(out, "--out")
    o.require_mask(method, mask)
    selected = None if mask is None else talos.Mask.load(mask)
    changed = None if finetuned is None else o.load_vector(finetuned)
    task, backbone, classifier = run.classifier(data, weights)
    batches = backbone.batches(task.train, batch_size=batch_size, shuffle=True, seed=run.seed)
    found = talos.profile(
        classifier, batches, method=method, mask=selected, density=density, finetuned=changed, rank=rank,
        lora_alpha=lora_alpha, clip=clip or None, amp=amp, compile=compile, rounds=rounds, warmup=warmup, trace=trace,
    )  # fmt: skip
    typer.echo(str(found))
    if out is not None:
        writing.write_json(out, {**found.to_json(), **run.source(weights), "task": task.name})
