"""Triton repositories of ingots that somebody else wrote: refused, or nothing but text in them.

No ingot is exported here: those of ``tests/data`` are changed.
"""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from google.protobuf import text_format
from markdown_it import MarkdownIt
from triton_ingots import with_engine

from ingot.export.ingot import MANIFEST, Manifest
from ingot.plugins.errors import IngotError
from ingot.plugins.json_fields import UNSAFE
from ingot.runtime.triton_escapes import code, prose, protobuf, quoted, shell
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import CONFIG, RECORD, Plan, Settings, TritonError, make_plan
from ingot.runtime.triton_repository import write_repository
from ingot.runtime.triton_texts import rendered

# On a machine that only runs the tests of GPUs it may be missing.
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

DATA = Path(__file__).parent / "data" / "schema1"
# Each would leave a file RAN, end a line, or break out of one of the languages.
NASTY = (
    *("$(touch RAN)", "`touch RAN`", "; touch RAN;", "x && touch RAN", "|touch RAN", ">RAN"),
    *('"; touch RAN; "', "'; touch RAN; '", "x}; touch RAN; ${y:-z", "\\", '\\"', "$RAN", "${RAN}"),
    *("a\ntouch RAN", "a\r\nRUN touch RAN", "#\nRUN x", "\x00", "\x1b]0;x\x07", "\u2028x"),
    *("../../RAN", "/RAN", "..", ".", "-rf", "--load-model=x", "~", "*", "?", "a b", " ", "\t"),
    *("{{ 7 * 7 }}", "{% raw %}", "{# x", "%s", "%(x)s", "'''", '"""', "```", "``", "`", "~~~"),
    *('" } input [ {', "]", "#", "x: y", "- x", "!!python/object:x", "&a", "*a", "| x", "<<EOF"),
    *("<script>x</script>", "<!--", "[x](javascript:y)", "![x](y)", "&lt;", "|x|", "\u202ex"),
    *("caf\u00e9", "\u4e2d", "\ud800", "x" * 5000, "CON", "numpy.py", "__init__"),
)


