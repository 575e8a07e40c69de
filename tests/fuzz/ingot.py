"""Damaged and hostile ingots: each is refused in one sentence, or runs to the tokens that it had.

The ingots of ``tests/data`` are changed in their manifest, their graph, their weights or what else
lies in the folder. Each is loaded and run, inspected, and made a Triton repository of.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fuzz import forks
from ingot.export.ingot import GRAPH, MANIFEST, WEIGHTS, file_infos
from ingot.runtime.generate import generate
from ingot.runtime.inspection import inspect
from ingot.runtime.loading import load
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import CONFIG, RECORD, Settings
from ingot.runtime.triton_repository import write_repository

DATA = Path(__file__).parents[1] / "data" / "schema1"
SOURCES = sorted(path.parent for path in DATA.glob(f"*/{MANIFEST}"))
PROMPTS = [[3, 4, 5], [6]]
DEEP = "[" * 50_000 + "]" * 50_000
# As JSON text, since some of it is nothing that Python would write.
VALUES = (
    *("null", "true", "false", "0", "1", "-1", "2", "96", "1.0", "1e2", "-0.0", "1e999", "NaN"),
    *("Infinity", "9223372036854775807", "9223372036854775808", "-9223372036854775809"),
    *("1" + "0" * 30, "1" + "0" * 400, "1" + "0" * 4400, '""', '" "', '"0"', '"batch"', '"x"'),
    *('"sequence"', '"past_sequence"', '"total_sequence"', '"float16"', '"bfloat16"', '"int64"'),
    *('"float32"', '"ort"', '"onnx"', '"trt"', '"generate"', '"classify"', '"features"', '"ssm"'),
    *('"key"', '"logits"', '"input_ids"', '"../../x"', '"/dev/zero"', '"a/../b"', '"$(x)"'),
    *(r'"\u0000"', r'"\ud800"', r'"\u202e"', r'"a\nb"', '"' + "y" * 100_000 + '"', DEEP),
    *("[]", "[null]", "[1]", "[[]]", "[-1, 1]", '["batch"]', '["batch", "sequence"]', "{}"),
    *('{"a": 1}', '{"bytes": 0, "sha256": ""}', "[" + "1," * 5000 + "1]"),
)
MARK = '"@@"'


class Fuzzer:
    """Attempts of one seed."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._right = {source.name: self._run(source) for source in SOURCES}

    def __call__(self, number: int, place: Path) -> tuple[str, str]:
        rng = random.Random(f"{self._seed} {number}")
        source = rng.choice(SOURCES)
        folder = Path(shutil.copytree(source, place / "ingot"))
        if rng.random() < 0.05:
            label, opened = repository(rng, folder)
            return label, forks.outcome_of(opened)
        (change,) = rng.choices((text, graph, weights, files), (8, 3, 2, 2))
        label = change(rng, folder)
        # The numbers of another graph or of other weights are theirs, and so is what is said of it.
        other = change in (graph, weights)
        (opened,) = rng.choices(
            (
                lambda: self._run(folder) == self._right[source.name] or other,
                lambda: bool(inspect(folder)),
                lambda: self._written(folder, place) or other,
            ),
            (3, 1, 1),
        )
        return f"{source.name}, {label}", forks.outcome_of(opened)

    @staticmethod
    def _run(folder: Path) -> Any:
        """Tokens, or of a classifier the sign of each logit."""
        session = load(folder, threads=1)
        if session.manifest.task == "classify":
            session.reset(1, 3)
            ids = np.array(PROMPTS[:1])
            return bool((session.step(ids, np.ones_like(ids)) > 0).any())
        made = list(generate(session, PROMPTS, max_new_tokens=3, stop_ids=()))
        session.state()
        return made

    @staticmethod
    def _written(folder: Path, place: Path) -> bool:
        """Nothing is written but at --out, and nothing is wrong with it."""
        write_repository(folder, place / "out", Settings())
        beside = {path.name for path in place.iterdir()}
        return beside == {"ingot", "out"} and lint(place / "out") == []


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in parsed JSON; of figures that nothing runs by, one is enough."""
    if above:
        yield above
    if above[:1] == ("validation",) and len(above) > 1:
        return
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(each, (*above, key))


def text(rng: random.Random, folder: Path) -> str:
    """Change ``ingot.json``."""
    held = json.loads((folder / MANIFEST).read_text())
    kinds = ("set", "drop", "copy", "swap", "rename", "bytes", "cut")
    (kind,) = rng.choices(kinds, (8, 2, 2, 2, 2, 3, 1))
    if kind in ("bytes", "cut"):
        data = bytearray((folder / MANIFEST).read_bytes())
        if kind == "cut":
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 3) if data else 0):
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *b'{}[]",:0-e\\'))
        (folder / MANIFEST).write_bytes(data)
        return f"{MANIFEST}: {kind}"
    written: list[tuple[str, str]] = []
    said = [kind]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *above, last = rng.choice(list(places(held)))
        inner: Any = held
        for key in above:
            inner = inner[key]
        said.append("/".join(map(str, (*above, last))))
        if kind == "set":
            value = rng.choice(VALUES)
            inner[last] = f"@{len(written)}@"
            written.append((json.dumps(inner[last]), value))
            said.append(value[:30])
        elif kind == "drop":
            del inner[last]
        elif kind == "swap":
            other = rng.choice(list(inner if isinstance(inner, dict) else range(len(inner))))
            inner[last], inner[other] = inner[other], inner[last]
        elif isinstance(inner, list):
            inner.insert(rng.randrange(len(inner) + 1), inner[last])
        else:
            name = json.loads(rng.choice([each for each in VALUES if each.startswith('"')]))
            inner[name] = inner[last] if kind == "copy" else inner.pop(last)
    made = json.dumps(held)
    for mark, value in written:
        made = made.replace(mark, value, 1)
    (folder / MANIFEST).write_bytes(made.encode("utf-8", "surrogatepass"))
    return f"{MANIFEST}: {' '.join(said)}"


def damaged(rng: random.Random, data: bytearray, most: int) -> str:
    """Change bytes among the first ``most``."""
    kind = rng.choice(("bits", "bytes", "cut", "longer", "splice", "zeros"))
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "longer":
        data += bytes(rng.choice((1, 64, 5000)))
    elif kind in ("splice", "zeros"):
        size = rng.randint(1, 80)
        source, to = rng.randrange(most), rng.randrange(most)
        data[to : to + size] = bytes(size) if kind == "zeros" else data[source : source + size]
    else:
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(most)
            data[at] = data[at] ^ 1 << rng.randrange(8) if kind == "bits" else rng.randrange(256)
    return kind


def sealed(folder: Path) -> None:
    """Give every file the size and hash that it has now, as whoever writes a folder can."""
    held = json.loads((folder / MANIFEST).read_text())
    infos = file_infos(folder, {})
    held["files"] = {name: vars(info) for name, info in infos.items()}
    (folder / MANIFEST).write_text(json.dumps(held))


def graph(rng: random.Random, folder: Path) -> str:
    """Change the graph, hashes put right."""
    data = bytearray((folder / GRAPH).read_bytes())
    kind = damaged(rng, data, len(data))
    (folder / GRAPH).write_bytes(data)
    sealed(folder)
    return f"{GRAPH}: {kind}"


def weights(rng: random.Random, folder: Path) -> str:
    """Change the weights, mostly their header, hashes put right."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    kind = damaged(rng, data, rng.choice((16, 600, len(data))))
    (folder / WEIGHTS).write_bytes(data)
    sealed(folder)
    return f"{WEIGHTS}: {kind}"


