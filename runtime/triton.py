"""A Triton model repository from an ingot: ``ingot triton INGOT --out REPO``.

The repository stands alone. ``NAME/1`` is the ingot, and Triton runs its graph; ``NAME_generate/1``
is a Python model that streams tokens from the same folder, so the weights are there once. It comes
with a copy of the part of Ingot that it needs: Triton's interpreter is isolated and its image has
no Ingot, and a repository keeps working when the Ingot that wrote it is updated or gone.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from ingot.export.ingot import MANIFEST, SIZES, EngineInfo, Manifest
from ingot.graphs.state import State
from ingot.plugins.errors import IngotError
from ingot.plugins.registry import OPERATORS
from ingot.plugins.whole import sha256, staged

SCHEMA_VERSION = 1
RECORD = "triton.json"
CONFIG = "config.pbtxt"
PLUGINS = "libingot_trt.so"
NEW_TOKENS = 64
MOST_CAPACITY = 4096
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
}
# What holds the package `ingot`, in a checkout and installed; not resolved, since in a checkout its
# parts are links.
ROOT = Path(__file__).absolute().parents[2]
TEMPLATES = Path(__file__).with_name("templates")
# What `runtime.triton_model` imports of ours; a test runs it with nothing else.
CARRIED = (
    "ingot/__init__.py",
    "ingot/version.py",
    "ingot/export/__init__.py",
    "ingot/export/ingot.py",
    "ingot/graphs/__init__.py",
    "ingot/graphs/state.py",
    "ingot/plugins/__init__.py",
    "ingot/plugins/errors.py",
    "ingot/plugins/whole.py",
    "ingot/runtime/__init__.py",
    "ingot/runtime/generate.py",
    "ingot/runtime/loading.py",
    "ingot/runtime/onnxruntime_session.py",
    "ingot/runtime/ort.py",
    "ingot/runtime/session.py",
    "ingot/runtime/tokens.py",
    "ingot/runtime/triton_model.py",
)
CARRIED_FOR_ENGINES = (
    "ingot/plugins/activations.py",
    "ingot/plugins/device.py",
    "ingot/plugins/library.py",
    "ingot/plugins/operator.py",
    "ingot/plugins/registry.py",
    "ingot/plugins/tensorrt/__init__.py",
    "ingot/plugins/tensorrt/python_plugins.py",
    "ingot/plugins/tiles.py",
    "ingot/runtime/cuda.py",
    "ingot/runtime/trt.py",
    *(f"ingot/plugins/{operator.snake}.py" for operator in OPERATORS.values()),
)


class TritonError(IngotError):
    """A repository that cannot be made: what does not fit, and what to do."""


@dataclass(frozen=True)
class Settings:
    """What the user chooses.

    Attributes:
        name: of the graph's model; the other is called ``NAME_generate``.
        streams: generations at once.
        threads: of ONNX Runtime; 0 lets it choose.
        capacity: most tokens of a sequence; 0 is the model's context, at most 4096.
        max_batch: most sequences in one call of the graph.
    """

    name: str = ""
    streams: int = 4
    threads: int = 0
    capacity: int = 0
    max_batch: int = 8


@dataclass(frozen=True)
class Plan:
    """What the repository is to hold.

    Attributes:
        settings: with every default filled in.
        graph: whether one of Triton's own backends can run the graph.
        generate: whether the Python model can.
        why: of the one that is left out, a sentence for the README.
    """

    settings: Settings
    graph: bool
    generate: bool
    why: str = ""

    @property
    def models(self) -> list[str]:
        """Their names."""
        name = self.settings.name
        return [name] * self.graph + [f"{name}_generate"] * self.generate


def make_plan(folder: Path, manifest: Manifest, settings: Settings) -> Plan:
    """Decide which models an ingot has in Triton.

    Raises:
        TritonError: none, or a setting that does not fit.
    """
    if manifest.verdict == "failed":
        raise TritonError(
            f"{folder} failed its validation, so its numbers are wrong; export it again."
        )
    if settings.name and not NAMES.fullmatch(settings.name):
        raise TritonError(
            f"--name {settings.name!r} is no model name; give at most 40 letters, digits, _ and -."
        )
    for option, value, least, most in (
        ("--streams", settings.streams, 1, 1024),
        ("--threads", settings.threads, 0, 1024),
        ("--max-batch", settings.max_batch, 1, 1024),
    ):
        if not least <= value <= most:
            raise TritonError(f"{option} is {value}; it must be {least} to {most}.")
    engine = manifest.engine
    graph, why = True, ""
    if engine is None and manifest.target.startswith("trt"):
        raise TritonError(
            f"{folder} holds a graph for TensorRT and no engine, and Triton builds none; export it "
            "with --builder tensorrt, or with --target ort."
        )
    if engine is None and manifest.precision != "float32":
        raise TritonError(
            f"{folder} holds a {manifest.precision} graph and no engine; export it in float32."
        )
    if engine is not None:
        if engine.plugins and not engine.libraries and not engine.embedded:
            raise TritonError(
                f"{folder} was built without the GPU kernels of {', '.join(engine.plugins)}; run "
                "make plugins and export again."
            )
        graph, why = _triton_runs(engine)
    generate = manifest.task == "generate"
    if not graph and not generate:
        raise TritonError(
            f"{folder} was exported with --task {manifest.task}, so only its graph could be "
            f"served, and {why}."
        )
    if not generate:
        why = f"the ingot was exported with --task {manifest.task} and has no next token to stream"
    return Plan(_filled(manifest, settings), graph, generate, why)


def _triton_runs(engine: EngineInfo) -> tuple[bool, str]:
    """Whether Triton's TensorRT backend can load an engine, and if not, why."""
    if engine.builder != "tensorrt":
        return False, f"Triton's TensorRT backend loads no engine of {engine.builder}"
    if engine.plugins and not engine.embedded and PLUGINS not in engine.libraries:
        return False, f"Triton's TensorRT backend needs the plugins as {PLUGINS}"
    return True, ""


