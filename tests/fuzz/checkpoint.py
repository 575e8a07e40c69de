"""Damaged and hostile checkpoints: each is refused in one sentence, or read bit by bit as it is.

A tiny checkpoint of each family is changed in its config, in its safetensors header, in the index
of its shards or in ``generation_config.json``. What is read of it is compared with what safetensors
itself reads.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from fuzz import forks
from ingot.export.generation import read_generation
from ingot.graphs.checkpoint import INDEX, SINGLE, Checkpoint, is_buffer, load_parameters
from ingot.graphs.family import family_of, find_family
from ingot.graphs.names import FAMILIES
from ingot.graphs.preset import preset_config, write_checkpoint

GENERATION = "generation_config.json"
# As JSON text, since some of it is nothing that Python would write.
DEEP = "[" * 50_000 + "]" * 50_000
VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "3", "5", "64", "1.5", "16.0", "1e308"),
    *("1e999", "-1e308", "1e-320", "-0.0", "NaN", "Infinity", "-Infinity", "1000000000"),
    *("9223372036854775807", "9223372036854775808", "1" + "0" * 400, "1" + "0" * 4400, '""'),
    *('"x"', '"16"', '"silu"', '"gelu"', '"yarn"', '"../../x"', r'"\ud800"', r'"a\nb\u001b"'),
    *('"' + "z" * 1_000_000 + '"', DEEP, "[]", "[1]", "[[1]]", "[null, 1]", "{}", '{"a": 1}'),
    *('{"rope_type": "default"}', '{"rope_type": []}', '{"type": 3}', '{"rope_theta": "x"}'),
    '{"rope_type": "yarn", "factor": 0}',
    '{"rope_type": "linear", "factor": NaN}',
    '{"rope_type": "dynamic", "factor": 1' + "0" * 400 + "}",
    '{"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 1}',
    '{"rope_type": "longrope", "short_factor": [], "long_factor": {}}',
)
MORE = (
    *("rope_scaling", "rope_parameters", "architectures", "quantization_config", "torch_dtype"),
    *("num_labels", "id2label", "head_dim", "auto_map", "d_model", "ssm_cfg", "zzz"),
)


class Fuzzer:
    """Attempts of one seed, over checkpoints that are made once."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._made = tempfile.TemporaryDirectory(prefix="fuzz-checkpoints-")
        self._sources = {family: Path(self._made.name) / family for family in FAMILIES}
        for name, folder in self._sources.items():
            family = find_family(name)
            preset = preset_config(family, "tiny")
            # Layers of several kinds are named one by one.
            mixed = {"layer_types", "attn_layer_indices"} & preset.keys()
            layers = preset["num_hidden_layers"] if mixed else 1
            config = {**preset, "num_hidden_layers": layers, "vocab_size": 64}
            folder.mkdir()
            write_checkpoint(folder, family, config, seed=seed)
            # What is imported late is imported before the forks.
            assert read(folder)

    def __call__(self, number: int, place: Path) -> tuple[str, str]:
        rng = random.Random(f"{self._seed} {number}")
        family = rng.choice(FAMILIES)
        folder = Path(shutil.copytree(self._sources[family], place / family))
        (change,) = rng.choices((header, config, index, generation), (6, 5, 3, 1))
        label = change(rng, folder)
        return f"{family}, {change.__name__}: {label}", forks.outcome_of(lambda: read(folder))


def read(folder: Path) -> bool:
    """Read all that an export reads; whether it is what the files hold."""
    checkpoint = Checkpoint.open(folder)
    family = family_of(checkpoint)
    model = family.build(checkpoint.config, "generate", stored=checkpoint.entries)
    weight_map = family.weight_map(model, checkpoint, "generate")
    read_generation(checkpoint, model.config)
    load_parameters(model, checkpoint, weight_map)
    expected = _truth(folder)
    found = {name: checkpoint.read(name) for name in checkpoint.entries}
    unread = {name: tensor for name, tensor in expected.items() if name not in found}
    return all(is_buffer(name, tuple(tensor.shape)) for name, tensor in unread.items()) and all(
        _bytes(tensor) == _bytes(expected[name]) for name, tensor in found.items()
    )