def files(rng: random.Random, folder: Path) -> str:
    """Change what lies in the folder."""
    name = rng.choice([path.name for path in folder.iterdir()])
    path = folder / name
    kind = rng.choice(("gone", "link out", "link in", "folder", "fifo", "circle", "more", "other"))
    if kind == "more":
        name = rng.choice(("tokenizer.json", "chat_template.jinja", "x.txt", "a.py", "..x", "a b"))
        (folder / name).write_text("{}")
        if rng.random() < 0.5:
            sealed(folder)
        return f"more: {name}"
    if kind == "other":
        path.write_bytes(b"") if path.is_file() else None
        return f"emptied: {name}"
    path.rename(folder.parent / "kept")
    if kind == "link out":
        path.symlink_to("../kept")
    elif kind == "link in":
        (folder.parent / "kept").rename(folder / "kept")
        path.symlink_to("kept")
    elif kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(name)
    if kind != "link in":
        kept = folder.parent / "kept"
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    return f"{kind}: {name}"


def repository(rng: random.Random, folder: Path) -> tuple[str, Callable[[], bool]]:
    """Change a Triton repository, for the linter; what it finds are sentences."""
    out = folder.parent / "out"
    source = DATA / "granite-ort"
    write_repository(source, out, Settings(name="m"))
    name = rng.choice((RECORD, f"m/{CONFIG}", f"m_generate/{CONFIG}", f"m/1/{MANIFEST}"))
    data = bytearray((out / name).read_bytes())
    kind = damaged(rng, data, len(data))
    (out / name).write_bytes(data)
    # A list is right whatever it says.
    return f"{name}: {kind}", lambda: all(len(each) < forks.LETTERS for each in lint(out))


if __name__ == "__main__":
    forks.command(__doc__, Fuzzer)
