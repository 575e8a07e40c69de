"""The table at the end of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ingot.export.ingot import EngineInfo, Manifest
from ingot.export.ingot_schema import CHECKPOINT
from ingot.export.progress import Stages
from ingot.plugins.command_line import console
from ingot.plugins.cpu.operators import MIXER
from ingot.plugins.registry import OPERATORS


def print_summary(out: Path, checkpoint: Path, manifest: Manifest, stages: Stages) -> None:
    """What was made, what each step cost, and the verdict, on standard output."""
    table = Table(title=f"{manifest.model_type} -> {manifest.target}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    operators = manifest.graph["operators"]
    kernels = [f"{n} {op}" for op, n in operators.items() if op in NOTABLE]
    table.add_row("checkpoint", str(checkpoint))
    adapter = manifest.source.get("adapter")
    if adapter is not None:
        table.add_row("adapter", str(adapter["name"]))
    table.add_row("ingot", str(out))
    table.add_row("nodes", f"{manifest.graph['nodes']} ({', '.join(kernels)})")
    share = manifest.active_parameters / manifest.parameters
    table.add_row("parameters", f"{manifest.parameters:,}")
    table.add_row("active per token", f"{manifest.active_parameters:,} ({share:.0%})")
    stored = manifest.weights or manifest.precision
    said = "matrices as the checkpoint has them" if stored == CHECKPOINT else stored
    if manifest.quantization is not None:
        said += f", {manifest.quantization}"
    table.add_row("weights", f"{manifest.weight_bytes:,} bytes, {said}")
    if manifest.run_by:
        table.add_row("kernels", manifest.run_by)
    if manifest.engine is not None:
        for row in _engine_rows(manifest.engine):
            table.add_row(*row)
    for stage in stages.finished:
        cost = f"{stage.seconds:.1f} s, peak memory {stage.peak_bytes / 1e6:,.0f} MB"
        table.add_row(stage.name, cost)
    peak = max(stage.peak_bytes for stage in stages.finished)
    seconds = sum(stage.seconds for stage in stages.finished)
    table.add_row("total", f"{seconds:.1f} s, peak memory {peak / 1e6:,.0f} MB")
    table.add_section()
    for name, value in _verdict_rows(manifest):
        table.add_row(name, value)
    console().print(table)


# Of routing where experts are the truth's or chosen.
MODES = ("free", "replayed")
# Of tensors, as a validation has them.
KINDS = ("logits", "hidden", "router", "key", "value", "conv", "ssm")
# How the names of figures end and are said: a graph of half precision is run in float32 too, and
# one whose kernels round activations without that rounding too.
RUN_IN = (("", ""), ("_in_float32", ", in float32"), ("_rounded", ", rounded"))


# What each check of a validation counts.
UNITS = {"weights": "weights", "graph": "nodes of the graph", "contract": "fields of the contract"}


def _coverage(found: dict[str, Any]) -> str:
    context = "" if found["context"] is None else f" of {found['context']:,}"
    return (
        f"{found['covered']} of {found['parts']} shapes of use, sequences up to "
        f"{found['positions']:,}{context} tokens, {found['ids']:,} of "
        f"{found['vocab_size']:,} token ids"
    )


def _engine_rows(engine: EngineInfo) -> list[tuple[str, str]]:
    devices = ", ".join(f"{c // 10}.{c % 10}" for c in engine.compute_capabilities)
    plugins = ", ".join(f"{count} {name}" for name, count in engine.plugins.items()) or "none"
    rows = [
        ("engine", f"{engine.builder} {engine.version}, compute capability {devices}"),
        ("plugins", plugins),
    ]
    if engine.plugins and not engine.libraries and not engine.embedded:
        rows.append(
            (
                "[yellow]kernels[/yellow]",
                "not built here, so the engine cannot run: make plugins, then export again",
            )
        )
    return rows


# Operators that are no more than arithmetic are not counted.
NOTABLE = {
    "Attention",
    "GroupQueryAttention",
    MIXER,
    *OPERATORS,
    *(operator.onnx_runtime for operator in OPERATORS.values() if operator.onnx_runtime),
}


COLOURS = {"passed": "green", "passed, in part": "yellow", "failed": "red", "skipped": "yellow"}


def _verdict_rows(manifest: Manifest) -> list[tuple[str, str]]:
    found = manifest.validation
    colour = COLOURS[manifest.verdict]
    verdict = f"[{colour}]{manifest.verdict}[/{colour}]"
    if "reason" in found:
        verdict += f": {found['reason']}"
    rows = [("verdict", verdict)]
    rows += [("not covered", each) for each in found.get("short", ())]
    if "against" in found:
        compared = f"{found['compared']} tensors over {found['stages']} calls"
        rows.append(("compared", f"{compared}, with {found['against']}"))
    if "checks" in found:
        checked = (f"{count} {UNITS.get(name, name)}" for name, count in found["checks"].items())
        rows.append(("checked", f"{', '.join(checked)}, against the checkpoint"))
    if "activations" in found:
        proved = "within what that rounding explains"
        if found["activations"]["twin"]:
            proved = "right without that rounding, and with it " + proved
        to = found["activations"].get("to", "int8")
        rows.append(("activations", f"rounded to {to} by the kernels, which are {proved}"))
    if "coverage" in found:
        rows.append(("covered", _coverage(found["coverage"])))
        if found["coverage"].get("not_asked"):
            rows.append(("not asked", "; ".join(found["coverage"]["not_asked"])))
    for name, title in [(kind + suffix, kind + said) for suffix, said in RUN_IN for kind in KINDS]:
        if f"{name}_score" in found:
            score, error = found[f"{name}_score"], found[f"{name}_error"]
            times = f"{score:.2g} times eager PyTorch's own error"
            rows.append((title, f"relative RMS error {error:.1e}, {times}"))
    for mode, said in [(m + suffix, m + in_) for suffix, in_ in RUN_IN for m in MODES]:
        if f"routing_agreement_{mode}" in found:
            share = found[f"routing_agreement_{mode}"]
            rows.append((f"routing, {said}", f"{share:.1%} of tokens have the truth's experts"))
    if "routing_agreement_forced" in found:
        share = found["routing_agreement_forced"]
        rows.append(("routing, forced", f"{share:.1%} of tokens used the experts they were given"))
    if "kl_max" in found:
        mean, most = found["kl_mean"], found["kl_max"]
        rows.append(("KL divergence", f"{mean:.1e} nats in the mean, {most:.1e} at most"))
    if "top1_agreement" in found:
        rows.append(("top-1 agreement", f"{found['top1_agreement']:.1%}"))
    if "quantisation" in found:
        rows += _cost_rows(found["quantisation"])
    if "first_failure" in found:
        rows.append(("first failure", found["first_failure"]))
    if "location" in found:
        rows.append(("location", found["location"]))
    return rows


def _cost_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What storing the weights costs, apart from what kernels do."""
    title = f"cost of {found['stored']}"
    if "kl_mean" not in found:
        return [(title, f"weights are off by up to {found['weights_error']:.1e} of their size")]
    text = f"{found['kl_mean']:.1e} nats in the mean, up to {found['kl_limit']:.1e} is accepted"
    if "plain_kl_mean" in found:
        text += f"; plain rounding costs {found['plain_kl_mean']:.1e}"
    return [(f"{title}, KL", text), (f"{title}, top-1", f"{found['top1_agreement']:.1%}")]