def _truth(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, by safetensors' own reader."""
    files = {folder / SINGLE}
    if not (folder / SINGLE).is_file():
        names = json.loads((folder / INDEX).read_text())["weight_map"].values()
        files = {folder / name for name in names}
    found = {}
    for file in files:
        try:
            with safe_open(file, "pt") as held:
                found.update({name: held.get_tensor(name) for name in held.keys()})  # noqa: SIM118
        except SafetensorError:
            return {}
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def config(rng: random.Random, folder: Path) -> str:
    """Other values in a few fields, whatever they are."""
    held = json.loads((folder / "config.json").read_text())
    changed = {
        rng.choice((*held, *MORE)): rng.choice(VALUES) for _ in range(rng.choice((1, 1, 2, 3)))
    }
    if rng.random() < 0.1:
        held.pop(rng.choice(list(held)))
    written = {**{name: json.dumps(value) for name, value in held.items()}, **changed}
    text = ", ".join(f"{json.dumps(name)}: {value}" for name, value in written.items())
    (folder / "config.json").write_text(f"{{{text}}}")
    return ", ".join(f"{name} = {value[:20]}" for name, value in changed.items())


def generation(rng: random.Random, folder: Path) -> str:
    """A ``generation_config.json``, or something of its name."""
    name = rng.choice(("eos_token_id", "pad_token_id", "bos_token_id", "temperature"))
    value = rng.choice(VALUES)
    text = rng.choice((f'{{"{name}": {value}}}', value, f'{{"{name}": {value},}}', "", "\ufeff{}"))
    (folder / GENERATION).write_bytes(text.encode(rng.choice(("utf-8", "utf-16")), "replace"))
    return text[:30]


def header(rng: random.Random, folder: Path) -> str:
    """A safetensors file with something wrong in its header, or odd."""
    path = folder / SINGLE
    data = bytearray(path.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    kind = rng.choice(("bits", "cut", "longer", "size", "entry", "entry", "entry", "name", "text"))
    if kind == "bits":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8 + size)] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[rng.choice((0, 7, 8, 9, rng.randrange(len(data)), len(data) - 1)) :]
    elif kind == "longer":
        data += bytes(rng.choice((1, 8, 4096)))
    elif kind == "size":
        odd = (0, 1, size - 1, size + 1, len(data), 1 << 31, 1 << 63, (1 << 64) - 1, 100_000_001)
        data[:8] = struct.pack("<Q", rng.choice(odd))
    else:
        held = json.loads(data[8 : 8 + size])
        name = rng.choice([each for each in held if each != "__metadata__"])
        text, said = _edited(rng, kind, held, name)
        kind = f"{kind} {said}"
        made = text.encode("utf-8", "surrogatepass")
        data[: 8 + size] = struct.pack("<Q", len(made)) + made
    path.write_bytes(data)
    return kind


def _edited(rng: random.Random, kind: str, held: dict[str, Any], name: str) -> tuple[str, str]:
    """A header's text with one entry changed, and what was done."""
    if kind == "name":
        new = rng.choice(("", "../x", "__metadata__", f"{name}\0", "lm_head.weight", name.upper()))
        held[new] = held.pop(name)
        return json.dumps(held), f"{name} to {new!r}"
    if kind == "text":
        text, digits = json.dumps(held), "1" + "0" * 4400
        ends = (f', "x": {DEEP}}}', f', "x": {{"y": {digits}}}}}', ",}", "}}", f", {text[1:]}")
        return text[:-1] + rng.choice(ends), "end"
    key = rng.choice(("dtype", "shape", "data_offsets"))
    begin, end = held[name]["data_offsets"]
    odd: dict[str, tuple[Any, ...]] = {
        "dtype": ("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "f32", "", None, 3, ["F32"]),
        "shape": ([-1], [0], [], [1 << 63], [1 << 32] * 2, [1.0], [True], ["4"], None, [[4]]),
        "data_offsets": ([0], [], [end, begin], [-4, 0], [begin, 1 << 64], [0.0, 4.0], None),
    }
    held[name][key] = rng.choice((*odd[key], held[rng.choice(list(held))].get(key)))
    return json.dumps(held), f"{name} {key} {held[name][key]}"


def index(rng: random.Random, folder: Path) -> str:
    """Two shards, and an index that is wrong about them or odd."""
    tensors = load((folder / SINGLE).read_bytes())
    (folder / SINGLE).unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    where = {name: files[n % 2] for n, name in enumerate(tensors)}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        (folder / file).write_bytes(save(part))
    name, text = rng.choice(list(where)), None
    kinds = ("right", "place", "absent", "unlisted", "types", "deep", "link", "swapped", "single")
    kind = rng.choice(kinds)
    if kind == "place":
        places: tuple[Any, ...] = (
            "../x",
            "/x",
            f"./{files[0]}",
            "a/../x",
            "..",
            "",
            f"{files[0]}\0",
            3,
            None,
            [],
        )
        where[name] = rng.choice(places)
    elif kind == "absent":
        (folder / files[0]).unlink() if rng.random() < 0.5 else where.update(ghost=files[0])
    elif kind == "unlisted":
        where.pop(name)
    elif kind == "types":
        text = rng.choice(("[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}", "null"))
    elif kind == "deep":
        text = rng.choice((f'{{"weight_map": {DEEP}}}', '{"metadata": 1' + "0" * 4400 + "}"))
    elif kind == "link":
        (folder / files[0]).unlink()
        (folder / files[0]).symlink_to(rng.choice(("config.json", files[0], "/dev/null", "absent")))
    elif kind == "swapped":
        data = (folder / files[0]).read_bytes()
        (folder / files[0]).write_bytes((folder / files[1]).read_bytes())
        (folder / files[1]).write_bytes(data)
    elif kind == "single":
        shutil.copyfile(folder / files[0], folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}) if text is None else text)
    return f"{kind} {name}"


if __name__ == "__main__":
    forks.command(__doc__, Fuzzer)
