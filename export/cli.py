"""The command line: ``python -m export``, and the ``ingot`` group.

Only this file and ``export/api.py`` join the folders together. Heavy packages are imported when a
command runs, so that ``--help`` answers at once and works without them.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from ingot.export.ingot import TARGETS, Target
from ingot.export.quantization import ACCURACIES, BLOCKS
from ingot.export.request import (
    BUILDERS,
    CALIBRATED,
    EXTRA_OUTPUTS,
    KERNELS,
    PRECISIONS,
    PRESETS,
    TASKS,
    WEIGHTS,
    Accuracy,
    Block,
    Builder,
    ExtraOutput,
    Kernels,
    Limits,
    Method,
    Precision,
    Preset,
    Task,
    Weights,
)
from ingot.graphs.names import FAMILIES
from ingot.plugins.command_line import Command, Group, told
from ingot.version import __version__

if TYPE_CHECKING:
    from ingot.export.ingot import Manifest

PREVIEW_TOKENS = 16


class LazyGroup(Group):
    """A group whose commands live in modules that are imported when used."""

    commands_at: ClassVar = {
        "export": ("ingot.export.cli", "export_command"),
        "generate": ("ingot.runtime.cli", "generate_command"),
        "classify": ("ingot.runtime.cli", "classify_command"),
        "validate": ("ingot.validate.cli", "validate_command"),
        "inspect": ("ingot.runtime.inspection", "inspect_command"),
        "bench": ("ingot.runtime.cli", "bench_command"),
        "triton": ("ingot.runtime.triton_cli", "triton_command"),
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_at:
            return None
        module, name = self.commands_at[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command("export", cls=Command)
@click.option(
    "--model",
    required=True,
    help=f"{', '.join(FAMILIES)}, a checkpoint folder, or a hub name.",
)
@click.option("--target", type=click.Choice(TARGETS), default="ort", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--task", type=click.Choice(TASKS), default="generate", show_default=True)
@click.option(
    "--preset",
    type=click.Choice(PRESETS),
    help="With a family name: first make a seeded random checkpoint of this shape.",
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option(
    "--adapter", help="Merge a PEFT LoRA adapter into the weights: its folder, or a hub name."
)
@click.option("--seed", default=0, show_default=True, help="Of a preset's weights.")
@click.option(
    "--output",
    "extra_outputs",
    multiple=True,
    type=click.Choice(EXTRA_OUTPUTS),
    help="Also make each layer's tensor of this kind an output.",
)
@click.option(
    "--precision",
    type=click.Choice(list(PRECISIONS)),
    help="Of weights and activations of a TensorRT target; default bf16 there, fp32 elsewhere.",
)
@click.option(
    "--weights",
    type=click.Choice(list(WEIGHTS)),
    help="What matrices are stored in, computed in float32; checkpoint: each as it is there.",
)
@click.option(
    "--kernels",
    type=click.Choice(KERNELS),
    help="Of the target ort: ONNX Runtime's, which is the default, Ingot's own, those of standard "
    "operators alone, or what is fastest here.",
)
@click.option(
    "--block",
    type=click.Choice(BLOCKS),
    help="Of int8 and int4: how many weights share a scale; default 32, with --bits what pays.",
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Of int8 and int4: without zero points, which is the default, or with them.",
)
@click.option(
    "--accuracy",
    type=click.Choice(ACCURACIES),
    help="Whether products may round activations: of int8 and int4 to int8, default fast; by "
    "--kernels ingot of bf16 to bfloat16, default exact.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Of int8 and int4: choose numbers on this text, or token ids (.json, .npy, .safetensors).",
)
@click.option(
    "--method",
    type=click.Choice(CALIBRATED),
    help="With --calibration: by all errors of a row together (gptq, the default), or each alone.",
)
@click.option(
    "--bits",
    type=float,
    help="With --calibration and int4: bits a weight, scales included; what matters gets more.",
)
@click.option(
    "--builder",
    type=click.Choice(BUILDERS),
    default="auto",
    show_default=True,
    help="Of a TensorRT engine; none makes the graph alone.",
)
@click.option("--max-batch", default=Limits.max_batch, show_default=True, help="Of an engine.")
@click.option("--max-seq", default=Limits.max_seq, show_default=True, help="Of an engine.")
@click.option("--opt-seq", default=Limits.opt_seq, show_default=True, help="An engine's usual.")
@click.option("--embed-plugins", is_flag=True, help="Put the plugin library into the engine.")
@click.option(
    "--context",
    type=int,
    help="Longest sequence, where the model goes further than its config says.",
)
@click.option("--no-validate", is_flag=True, help="Skip the comparison with eager PyTorch.")
@click.option(
    "--max-kl",
    type=float,
    help="Accept what storing the weights costs up to this mean KL divergence, in nats.",
)
@click.option("--strict", is_flag=True, help="Exit with 1 for any verdict but passed.")
@click.option("--preview", is_flag=True, help=f"Generate {PREVIEW_TOKENS} tokens at the end.")
@click.option("--overwrite", is_flag=True, help="Replace an ingot that is at --out.")
def export_command(
    model: str,
    target: Target,
    out: Path | None,
    task: Task,
    preset: Preset | None,
    revision: str | None,
    adapter: str | None,
    seed: int,
    extra_outputs: tuple[ExtraOutput, ...],
    precision: Precision | None,
    weights: Weights | None,
    kernels: Kernels | None,
    block: Block | None,
    symmetric: bool | None,
    accuracy: Accuracy | None,
    calibration: Path | None,
    method: Method | None,
    bits: float | None,
    builder: Builder,
    max_batch: int,
    max_seq: int,
    opt_seq: int,
    embed_plugins: bool,
    context: int | None,
    no_validate: bool,
    max_kl: float | None,
    strict: bool,
    preview: bool,
    overwrite: bool,
) -> None:
    """Turn a Hugging Face checkpoint into a validated ingot.

    Exit status: 0 the ingot is there and passed, 1 it is there and failed its validation, or with
    --strict did not pass wholly, 2 it could not be made and nothing was left behind.
    """
    from ingot.export.progress import RichStages

    name = Path(model).name + (f"-{preset}" if preset else "")
    folder = out or Path(f"{name}-{target}")
    stages = RichStages()
    from ingot.export.api import export
    from ingot.export.summary import print_summary

    result = export(
        model,
        folder,
        target=target,
        task=task,
        precision=precision,
        weights=weights,
        kernels=kernels,
        block=block,
        symmetric=symmetric,
        accuracy=accuracy,
        calibration=calibration,
        method=method,
        bits=bits,
        preset=preset,
        revision=revision,
        adapter=adapter,
        seed=seed,
        extra_outputs=extra_outputs,
        builder=builder,
        max_batch=max_batch,
        max_seq=max_seq,
        opt_seq=opt_seq,
        embed_plugins=embed_plugins,
        context=context,
        validate=not no_validate,
        max_kl=max_kl,
        overwrite=overwrite,
        stages=stages,
    )
    with told(folder):
        print_summary(folder, result.checkpoint, result.manifest, stages)
    with told(folder):
        if preview:
            _preview(folder, result.manifest)
    verdict = result.manifest.verdict
    sys.exit(1 if verdict == "failed" or (strict and verdict != "passed") else 0)


def _preview(folder: Path, manifest: Manifest) -> None:
    """Print a few tokens of an ingot that can generate here."""
    from ingot.runtime.generate import generate
    from ingot.runtime.loading import load

    runs_here = manifest.target in ("onnx", "ort") and manifest.task == "generate"
    if not runs_here or manifest.verdict == "failed":
        return
    prompt = [token % manifest.vocab_size for token in range(2, 10)]
    session = load(folder, verify=False)
    steps = generate(session, [prompt], max_new_tokens=PREVIEW_TOKENS, stop_ids=())
    tokens = [str(token) for (token,) in steps]
    click.echo(f"prompt ids:    {' '.join(map(str, prompt))}")
    click.echo(f"generated ids: {' '.join(tokens)}")
    ids = ",".join(map(str, prompt))
    click.echo(f"more: ingot generate {folder} --prompt-ids {ids}")


@click.group(cls=LazyGroup)
@click.version_option(__version__)
def main() -> None:
    """Ahead-of-time export of sparse and state-space language models."""