@pytest.fixture
def ingot(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "granite-ort", tmp_path / "ingot"))


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs that do nothing, to be the whole of PATH."""
    folder = tmp_path_factory.mktemp("path")
    for name in ("tritonserver", "docker", "kubectl", "python3"):
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    for name in ("dirname", "touch", "sh"):
        (folder / name).symlink_to(shutil.which(name) or "")
    return folder


def run(script: str, place: Path, fakes: Path, *, whole: bool = False) -> None:
    """Run shell text where only the fakes are, and prove that nothing was made."""
    before = sorted(place.rglob("*"))
    assert subprocess.run(["sh", "-n"], input=script.encode(), check=False).returncode == 0, script
    command = ["/bin/sh", str(place / "launch.sh")] if whole else ["/bin/sh", "-c", script]
    subprocess.run(
        command, env={"PATH": str(fakes)}, cwd=place, capture_output=True, check=False, timeout=20
    )
    assert sorted(place.rglob("*")) == before, f"made something: {script}"


def keys(value: Any) -> Any:
    """The structure of parsed YAML: its keys, and lists of them."""
    if isinstance(value, dict):
        return {str(name): keys(each) for name, each in value.items()}
    return [keys(each) for each in value] if isinstance(value, list) else type(value).__name__


def instructions(dockerfile: str) -> list[list[str]]:
    """Each instruction's words; a RUN's as a shell has them."""
    lines = [line for line in dockerfile.split("\n") if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").split("\n")
    return [shlex.split(line) for line in joined]


def structure(token: Any) -> list[str]:
    return [token.type, *(kind for each in token.children or () for kind in structure(each))]


def messages(config: Any) -> list[str]:
    """The fields that are set, and those of messages in them."""
    made = []
    for field, value in config.ListFields():
        made.append(field.name)
        for each in value if hasattr(value, "__len__") and not isinstance(value, str) else [value]:
            made += messages(each) if hasattr(each, "ListFields") else []
    return made


def outline(files: dict[str, str]) -> dict[str, Any]:
    """What each language reads in its file, values aside."""
    found: dict[str, Any] = {}
    for path, text in files.items():
        name = path.rpartition("/")[2]
        if path == "kubernetes.yaml":
            found[path] = [keys(each) for each in yaml.safe_load_all(text)]
        elif path == "Dockerfile":
            found[path] = [[words[0], len(words)] for words in instructions(text)]
        elif path == "README.md":
            tokens = MarkdownIt("commonmark").enable("table").parse(text)
            found[path] = [kind for token in tokens for kind in structure(token)]
            for token in tokens:
                if token.info == "python":
                    found.setdefault("python", []).append(
                        [type(node).__name__ for node in ast.walk(ast.parse(token.content))]
                    )
        elif name == CONFIG:
            config = text_format.Parse(text, model_config_pb2.ModelConfig())
            found.setdefault(name, []).append(messages(config))
    return found


def shell_of(readme: str) -> str:
    return "\n".join(token.content for token in MarkdownIt().parse(readme) if token.info == "sh")


def everywhere(manifest: Manifest, nasty: str) -> Manifest:
    """A manifest that has a text in each field that is free text, or ought not to be."""

    def named(items: Any, name: str = "name") -> Any:
        return tuple(replace(each, **{name: f"{nasty}{n}"}) for n, each in enumerate(items))

    states = named(named(manifest.states, "input"), "output")
    engine = manifest.engine
    if engine is not None:
        profiles = tuple(replace(each, name=nasty) for each in engine.profiles)
        engine = replace(engine, version=nasty, profiles=profiles)
    return replace(
        manifest,
        model_type=nasty,
        target=nasty,
        outputs=(replace(manifest.outputs[0], name=nasty),),
        main_output=nasty,
        inputs=named(manifest.inputs[:3]),
        states=states,
        source={**manifest.source, "checkpoint": nasty},
        tools={"onnxruntime": nasty},
        engine=engine,
        validation={"verdict": nasty},
    )


@pytest.mark.parametrize(
    "source", ["granite-ort", pytest.param("olmoe-trt-fp16", marks=pytest.mark.slow)]
)
def test_writes_text_that_no_language_takes_for_more(
    source: str, tmp_path: Path, fakes: Path
) -> None:
    """The templates alone, by a manifest that nobody checked."""
    folder = DATA / source
    if "trt" in source:
        folder = with_engine(folder, tmp_path / "engine")
    manifest = Manifest.read(folder)
    plan = make_plan(folder, manifest, Settings())

    def of(text: str) -> dict[str, str]:
        named = Plan(replace(plan.settings, name=text), True, True, f"it is {text}")
        made = rendered(named, everywhere(manifest, text))
        # The names of folders were checked before, and are no matter here.
        return {
            f"name{path.removeprefix(text)}" if path.endswith((CONFIG, "model.py")) else path: each
            for path, each in made.items()
        }

    expected = outline(of("plain"))
    place = tmp_path / "place"
    place.mkdir()
    for nasty in NASTY[bool(manifest.engine) :: 2]:
        if UNSAFE.search(nasty):
            with pytest.raises(TritonError, match="is no text of one line"):
                of(nasty)
            continue
        files = of(nasty)
        assert outline(files) == expected, nasty
        (place / "launch.sh").write_text(files["launch.sh"])
        run(files["launch.sh"], place, fakes, whole=True)
        run(shell_of(files["README.md"]), place, fakes)
        (place / "launch.sh").unlink()
        config = text_format.Parse(
            files[f"name/{CONFIG}"].encode().decode(), model_config_pb2.ModelConfig()
        )
        assert config.name == nasty


def fields(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a manifest has text: values and, with a ``...`` behind them, names."""
    if isinstance(value, str):
        yield place
    elif isinstance(value, dict):
        for name in value:
            yield (*place, name, ...)
            yield from fields(value[name], (*place, name))
    elif isinstance(value, list):
        for n, each in enumerate(value[:2]):
            yield from fields(each, (*place, n))


def _refusal(ingot: Path, out: Path) -> str | None:
    try:
        write_repository(ingot, out, Settings())
    except IngotError as error:
        return str(error)
    return None


