"""A Triton model repository from an ingot.

The repository stands alone. ``NAME/1`` is the ingot, and Triton runs its graph; ``NAME_generate/1``
is a Python model that streams tokens from the same folder, so the weights are there once. It comes
with a copy of the part of Ingot that it needs: Triton's interpreter is isolated and its image has
no Ingot, and a repository keeps working when the Ingot that wrote it is updated or gone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ingot.export.ingot import LIBRARY, MANIFEST, Manifest
from ingot.plugins.links import require_inside
from ingot.plugins.registry import OPERATORS
from ingot.plugins.whole import WriteError, check_destination, keep_apart, sha256, staged
from ingot.runtime.operators import libraries
from ingot.runtime.triton_plan import RECORD, SCHEMA_VERSION, Plan, Settings, TritonError, make_plan
from ingot.runtime.triton_texts import rendered

# What holds `runtime/` and the other parts: the package where it is installed, else the checkout.
PARTS = Path(__file__).resolve().parents[1]
# What `runtime.triton_model` imports of ours; a test runs it with nothing else.
CARRIED = (
    "ingot/__init__.py",
    "ingot/version.py",
    "ingot/export/__init__.py",
    "ingot/export/external_data.py",
    "ingot/export/ingot.py",
    "ingot/export/ingot_schema.py",
    "ingot/export/quantization.py",
    "ingot/graphs/__init__.py",
    "ingot/graphs/names.py",
    "ingot/graphs/state.py",
    "ingot/plugins/__init__.py",
    "ingot/plugins/cpu/__init__.py",
    "ingot/plugins/cpu/operators.py",
    "ingot/plugins/errors.py",
    "ingot/plugins/json_fields.py",
    "ingot/plugins/json_file.py",
    "ingot/plugins/links.py",
    "ingot/plugins/whole.py",
    "ingot/runtime/__init__.py",
    "ingot/runtime/generate.py",
    "ingot/runtime/loading.py",
    "ingot/runtime/onnxruntime_session.py",
    "ingot/runtime/operators.py",
    "ingot/runtime/ort.py",
    "ingot/runtime/prompt.py",
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
    "ingot/runtime/cuda_runtime.py",
    "ingot/runtime/trt.py",
    *(f"ingot/plugins/{operator.snake}.py" for operator in OPERATORS.values()),
)


def check_out(ingot: Path, out: Path, overwrite: bool) -> None:
    """Refuse a destination that is taken or cannot be made, before any work is done.

    Raises:
        TritonError: ``out`` exists and may not be replaced, cannot be made, or holds or lies in the
            ingot.
    """
    foreign = "was not made by ingot triton"
    try:
        keep_apart(out, ingot)
        check_destination(out, overwrite=overwrite, mark=RECORD, foreign=foreign)
    except WriteError as error:
        raise TritonError(str(error)) from error


def write_repository(
    ingot: Path,
    out: Path,
    settings: Settings,
    *,
    overwrite: bool = False,
    operators: Path | None = None,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Plan:
    """Write the whole repository, or nothing.

    Args:
        ingot: the folder to serve; every file of it is compared with its manifest.
        out: the repository.
        settings: what the user chooses.
        overwrite: replace a repository that is there.
        operators: of an ingot on Ingot's own kernels, the library that has them, which the server
            will run: see ``runtime.operators``.
        advance: told the bytes compared.

    Raises:
        IngotError: a destination that is taken, or an ingot that is damaged or does not fit.
    """
    check_out(ingot, out, overwrite)
    manifest = Manifest.read(ingot)
    plan = make_plan(ingot, manifest, settings)
    vouched = libraries(ingot, manifest, operators)
    manifest.check_files(ingot, advance=advance)
    with staged(out, replace=overwrite) as stage:
        place = ingot_place(plan)
        for file in (MANIFEST, *manifest.files):
            (stage / place / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(require_inside(ingot, file), stage / place / file)
        # In place of the ingot's own, which is to be the same: it is run because of who vouches.
        for library in vouched:
            shutil.copyfile(library, stage / place / LIBRARY)
        for path, text in rendered(plan, manifest).items():
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            (stage / path).write_text(text, encoding="utf-8")
        (stage / "launch.sh").chmod(0o755)
        version = stage / f"{plan.settings.name}_generate" / "1"
        for file in carried(manifest) if plan.generate else ():
            (version / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source(file), version / file)
        write_record(stage, plan, place, manifest)
    return plan


def carried(manifest: Manifest) -> tuple[str, ...]:
    """The files of ours that the Python model needs, from the root of the packages."""
    return CARRIED if manifest.engine is None else CARRIED + CARRIED_FOR_ENGINES


def source(file: str) -> Path:
    """Where one of the carried files lies here."""
    part = PARTS / file.removeprefix("ingot/")
    # In a checkout the package's own files lie beside the parts.
    return part if part.is_file() else PARTS / file


def ingot_place(plan: Plan) -> str:
    """Where in the repository the ingot lies."""
    name = plan.settings.name
    # Not in the Python model's own folder, which its interpreter imports from.
    return f"{name}/1" if plan.graph else f"{name}_generate/ingot"


def write_record(stage: Path, plan: Plan, place: str, manifest: Manifest) -> None:
    """``triton.json``: what the repository was made of, for the linter.

    The ingot's own manifest has the hashes of its files. What an operator may edit has none:
    configs, the launch script and the manifest for Kubernetes.
    """
    version = stage / f"{plan.settings.name}_generate" / "1"
    code = (version / file for file in ("model.py", *sorted(carried(manifest))))
    record = {
        "schema_version": SCHEMA_VERSION,
        "models": plan.models,
        "ingot": place,
        "settings": asdict(plan.settings),
        # The ingot by its manifest, which has the hashes of the rest.
        "files": {
            path.relative_to(stage).as_posix(): sha256(path)
            for path in (stage / place / MANIFEST, *(code if plan.generate else ()))
        },
    }
    (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