def _filled(manifest: Manifest, settings: Settings) -> Settings:
    context = manifest.generation.get("context_length") or MOST_CAPACITY
    limits = [min(context, MOST_CAPACITY)]
    max_batch = settings.max_batch
    if manifest.engine is not None:
        most = manifest.engine.profiles[0].shapes["input_ids"][2]
        limits.append(most[1])
        max_batch = min(max_batch, most[0])
    if any(state.axis is not None for state in manifest.states):
        # ONNX Runtime's GroupQueryAttention refuses several rows of several tokens after a past.
        # Where caches grow, Triton takes their length from the batch's first and does not compare:
        # see the config.
        max_batch = 1
    capacity = settings.capacity or min(limits)
    # A state of fixed size has no longest context.
    longest = min([manifest.generation.get("context_length") or sys.maxsize, *limits[1:]])
    if not 2 <= capacity <= longest:
        raise TritonError(f"--capacity is {settings.capacity}; it must be 2 to {longest}.")
    name = settings.name or manifest.model_type
    return replace(settings, name=name, capacity=capacity, max_batch=max_batch)


def grows(manifest: Manifest) -> str:
    """How the states grow: ``shared``, ``appended``, ``fixed``, or empty where there are none."""
    if not manifest.states:
        return ""
    if any(state.shared for state in manifest.states):
        return "shared"
    return "appended" if any(state.axis is not None for state in manifest.states) else "fixed"


def check_out(ingot: Path, out: Path, overwrite: bool) -> None:
    """Refuse a destination that is taken, before any work is done.

    Raises:
        TritonError: ``out`` exists and may not be replaced, or holds the ingot.
    """
    above = next(path for path in out.absolute().parents if path.exists())
    if not above.is_dir():
        raise TritonError(f"{out} cannot be made: {above} is a file; give another --out.")
    inside = out.resolve() in (ingot.resolve(), *ingot.resolve().parents)
    if inside or ingot.resolve() in out.resolve().parents:
        raise TritonError(f"{out} and {ingot} lie in one another; give another --out.")
    if not out.exists():
        return
    if not overwrite:
        raise TritonError(f"{out} exists; give --overwrite to replace it, or another --out.")
    empty = out.is_dir() and not any(out.iterdir())
    if not empty and not (out / RECORD).is_file():
        raise TritonError(f"{out} exists and was not made by ingot triton, so it is left alone.")


def write_repository(
    ingot: Path,
    out: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Plan:
    """Write the whole repository, or nothing.

    Args:
        ingot: the folder to serve; every file of it is compared with its manifest.
        out: the repository.
        settings: what the user chooses.
        overwrite: replace a repository that is there.
        advance: told the bytes compared.

    Raises:
        IngotError: a destination that is taken, or an ingot that is damaged or does not fit.
    """
    check_out(ingot, out, overwrite)
    manifest = Manifest.read(ingot)
    plan = make_plan(ingot, manifest, settings)
    manifest.check_files(ingot, advance=advance)
    with staged(out, replace=overwrite) as stage:
        place = ingot_place(plan)
        for file in (MANIFEST, *manifest.files):
            (stage / place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ingot / file, stage / place / file)
        for path, text in rendered(plan, manifest).items():
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).write_text(text, encoding="utf-8")
        (stage / "launch.sh").chmod(0o755)
        version = stage / f"{plan.settings.name}_generate" / "1"
        for file in carried(manifest) if plan.generate else ():
            (version / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, version / file)
        write_record(stage, plan, place)
    return plan


