"""Released shapes on this machine: what an export takes, how large it is, how fast it runs.

Run with ``.venv/bin/python benchmarks/released_shapes.py olmoe --work DIR`` (or ``jetmoe``, or any
family with a preset ``full``). A checkpoint of random weights in bfloat16 is made first and left in
``DIR``; each ingot is deleted after its figures. ``--layers N`` halves what does not fit the disk.
Every step is a process of its own, whose time and largest resident memory are its parent's to know.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HEADER = "| step | time | largest resident memory |\n|---|---|---|"
# In a process of its own: with a "1" behind the folder its files are hashed first, as by default.
RUN = """
import sys, time
from ingot.runtime.bench import bench
from ingot.runtime.loading import load
begin = time.perf_counter()
session = load(sys.argv[1], verify=sys.argv[2] == "1")
print("load:", f"{time.perf_counter() - begin:.2f}", "s")
for row in bench(session, (1,), (128,), 20):
    print(row.what, f"{row.tokens_per_second:.2f} tokens/s, +- {row.spread:.0%}")
"""


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        what: it did.
        seconds: of wall clock.
        peak_bytes: largest resident memory, mapped files included.
        printed: its output.
    """

    what: str
    seconds: float
    peak_bytes: int
    printed: str


def step(what: str, *command: str) -> Step:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    done = Step(what, time.perf_counter() - begin, usage.ru_maxrss * 1024, printed)
    print(f"| {what} | {done.seconds:.1f} s | {done.peak_bytes / 1e9:.2f} GB |", flush=True)
    if process.returncode not in (0, 1):
        raise RuntimeError(f"{what} ended with {process.returncode}: {printed[-3000:]}")
    return done


def make_checkpoint(family: str, layers: int | None, work: Path) -> None:
    """Print the folder of a checkpoint of the released shape in bfloat16, made where it is not."""
    import torch

    from ingot.graphs.family import find_family
    from ingot.graphs.preset import preset_config, write_checkpoint

    found = find_family(family)
    config = preset_config(found, "full")
    if layers is not None:
        config["num_hidden_layers"] = layers
    folder = work / f"{family}-{config['num_hidden_layers']}"
    if not (folder / "config.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_checkpoint(folder, found, config, dtype=torch.bfloat16, seed=0)
    print(folder)


def measured(checkpoint: Path, weights: str, work: Path, options: list[str]) -> Iterator[Step]:
    """Export, load, run, and with whole numbers validate, one after the other."""
    out = work / f"{checkpoint.name}-{weights}"
    shutil.rmtree(out, ignore_errors=True)
    ingot = [sys.executable, "-m", "ingot"]
    asked = ["--model", str(checkpoint), "--target", "ort", "--weights", weights, *options]
    yield step("export", *ingot, "export", *asked, "--out", str(out), "--no-validate")
    size = (out / "weights.safetensors").stat().st_size
    print(f"| weights.safetensors | {size / 1e9:.2f} GB | |", flush=True)
    if weights in ("int4", "int8"):
        yield step("load without hashes, and run", sys.executable, "-c", RUN, str(out), "0")
        yield step("load, and run", sys.executable, "-c", RUN, str(out), "1")
        quick = ["validate", str(out), "--checkpoint", str(checkpoint), "--quick"]
        yield step("validate --quick", *ingot, *quick)
    shutil.rmtree(out)


def main() -> None:
    """Print a table and write what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("family")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--weights", nargs="+", default=["int4", "bf16"])
    parser.add_argument("--block", default="32")
    parser.add_argument("--make", action="store_true", help="the checkpoint alone")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    if given.make:
        make_checkpoint(given.family, given.layers, given.work)
        return
    # A process begins with the resident memory of its parent, so this one stays small.
    made = step("make the checkpoint", sys.executable, __file__, *sys.argv[1:], "--make")
    checkpoint = Path(made.printed.splitlines()[-1])
    source = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    print(f"{checkpoint.name}: {source / 1e9:.2f} GB in bfloat16\n")
    found = []
    copy = given.work / "copy"
    copied = step("cp", "cp", "-r", str(checkpoint), str(copy))
    shutil.rmtree(copy)
    found.append(asdict(copied))
    for weights in given.weights:
        options = ["--block", given.block] if weights in ("int4", "int8") else []
        print(f"\n{weights}\n\n{HEADER}", flush=True)
        for each in measured(checkpoint, weights, given.work, options):
            found.append({"weights": weights, **asdict(each)})
            for line in each.printed.splitlines():
                if line.startswith(("load: ", "prefill ", "decode ")):
                    print(f"| {line} | | |", flush=True)
    (given.work / f"{checkpoint.name}.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