def test_makes_of_no_ingot_a_repository_that_acts(tmp_path: Path, ingot: Path, fakes: Path) -> None:
    """Every text of a manifest in turn is every nasty one."""
    whole = (ingot / MANIFEST).read_text()
    places = [place for place in fields(json.loads(whole)) if place[0] != "validation"]
    assert len(places) > 60
    before, out = sorted(tmp_path.rglob("*")), tmp_path / "out"
    refused = 0
    for n, place in enumerate(places):
        # A part of them at each place, so that places of one kind have all between them.
        for nasty in NASTY[n % 7 :: 7]:
            raw = json.loads(whole)
            held = raw
            *above, last = place[:-1] if place[-1] is ... else place
            for part in above:
                held = held[part]
            if place[-1] is ...:
                held[nasty] = held.pop(last)
            else:
                held[last] = nasty
            (ingot / MANIFEST).write_text(json.dumps(raw))
            said = _refusal(ingot, out)
            made = [path for path in tmp_path.rglob("*") if not path.is_relative_to(out)]
            assert sorted(made) == before
            if said is not None:
                refused += 1
                assert len(said) < 2000 and not out.exists()
                continue
            run((out / "launch.sh").read_text(), out, fakes, whole=True)
            assert lint(out) == []
            shutil.rmtree(out)
    assert refused > 400


@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
def test_keeps_an_ingot_out_of_what_the_python_model_imports(tmp_path: Path, builder: str) -> None:
    ingot = with_engine(DATA / "olmoe-trt-fp16", tmp_path / "ingot", builder=builder)
    plan = write_repository(ingot, tmp_path / "r", Settings(name="m"))
    assert plan.graph == (builder == "tensorrt")
    record = json.loads((tmp_path / "r" / RECORD).read_text())
    assert not record["ingot"].startswith("m_generate/1")
    imported = tmp_path / "r" / "m_generate" / "1"
    code_files = {p.relative_to(tmp_path / "r").as_posix() for p in imported.rglob("*.py")}
    files = {p.relative_to(tmp_path / "r").as_posix() for p in imported.rglob("*") if p.is_file()}
    assert code_files == files
    assert code_files == {name for name in record["files"] if name.endswith(".py")}
    assert lint(tmp_path / "r") == []


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repository") / "r"
    write_repository(DATA / "granite-ort", out, Settings(name="m"))
    return out


@pytest.fixture
def copied(repository: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(repository, tmp_path / "r"))


@pytest.mark.parametrize(
    "name",
    [
        *("numpy.py", "onnx/__init__.py", "numpy.cpython-311-x86_64-linux-gnu.so", "a.pth"),
        *("__pycache__/numpy.py", "__pycache__/numpy.cpython-311.pyc"),
    ],
)
def test_finds_what_was_added_where_the_python_model_imports_from(copied: Path, name: str) -> None:
    (copied / "m_generate" / "1" / "__pycache__").mkdir()
    (copied / "m_generate" / "1" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"x")
    assert lint(copied) == []
    path = copied / "m_generate" / "1" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("import os")
    assert any(f"{name} was not written here" in problem for problem in lint(copied))