def carried(manifest: Manifest) -> tuple[str, ...]:
    """The files of ours that the Python model needs, from the root of the packages."""
    return CARRIED if manifest.engine is None else CARRIED + CARRIED_FOR_ENGINES


def ingot_place(plan: Plan) -> str:
    """Where in the repository the ingot lies."""
    name = plan.settings.name
    return f"{name}/1" if plan.graph else f"{name}_generate/1/ingot"


def write_record(stage: Path, plan: Plan, place: str) -> None:
    """``triton.json``: what the repository was made of, for the linter.

    The ingot's own manifest has the hashes of its files. What an operator may edit has none:
    configs, the launch script and the manifest for Kubernetes.
    """
    folder = stage / f"{plan.settings.name}_generate"
    code = sorted(folder.rglob("*.py")) if plan.generate else []
    record = {
        "schema_version": SCHEMA_VERSION,
        "models": plan.models,
        "ingot": place,
        "settings": asdict(plan.settings),
        # The ingot by its manifest, which has the hashes of the rest.
        "files": {
            path.relative_to(stage).as_posix(): sha256(path)
            for path in (stage / place / MANIFEST, *code)
        },
    }
    (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def rendered(plan: Plan, manifest: Manifest) -> dict[str, str]:
    """The text files of the repository by path."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise TritonError(
            "jinja2 is missing; install it with: pip install 'ingot[triton]'"
        ) from error

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    values = context(plan, manifest)

    def render(template: str) -> str:
        text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
        return environment.from_string(text).render(values)

    name = plan.settings.name
    files = {file: render(file) for file in ("README.md", "launch.sh", "kubernetes.yaml")}
    files["Dockerfile"] = render("Dockerfile")
    if plan.graph:
        files[f"{name}/{CONFIG}"] = render("graph.config.pbtxt")
    if plan.generate:
        files[f"{name}_generate/{CONFIG}"] = render("generate.config.pbtxt")
        files[f"{name}_generate/1/model.py"] = render("model.py")
    return files


def context(plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """What the templates are given."""
    settings, engine = plan.settings, manifest.engine
    state_names = {name for state in manifest.states for name in (state.input, state.output)}

    def tensors(kind: str) -> list[dict[str, str]]:
        return [
            {
                "name": tensor.name,
                "type": TYPES[tensor.dtype],
                "dims": _dims(tensor.shape, -1),
                "warm": _dims(tensor.shape, 1),
            }
            for tensor in getattr(manifest, kind)
            if tensor.name not in state_names
        ]

    return {
        "name": settings.name,
        "models": plan.models,
        "graph": plan.graph,
        "generate": plan.generate,
        "why": plan.why,
        "model_type": manifest.model_type,
        "source": manifest.source,
        "task": manifest.task,
        "target": manifest.target,
        "verdict": manifest.verdict,
        "vocab_size": manifest.vocab_size,
        "main_output": manifest.main_output,
        "ingot": f"../{settings.name}/1" if plan.graph else "1/ingot",
        "inputs": tensors("inputs"),
        "outputs": tensors("outputs"),
        "states": [_state(state, settings.capacity) for state in manifest.states],
        "grows": grows(manifest),
        "streams": settings.streams,
        "sequences": max(settings.max_batch, settings.streams),
        "threads": settings.threads,
        "capacity": settings.capacity,
        "max_batch": settings.max_batch,
        "max_new_tokens": NEW_TOKENS,
        "stop_ids": ", ".join(map(str, manifest.generation.get("eos_token_ids", ()))),
        "engine": engine,
        "gpu": engine is not None,
        "profiles": [profile.name for profile in engine.profiles] if engine else [],
        "plugins": PLUGINS if engine and PLUGINS in engine.libraries else "",
        "onnxruntime": manifest.tools.get("onnxruntime", ""),
        "memory": memory_gib(plan, manifest),
        "host": _host(settings.name),
    }


def _host(name: str) -> str:
    """A name for Kubernetes: no underscore, no capital, and no digit at a Service's beginning."""
    host = name.lower().replace("_", "-").rstrip("-")
    return f"model-{host}" if host[0].isdigit() else host


def memory_gib(plan: Plan, manifest: Manifest) -> tuple[int, int]:
    """What the pod asks for of the host's memory, and what it is limited to, in whole GiB."""
    settings = plan.settings
    sequences = settings.streams * plan.generate
    sequences += max(settings.max_batch, settings.streams) * plan.graph

    def most(shape: tuple[int | str, ...], dtype: str) -> int:
        """Bytes of a tensor of all sequences: of its symbols, one is the batch, another tokens."""
        room = settings.capacity if sum(isinstance(size, str) for size in shape) > 1 else 1
        sizes = [size for size in shape if isinstance(size, int)]
        return sequences * room * math.prod(sizes) * SIZES[dtype]

    # The server's own, and CUDA's contexts in its processes.
    asked = 2**29 if manifest.engine is None else 2**31
    asked += manifest.weight_bytes * len(plan.models)
    on_host = manifest.states if manifest.engine is None else ()
    states = sum(most(state.input_shape, state.dtype) for state in on_host)
    answers = [each for each in manifest.outputs if each.name == manifest.main_output]
    logits = sum(most(each.shape, each.dtype) for each in answers)
    asked += states
    # A step may have the states before it and behind it. Prompts as long as the capacity have the
    # logits of all their tokens, and as much again for what the graph computes on the way to them,
    # or for the message that Triton copies them into. 1 GiB is /dev/shm.
    limit = asked + states + 2 * logits + 2**30
    return math.ceil(asked / 2**30), math.ceil(limit / 2**30)


def _dims(shape: tuple[int | str, ...], variable: int) -> str:
    """Dimensions behind the batch's."""
    return ", ".join(str(d if isinstance(d, int) else variable) for d in shape[1:])


def _state(state: State, capacity: int) -> dict[str, Any]:
    """A state as the config has it; see the comments in ``graph.config.pbtxt.jinja``."""
    first = capacity if state.shared else 1
    return {
        "input": state.input,
        "output": state.output,
        "type": TYPES[state.dtype],
        "dims": _dims(state.input_shape, capacity if state.shared else -1),
        "initial": _dims(state.input_shape, first),
        # Where the shape stays; Triton would not take on another's.
        "same_buffer": state.shared,
    }


@click.command("triton")
@click.argument("ingot", type=click.Path(path_type=Path), required=False)
@click.option("--out", type=click.Path(path_type=Path), help="The repository to make.")
@click.option("--name", default="", help="Of the model; by default its type.")
@click.option("--streams", default=Settings.streams, show_default=True, help="Served at once.")
@click.option("--threads", default=Settings.threads, show_default=True, help="0: runtime's choice.")
@click.option(
    "--capacity",
    default=0,
    help=f"Most tokens of a sequence; by default the model's context, at most {MOST_CAPACITY}.",
)
@click.option("--max-batch", default=Settings.max_batch, show_default=True, help="Of the graph.")
@click.option("--overwrite", is_flag=True, help="Replace a repository that is at --out.")
@click.option(
    "--check", type=click.Path(path_type=Path), help="Check this repository, and make none."
)
def triton_command(
    ingot: Path | None,
    out: Path | None,
    name: str,
    streams: int,
    threads: int,
    capacity: int,
    max_batch: int,
    overwrite: bool,
    check: Path | None,
) -> None:
    """Make a model repository for NVIDIA Triton Inference Server from an ingot, or check one.

    Exit status: 0 it is there, or nothing is wrong with it; 1 --check found something, one line
    each; 2 it could not be made and nothing was left behind.
    """
    try:
        if check is not None:
            if ingot is not None or out is not None:
                raise TritonError("--check takes neither INGOT nor --out.")
            _check(check)
            return
        if ingot is None or out is None:
            raise TritonError("give an INGOT and --out REPO, or --check REPO.")
        settings = Settings(name, streams, threads, capacity, max_batch)
        plan = write_repository(ingot, out, settings, overwrite=overwrite)
    except IngotError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(f"{out}: {', '.join(plan.models)}")
    if plan.why:
        click.echo(f"one model only: {plan.why}")
    click.echo(f"serve it: {out / 'launch.sh'}; more in {out / 'README.md'}")


def _check(repository: Path) -> None:
    from ingot.runtime.triton_lint import lint

    problems = lint(repository)
    for problem in problems:
        click.echo(problem)
    if problems:
        sys.exit(1)
    click.echo(f"{repository}: nothing found")
