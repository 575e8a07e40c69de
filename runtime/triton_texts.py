"""The texts of a Triton repository: its configs, scripts and README, from their templates."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from ingot.export.ingot import INGOT, LIBRARY, SIZES, Manifest
from ingot.graphs.state import BATCH, KEPT, LOGITS_TO_KEEP, SEQUENCE, State
from ingot.plugins.errors import install_hint
from ingot.runtime.triton_escapes import FILTERS, one_line
from ingot.runtime.triton_plan import CONFIG, PLUGINS, TYPES, Plan, TritonError, growth

NEW_TOKENS = 64
TEMPLATES = Path(__file__).with_name("templates")


def rendered(plan: Plan, manifest: Manifest) -> dict[str, str]:
    """The text files of the repository by path."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise TritonError(
            f"jinja2 is missing; install it with: {install_hint('triton')}"
        ) from error

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=one_line,
    )
    environment.filters.update(FILTERS)
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
            # Triton's clients get all logits: a batch's rows could each ask for others.
            if tensor.name not in {*state_names, LOGITS_TO_KEEP}
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
        "ingot": f"../{settings.name}/1" if plan.graph else "ingot",
        "operators": f"ingot/{LIBRARY}" if manifest.kernels == INGOT else "",
        "inputs": tensors("inputs"),
        "outputs": tensors("outputs"),
        "states": [_state(state, settings.capacity) for state in manifest.states],
        "growths": {growth(state) for state in manifest.states},
        "positions": any(each.name == "position_ids" for each in manifest.inputs),
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
    host = re.sub("[^a-z0-9]", "-", name.lower()).strip("-")
    return host if host[:1].isalpha() else f"model-{host}"


def memory_gib(plan: Plan, manifest: Manifest) -> tuple[int, int]:
    """What the pod asks for of the host's memory, and what it is limited to, in whole GiB."""
    # Here, for it needs NumPy, and `--help` does without.
    from ingot.runtime.prompt import pieces

    settings = plan.settings
    streams = settings.streams * plan.generate
    of_graph = max(settings.max_batch, settings.streams) * plan.graph
    sequences = streams + of_graph

    # A stream's prompt comes in pieces, where its ingot takes them.
    (piece, *_) = pieces(manifest, 1, settings.capacity)
    tokens = streams * piece.stop + of_graph * settings.capacity
    most = {BATCH: tokens, SEQUENCE: 1, KEPT: 1}
    # The server's own, and CUDA's contexts in its processes.
    asked = 2**29 if manifest.engine is None else 2**31
    asked += manifest.weight_bytes * len(plan.models)
    on_host = manifest.states if manifest.engine is None else ()
    states = sum(
        SIZES[state.dtype] * math.prod(state.shape(sequences, settings.capacity))
        for state in on_host
    )
    logits = sum(
        SIZES[each.dtype] * math.prod(d if isinstance(d, int) else most[d] for d in each.shape)
        for each in manifest.outputs
        if each.name == manifest.main_output
    )
    asked += states
    # A step may have the states before it and behind it. Of prompts as long as the capacity the
    # graph by itself gives the logits of all tokens, and Triton copies them into a message; what a
    # graph computes on the way is as much again, of a stream for one piece. 1 GiB is /dev/shm.
    limit = asked + states + 2 * logits + 2**30
    return math.ceil(asked / 2**30), math.ceil(limit / 2**30)


def _dims(shape: tuple[int | str, ...], variable: int) -> str:
    """Dimensions behind the batch's."""
    return ", ".join(str(d if isinstance(d, int) else variable) for d in shape[1:])


def _state(state: State, capacity: int) -> dict[str, Any]:
    """A state as the config has it; see the comments in ``graph.config.pbtxt.jinja``."""
    # One buffer has no effect where Triton makes batches, and so none for states of fixed size.
    shared = growth(state) == "shared"
    first = capacity if shared else 1
    return {
        "input": state.input,
        "output": state.output,
        "type": TYPES[state.dtype],
        "dims": _dims(state.input_shape, capacity if shared else -1),
        "initial": _dims(state.input_shape, first),
        # Where the shape stays; Triton would not take on another's.
        "same_buffer": shared,
    }