def test_finds_a_link_to_a_package_where_the_python_model_imports_from(
    copied: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    version = copied / "m_generate" / "1"
    for link in (version / "numpy", version / "__pycache__"):
        link.symlink_to(tmp_path / "elsewhere")
        name = link.relative_to(copied).as_posix()
        assert any(f"{name} was not written here" in problem for problem in lint(copied))
        link.unlink()
    assert lint(copied) == []


HASH = "0" * 64
RECORDS: list[Any] = [
    *(b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b"{}", b'{"schema_version": 1}'),
    b'{"schema_version": 1' + b"0" * 5000 + b"}",
    {"schema_version": True},
    {"schema_version": "1"},
    {"models": []},
    {"models": "m"},
    {"models": ["../../etc"]},
    {"models": ["m\n"]},
    {"models": [None]},
    {"models": ["m"] * 1000},
    {"ingot": "../../../etc"},
    {"ingot": "/etc"},
    {"ingot": None},
    {"files": []},
    {"files": {"../../etc/passwd": HASH}},
    {"files": {"/etc/passwd": HASH}},
    {"files": {"nul\0": HASH}},
    {"files": {"m/1/model.onnx": None}},
    {"files": {"m/1/model.onnx": "0"}},
    {"more": 1},
]


@pytest.mark.parametrize("change", RECORDS, ids=range(len(RECORDS)))
def test_refuses_a_record_that_is_none(copied: Path, change: Any) -> None:
    if not isinstance(change, bytes):
        change = json.dumps({**json.loads((copied / RECORD).read_text()), **change}).encode()
    (copied / RECORD).write_bytes(change)
    with pytest.raises(TritonError, match=r"is damaged|has schema version") as refused:
        lint(copied)
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


CONFIGS: list[tuple[str, str, str, str]] = [
    ("m", 'name: "m"', "\udcff", "cannot be read"),
    ("m", 'name: "m"', 'name: "\\033[31m"', "names the model"),
    ("m", 'name: "m"', "# " + "x" * (1 << 20), "larger than"),
    ("m", "max_batch_size: 1", "max_batch_size: 1" + "0" * 5000, "cannot be read"),
    ("m", "max_batch_size: 1", "x {" * 5000, "cannot be read"),
    ("m", "TYPE_INT64", "99", "is 99"),
    ("m", '"model.onnx"', '"../../../../etc/passwd\\000"', "is missing"),
    ("m", '"model.onnx"', '"' + "x" * 5000 + '"', "is missing"),
    ("m", '"past_key_values.0.key"', '"\\r\\033[2Kfine"', "is not in model.onnx"),
    ("m_generate", '"../m/1"', '"../m/1\\000"', "where no ingot lies"),
    ("m_generate", '"../m/1"', '"' + "y" * 5000 + '"', "where no ingot lies"),
    ("m_generate", 'string_value: "4"', 'string_value: "' + "9" * 5000 + '"', "must be a number"),
    ("m_generate", 'string_value: "4"', 'string_value: "\\331\\243"', "must be a number"),
]


@pytest.mark.parametrize(
    ("model", "old", "new", "said"), CONFIGS, ids=[f"{c[0]}-{n}" for n, c in enumerate(CONFIGS)]
)
def test_says_what_is_wrong_with_a_hostile_config(
    copied: Path, model: str, old: str, new: str, said: str
) -> None:
    path = copied / model / CONFIG
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode("utf-8", "surrogateescape"))
    problems = lint(copied)
    assert any(said in problem for problem in problems)
    assert all(len(each) <= 1000 and not UNSAFE.search(each) for each in problems)


def test_says_that_a_part_of_the_repository_lies_elsewhere(copied: Path, tmp_path: Path) -> None:
    path = copied / "m_generate" / "1" / "model.py"
    shutil.move(path, tmp_path / "elsewhere.py")
    path.symlink_to(tmp_path / "elsewhere.py")
    assert any("is a link out of its folder" in problem for problem in lint(copied))


@pytest.mark.parametrize("text", [text for text in NASTY if not UNSAFE.search(text)])
def test_quotes_for_each_language(text: str) -> None:
    assert shlex.split(shell(text)) == [text]
    config = text_format.Parse(f"name: {protobuf(text)}", model_config_pb2.ModelConfig())
    assert config.name == text
    assert yaml.safe_load(quoted(text)) == text == ast.literal_eval(quoted(text))
    tokens = MarkdownIt("commonmark").parseInline(f"a {code(text)} b")[0].children or []
    assert [token.type for token in tokens] == ["text", "code_inline", "text"]
    # A bar would end a cell, where such a span stands in a table.
    assert tokens[1].content.strip() == text.strip().replace("|", "\\|")
    tokens = MarkdownIt("commonmark").enable("table").parseInline(f"a {prose(text)} b")
    assert not {"html_inline", "link_open", "image", "code_inline"} & {
        kind for token in tokens for kind in structure(token)
    }


def test_runs_as_the_user_who_reads_it_not_as_the_ingot(tmp_path: Path) -> None:
    """The test's own canary: what it runs would leave a file, were it not quoted."""
    subprocess.run(["/bin/sh", "-c", "$(touch RAN)"], cwd=tmp_path, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["RAN"]
