"""The cache of the eager truth: it gives back what was put, or nothing, and never an error."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ingot.plugins.whole import staged_file
from ingot.validate.truth import cache as cache_module
from ingot.validate.truth.cache import (
    Cache,
    Recording,
    code_digest,
    default_cache,
    inputs_digest,
    key,
)

ROOT = Path(__file__).resolve().parent.parent
KEYS = [key(number=number) for number in range(8)]


def recording(seed: int = 0, size: int = 40) -> Recording:
    """Two calls in an order that sorting would change, of about ``16 * size`` bytes."""
    random = np.random.default_rng(seed)
    return [
        {
            "present.1/key": random.standard_normal((2, size)).astype(np.float32),
            "logits": random.standard_normal(size),
        },
        {"logits": random.standard_normal(3)},
    ]


def assert_same(found: Recording | None, expected: Recording) -> None:
    assert found is not None
    assert [list(call) for call in found] == [list(call) for call in expected]
    for one, other in zip(found, expected, strict=True):
        for name, array in other.items():
            assert (one[name].dtype, one[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(one[name], array, strict=True)


def file_of(cache: Cache, name: str) -> Path:
    return cache.folder / f"{name}.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "new" / "cache")


@pytest.mark.parametrize(
    "found",
    [
        recording(),
        [],
        [{}],
        [{}, {"x": np.ones(3)}, {}],
        [{f"x{i}": np.full(1, i)} for i in range(12)],
        [{"scalar": np.array(2.5, np.float32), "none": np.zeros((2, 0, 3)), "": np.ones(1)}],
        [{"ids": np.array([[-(2**63), 2**63 - 1]]), "mask": np.array([True, False])}],
        [{"x": np.array([np.nan, -0.0, np.inf, 5e-324])}],
    ],
    ids=["calls", "no calls", "empty call", "empty calls", "12 calls", "shapes", "ints", "floats"],
)
def test_gives_back_what_was_put(cache: Cache, found: Recording) -> None:
    cache.put(KEYS[0], found)
    assert_same(cache.get(KEYS[0]), found)
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEYS[0]}.safetensors"]


def test_gives_back_arrays_that_do_not_lie_in_one_piece(cache: Cache) -> None:
    base = np.arange(24.0).reshape(4, 6)
    found = [{"turned": base.T, "column": base[:, 1], "reversed": base[::-1], "swapped": base}]
    found[0]["swapped"] = base.astype(">f8")
    cache.put(KEYS[0], found)
    got = cache.get(KEYS[0])
    assert got is not None
    for name, array in found[0].items():
        np.testing.assert_array_equal(got[0][name], array)
        assert got[0][name].dtype == np.float64


def test_a_file_is_plain_safetensors(cache: Cache) -> None:
    cache.put(KEYS[0], recording())
    tensors = load_file(file_of(cache, KEYS[0]))
    assert sorted(tensors) == ["0/logits", "0/present.1/key", "1/logits"]


def test_an_unknown_key_is_a_miss(cache: Cache) -> None:
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], recording())
    assert cache.get(KEYS[1]) is None


@pytest.mark.parametrize("name", ["", "x", "../" + "0" * 61, "0" * 63, "G" * 64, "0" * 64 + "\n"])
def test_a_key_is_no_path(cache: Cache, name: str) -> None:
    with pytest.raises(ValueError, match=r"validate\.truth\.cache\.key"):
        cache.get(name)
    with pytest.raises(ValueError, match=r"validate\.truth\.cache\.key"):
        cache.put(name, [])


def test_put_again_replaces(cache: Cache) -> None:
    cache.put(KEYS[0], recording(0))
    cache.put(KEYS[0], recording(1))
    assert_same(cache.get(KEYS[0]), recording(1))


@pytest.mark.parametrize("dtype", [np.float16, np.int32, np.complex128, object])
def test_refuses_another_dtype(cache: Cache, dtype: type) -> None:
    with pytest.raises(TypeError, match=np.dtype(dtype).name):
        cache.put(KEYS[0], [{"x": np.ones(2, dtype)}])
    assert not cache.folder.exists()


def test_every_truncated_file_is_a_miss_and_goes(cache: Cache) -> None:
    cache.put(KEYS[0], [{"x": np.ones(3)}])
    path = file_of(cache, KEYS[0])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert cache.get(KEYS[0]) is None
        assert not path.exists()


def test_every_changed_byte_is_a_miss_and_goes(cache: Cache) -> None:
    cache.put(KEYS[0], [{"x": np.array([1.0, -2.0]), "y": np.array([True])}])
    path = file_of(cache, KEYS[0])
    whole = path.read_bytes()
    for at in range(len(whole)):
        # The numbers, and the letters of the header.
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert cache.get(KEYS[0]) is None, whole[at : at + 9]
        assert not path.exists()


DIGESTS = cache_module._metadata([{"x": np.ones(1)}])
HALF = cache_module._metadata([{"x": np.ones(1, np.float16)}])


@pytest.mark.parametrize(
    ("tensors", "changes"),
    [
        ({"0/x": np.ones(1)}, {"schema": "2"}),
        ({"0/x": np.ones(1)}, {"calls": "2"}),
        ({"0/x": np.ones(1)}, {"names": "[[]]"}),
        ({"0/x": np.ones(1)}, {"names": '[["x", "x"]]'}),
        ({"0/x": np.ones(1)}, {"names": "3"}),
        ({"0/x": np.ones(1)}, {"names": "{"}),
        ({"0/x": np.ones(1)}, {"names": "[" * 100_000}),
        ({"0/x": np.ones(1)}, {"names": "[[[]]]"}),
        ({"0/x": np.ones(1)}, {"sha256": ""}),
        ({"0/x": np.ones(1), "0/y": np.ones(1)}, {}),
        ({"1/x": np.ones(1)}, {}),
        ({"0/y": np.ones(1)}, {"names": '[["y"]]'}),
        ({"0/x": np.ones(1, np.float16)}, {}),
        ({"0/x": np.ones(1, np.float16)}, HALF),
        ({}, {}),
    ],
)
def test_another_file_of_the_format_is_a_miss_and_goes(
    cache: Cache, tensors: dict[str, np.ndarray], changes: dict[str, str]
) -> None:
    path = file_of(cache, KEYS[0])
    cache.folder.mkdir(parents=True)
    save_file({"0/x": np.ones(1)}, path, metadata=DIGESTS)
    assert_same(cache.get(KEYS[0]), [{"x": np.ones(1)}])
    save_file(tensors, path, metadata={**DIGESTS, **changes})
    assert cache.get(KEYS[0]) is None
    assert not path.exists()
    save_file({"0/x": np.ones(1)}, path)
    assert cache.get(KEYS[0]) is None
    assert not path.exists()


def test_a_pickle_is_a_miss_and_not_loaded(cache: Cache, tmp_path: Path) -> None:
    cache.folder.mkdir(parents=True)
    made = tmp_path / "made"
    bomb = f"cos\nsystem\n(S'touch {made}'\ntR."
    file_of(cache, KEYS[0]).write_text(bomb)
    assert cache.get(KEYS[0]) is None
    assert not made.exists()


def test_two_writers_of_one_key(cache: Cache) -> None:
    """A third reads meanwhile: one of the two, whole, from the first put on."""
    both = {float(own[1]["logits"][0]): own for own in (recording(1, 20_000), recording(2, 20_000))}
    stop = time.monotonic() + 1
    start = threading.Barrier(3)

    def write(own: Recording) -> None:
        start.wait()
        while time.monotonic() < stop:
            cache.put(KEYS[0], own)

    def read() -> int:
        start.wait()
        seen = 0
        while time.monotonic() < stop:
            found = cache.get(KEYS[0])
            assert found is not None or not seen
            if found is not None:
                seen += 1
                assert_same(found, both[float(found[1]["logits"][0])])
        return seen

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, own) for own in both.values()]
        assert pool.submit(read).result() > 1
        assert [writer.result() for writer in writers] == [None, None]
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEYS[0]}.safetensors"]


def test_the_least_recently_used_goes(cache: Cache) -> None:
    for number in range(3):
        cache.put(KEYS[number], recording(number))
    size = file_of(cache, KEYS[0]).stat().st_size
    assert cache.get(KEYS[0]) is not None
    small = Cache(cache.folder, limit=3 * size + size // 2)
    small.put(KEYS[3], recording(3))
    assert {name for name in KEYS if file_of(cache, name).exists()} == {KEYS[0], KEYS[2], KEYS[3]}
    # A miss is no use.
    assert small.get(KEYS[1]) is None
    small.put(KEYS[1], recording(1))
    assert {name for name in KEYS if file_of(cache, name).exists()} == {KEYS[0], KEYS[3], KEYS[1]}


def test_all_within_the_limit_stay(cache: Cache) -> None:
    cache.put(KEYS[0], recording())
    size = file_of(cache, KEYS[0]).stat().st_size
    exact = Cache(cache.folder, limit=4 * size)
    for number in range(5):
        exact.put(KEYS[number], recording(number))
    assert [file_of(cache, name).exists() for name in KEYS[:5]] == [False, *[True] * 4]


def test_the_newest_stays_whatever_the_clock_says(cache: Cache) -> None:
    for number in range(2):
        cache.put(KEYS[number], recording(number))
        os.utime(file_of(cache, KEYS[number]), (2**33, 2**33))
    size = file_of(cache, KEYS[0]).stat().st_size
    Cache(cache.folder, limit=size).put(KEYS[2], recording(2))
    assert [path.stem for path in cache.folder.iterdir()] == [KEYS[2]]


def test_what_is_dated_in_the_future_goes_first(cache: Cache) -> None:
    for number in range(3):
        cache.put(KEYS[number], recording(number))
    ahead = time.time() + 3600
    os.utime(file_of(cache, KEYS[1]), (ahead, ahead))
    size = file_of(cache, KEYS[0]).stat().st_size
    small = Cache(cache.folder, limit=3 * size + size // 2)
    small.put(KEYS[3], recording(3))
    assert {name for name in KEYS if file_of(cache, name).exists()} == {KEYS[0], KEYS[2], KEYS[3]}
    # A use dates it anew; the clock of another machine may be a little ahead.
    os.utime(file_of(cache, KEYS[2]), (ahead, ahead))
    assert small.get(KEYS[2]) is not None
    os.utime(file_of(cache, KEYS[3]), (time.time() + 5,) * 2)
    small.put(KEYS[4], recording(4))
    assert {name for name in KEYS if file_of(cache, name).exists()} == {KEYS[2], KEYS[3], KEYS[4]}


def test_what_another_process_is_writing_counts_and_stays(cache: Cache) -> None:
    for number in range(3):
        cache.put(KEYS[number], recording(number))
    size = file_of(cache, KEYS[0]).stat().st_size
    small = Cache(cache.folder, limit=4 * size)
    with staged_file(file_of(cache, KEYS[4])) as part:
        part.write_bytes(b"x" * (2 * size))
        small.put(KEYS[3], recording(3))
        names = {name for name in KEYS if file_of(cache, name).exists()}
        assert names == {KEYS[2], KEYS[3]}
        assert part.stat().st_size == 2 * size
        # However much it is, what was put stays.
        part.write_bytes(b"x" * (9 * size))
        small.put(KEYS[5], recording(5))
        assert {name for name in KEYS if file_of(cache, name).exists()} == {KEYS[5]}


def test_what_is_larger_than_the_limit_is_not_kept(cache: Cache) -> None:
    cache.put(KEYS[0], recording())
    size = file_of(cache, KEYS[0]).stat().st_size
    # The header makes the file larger than its numbers; both count.
    for limit in (size - 1, 100):
        Cache(cache.folder, limit).put(KEYS[1], recording(1))
        assert [path.stem for path in cache.folder.iterdir()] == [KEYS[0]]


def test_what_is_larger_than_the_limit_does_not_fill_the_disk_first(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    Cache(folder, limit=1000).put(KEYS[0], [{"x": np.zeros(100)}, {"x": np.zeros(26)}])
    assert not folder.exists()


def test_removes_nothing_that_is_not_its_own(cache: Cache) -> None:
    cache.folder.mkdir(parents=True)
    others = ["model.safetensors", f"{KEYS[1]}.bin", "notes.txt", ".tmpX", "0.safetensors"]
    for name in others:
        (cache.folder / name).write_bytes(b"x" * 10_000)
        os.utime(cache.folder / name, (1, 1))
    (cache.folder / "folder").mkdir()
    cache.put(KEYS[0], recording())
    size = file_of(cache, KEYS[0]).stat().st_size
    Cache(cache.folder, limit=size).put(KEYS[2], recording())
    names = {path.name for path in cache.folder.iterdir()}
    assert names == {*others, "folder", f"{KEYS[2]}.safetensors"}


def test_what_a_killed_process_left_goes(cache: Cache) -> None:
    # Of one file system with locks and of one without; of this recording and of another.
    left = {name: cache.folder / f".{name}.safetensors.partial-12ab" for name in KEYS[:3]}
    for path in left.values():
        path.mkdir(parents=True)
        (path / "new").write_bytes(b"x")
    (left[KEYS[1]] / "lock").touch()
    for path in (left[KEYS[2]] / "new", left[KEYS[2]]):
        os.utime(path, (time.time() - 2 * 86400,) * 2)
    cache.put(KEYS[0], [])
    names = {path.name for path in cache.folder.iterdir()}
    assert names == {left[KEYS[0]].name, f"{KEYS[0]}.safetensors"}


def test_a_folder_below_a_file_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        cache = Cache(folder)
        cache.put(KEYS[0], recording())
        assert cache.get(KEYS[0]) is None
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_keeps_nothing(cache: Cache) -> None:
    cache.put(KEYS[0], recording())
    cache.folder.chmod(0o500)
    try:
        cache.put(KEYS[1], recording())
        assert cache.get(KEYS[1]) is None
        assert_same(cache.get(KEYS[0]), recording())
    finally:
        cache.folder.chmod(0o700)


def test_a_use_that_cannot_be_noted_is_a_use(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.put(KEYS[0], recording())

    def refused(*_arguments: object, **_named: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refused)
    assert_same(cache.get(KEYS[0]), recording())


def test_a_file_that_may_not_be_read_is_a_miss_and_stays(cache: Cache) -> None:
    # A folder in its place: also root cannot read it as a file.
    file_of(cache, KEYS[0]).mkdir(parents=True)
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], recording())
    assert file_of(cache, KEYS[0]).is_dir()
    assert len(list(cache.folder.iterdir())) == 1


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files end at 1000 bytes, as they would where a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_the_old_and_nothing_else(cache: Cache) -> None:
    cache.put(KEYS[0], [{"x": np.ones(2)}])
    for name in KEYS[:2]:
        cache.put(name, recording(size=4000))
    assert_same(cache.get(KEYS[0]), [{"x": np.ones(2)}])
    assert [path.stem for path in cache.folder.iterdir()] == [KEYS[0]]


def test_a_write_that_breaks_off_leaves_the_old(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(KEYS[0], recording(0))

    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put(KEYS[0], recording(1))
    assert_same(cache.get(KEYS[0]), recording(0))
    assert len(list(cache.folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"INGOT_CACHE": "/c"}, "/c"),
        ({"INGOT_CACHE": "~/c"}, "/home/me/c"),
        ({"INGOT_CACHE": "/c", "XDG_CACHE_HOME": "/x"}, "/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/ingot"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/ingot"),
        ({"XDG_CACHE_HOME": "x"}, "/home/me/.cache/ingot"),
        ({}, "/home/me/.cache/ingot"),
        ({"INGOT_CACHE": ""}, None),
        ({"INGOT_CACHE": "off", "XDG_CACHE_HOME": "/x"}, None),
        ({"INGOT_CACHE": "OFF"}, None),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str | None
) -> None:
    for name in ("INGOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    found = default_cache()
    assert (found and str(found.folder)) == folder
    assert found is None or found.limit == 4 * 2**30


@pytest.mark.parametrize("chosen", [None, "~/c"])
def test_a_user_without_a_home_has_none(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    def unknown(_path: str) -> str:
        return "~"

    for name in ("INGOT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("INGOT_CACHE", chosen)
    monkeypatch.setattr(os.path, "expanduser", unknown)
    assert default_cache() is None


PARTS: dict[str, str | float | None] = {
    "checkpoint": "ab",
    "task": "generate",
    "precision": "float64",
    "inputs": "cd",
    "torch": "2.13.0",
    "code": "ef",
    "layers": 2,
    "margin": None,
}


def test_every_part_changes_the_key() -> None:
    found = {key(**PARTS)}
    for name in PARTS:
        found.add(key(**{**PARTS, name: "other"}))
        found.add(key(**{other: value for other, value in PARTS.items() if other != name}))
    # What looks alike is not the same, and neither are two values in each other's place.
    found |= {key(**{**PARTS, "layers": value}) for value in ("2", 2.5, None, "None")}
    found.add(key(**{**PARTS, "checkpoint": "cd", "inputs": "ab"}))
    assert len(found) == 1 + 2 * len(PARTS) + 4 + 1
    assert all(len(name) == 64 and set(name) <= set("0123456789abcdef") for name in found)


def test_the_order_of_parts_does_not_count() -> None:
    assert key(**dict(reversed(PARTS.items()))) == key(**PARTS)
    # A cache outlives the process, so a key is the same in each.
    assert key(b=1, a="x") == hashlib.sha256(b'{"a": "x", "b": 1}').hexdigest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_part_is_a_finite_number(value: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        key(x=value)


def test_inputs_are_told_apart() -> None:
    ids = np.arange(6)
    others: list[tuple[np.ndarray, ...]] = [
        (ids,),
        (ids.reshape(2, 3),),
        (ids.reshape(3, 2),),
        (ids.astype(np.int32),),
        (ids.astype(np.float64),),
        (ids + 1,),
        (np.zeros(6),),
        (np.zeros(6, np.int64),),
        (ids[:3], ids[3:]),
        (ids[:2], ids[2:]),
        (ids, ids[:0]),
        (ids.reshape(2, 3).T,),
        (),
    ]
    assert len({inputs_digest(*arrays) for arrays in others}) == len(others)
    spread = np.repeat(ids, 2)[::2]
    assert inputs_digest(spread) == inputs_digest(ids)


def test_the_code_is_what_the_eager_graphs_import() -> None:
    """Every module of ours that a truth runs, but for those that only name types and errors."""
    program = (
        "import importlib, sys\n"
        "import ingot.validate.truth.eager\n"
        "from ingot.graphs.names import FAMILIES\n"
        "for family in FAMILIES: importlib.import_module('ingot.graphs.' + family)\n"
        f"print(*(m.__file__ for m in sys.modules.values() if (getattr(m, '__file__', '') or '')"
        f".startswith({str(ROOT)!r}) and '.venv' not in m.__file__), sep='\\n')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    ours = {Path(line).resolve().relative_to(ROOT).as_posix() for line in done.stdout.splitlines()}
    names = {f.relative_to(ROOT).as_posix() for f in cache_module._source_files(ROOT)}
    packages = {f"{p}/__init__.py" for p in ("ingot", "runtime", "validate", "validate/truth")}
    # What an operator of panels is called.
    packages |= {"plugins/cpu/__init__.py", "plugins/cpu/operators.py"}
    # The exporter tells the eager graph the names of its outputs, and no numbers.
    left = {name for name in ours - names if not name.startswith("export/")}
    assert left <= packages | {"ingot/version.py", "runtime/session.py"}
    assert {"graphs/olmoe.py", "plugins/moe_dispatch.py", "validate/truth/eager.py"} <= names & ours
    assert not any("kernels/" in name or "tensorrt/" in name for name in names)


def test_a_change_of_the_code_changes_its_digest(tmp_path: Path) -> None:
    modules = (
        *(
            "activations",
            "decoded",
            "eager",
            "joined",
            "layerwise",
            "noise",
            "orders",
            "other_weights",
        ),
        *("plain", "recording", "replay", "stacks", "stored"),
    )
    validating = [f"validate/truth/{name}.py" for name in modules]
    validating += [f"validate/identity/weights_{name}.py" for name in ("blocks", "panels", "piece")]
    counted = ["graphs/a.py", "plugins/b.py", *validating]
    for name in counted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")

    def digest() -> str:
        return cache_module._digest_files(tmp_path, cache_module._source_files(tmp_path))

    before = digest()
    for name in ("validate/run.py", "graphs/notes.txt", "plugins/kernels/k.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("new")
    assert digest() == before
    found = {before}
    for name in counted:
        (tmp_path / name).write_text("changed")
        found.add(digest())
    (tmp_path / "graphs/c.py").write_text("")
    found.add(digest())
    (tmp_path / "graphs/c.py").rename(tmp_path / "graphs/d.py")
    found.add(digest())
    assert len(found) == 1 + len(counted) + 2


def test_the_code_has_one_digest() -> None:
    files = cache_module._source_files(ROOT)
    assert code_digest() == cache_module._digest_files(ROOT, files)
    assert code_digest() is code_digest()
