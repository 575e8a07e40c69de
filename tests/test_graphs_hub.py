"""Finding a checkpoint by folder or hub name, against a hub of our own on the loopback.

huggingface_hub reads its environment when it is imported, so each look-up runs in a process of
its own; the client, its cache and its errors are the real ones.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingot.graphs.checkpoint import CheckpointError
from ingot.graphs.hub import PATTERNS, resolve

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a person without a network can do, each of which the message must name.
WAYS = ("the path of a checkpoint folder", "Hugging Face cache", "--preset tiny")

LOOK_UP = """
import json, sys
from ingot.graphs.checkpoint import CheckpointError
from ingot.graphs.hub import resolve
for model, revision in json.loads(sys.argv[1]):
    try:
        print("found", resolve(model, revision))
    except CheckpointError as error:
        print("refused", repr(str(error)))
"""


def look_up(
    cache: Path, *models: str | tuple[str, str], **environment: str
) -> list[tuple[str, str]]:
    """What ``resolve`` does with each name, or name and revision, in one new process.

    Returns:
        ("found", path) or ("refused", repr of the message), one for each.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            LOOK_UP,
            json.dumps([(model, None) if isinstance(model, str) else model for model in models]),
        ],
        env={
            **clean,
            "HF_HOME": str(cache / "home"),  # no token of the person running the tests
            "HF_HUB_CACHE": str(cache),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # Anything else than these two outcomes is a traceback that a user would see.
    assert done.returncode == 0, done.stderr
    outcomes = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    assert len(outcomes) == len(models), done.stdout
    return outcomes


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def fill_cache(cache: Path, name: str) -> Path:
    """The layout of huggingface_hub's cache, as a download on another day leaves it."""
    repository = cache / ("models--" + name.replace("/", "--"))
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


# Folders and names


def test_resolves_a_folder_to_itself(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_resolves_a_folder_that_looks_like_a_hub_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")


@pytest.mark.parametrize(
    "model",
    ["no such model", "/no/such/folder", "olmo", "a/b/c", "../a/b", "org/", "/name", "org/na me"],
)
def test_refuses_what_is_neither_a_folder_nor_a_hub_name(model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(model)
    for part in (repr(model), "folder", "family name", "org/name"):
        assert part in str(caught.value)


def test_refuses_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="neither a folder"):
        resolve(str(file))


# Without a network


def test_offline_mode_names_what_works_offline(tmp_path: Path) -> None:
    names = ("allenai/OLMoE-1B-7B-0924", "a--b/not-allowed-on-the-hub")
    for name, (outcome, message) in zip(
        names, look_up(tmp_path, *names, HF_HUB_OFFLINE="1"), strict=True
    ):
        assert outcome == "refused"
        for part in (name, *WAYS):
            assert part in message


def test_cached_names_resolve_offline(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, "org/model.v1")
    *found, other_revision, other_name = look_up(
        tmp_path,
        "org/model.v1",
        ("org/model.v1", "main"),
        ("org/model.v1", COMMIT),
        ("org/model.v1", "v2"),
        "org/model.v2",
        HF_HUB_OFFLINE="1",
    )
    assert found == [("found", str(snapshot))] * 3
    for outcome, message in (other_revision, other_name):
        assert outcome == "refused"
        assert all(part in message for part in WAYS)


def test_unreachable_hub_is_told_quickly_and_the_cache_used(tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, "org/model")
    start = time.monotonic()
    (outcome, message), cached = look_up(
        tmp_path,
        "allenai/OLMoE-1B-7B-0924",
        "org/model",
        HF_ENDPOINT=f"http://127.0.0.1:{closed_port()}",
    )
    assert time.monotonic() - start < 20
    assert outcome == "refused"
    for part in ("allenai/OLMoE-1B-7B-0924", "could not be reached", *WAYS):
        assert part in message
    assert "\\n" not in message  # the client's reason alone, not its advice
    assert cached == ("found", str(snapshot))


# With a hub


@dataclass
class Hub:
    """A hub of one public and one gated model, and what was asked of it."""

    endpoint: str
    asked: list[str] = field(default_factory=list)


FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"template",
    "pytorch_model.bin": b"pickle",
    "consolidated.00.pth": b"pickle",
    "original/model.pt": b"pickle",
    "modeling_olmoe.py": b"code",
    "README.md": b"words",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.asked.append(path)
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{index:040x}"}
                for index, (name, data) in enumerate(FILES.items())
            ]
            if "org/gated" in path:
                self.answer(403, b"{}", X_Error_Code="GatedRepo")
            elif "org/model" not in path:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif path in ("/api/models/org/model", "/api/models/org/model/revision/main"):
                info = {"id": "org/model", "sha": COMMIT, "siblings": []}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif path == f"/api/models/org/model/tree/{COMMIT}":
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith(f"/org/model/resolve/{COMMIT}/"):
                name = path.removeprefix(f"/org/model/resolve/{COMMIT}/")
                tag = f'"{list(FILES).index(name):040x}"'
                self.answer(200, FILES[name], ETag=tag, X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"{}", X_Error_Code="RevisionNotFound")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


def test_downloads_weights_and_tokenizer_but_neither_pickles_nor_code(
    tmp_path: Path, hub: Hub
) -> None:
    [(outcome, path)] = look_up(tmp_path, "org/model", HF_ENDPOINT=hub.endpoint)
    assert outcome == "found", path
    got = {file.name: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
    wanted = ("config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja")
    assert got == {name: FILES[name] for name in wanted}
    asked = [name for name in FILES if any(path.endswith("/" + name) for path in hub.asked)]
    assert asked == list(wanted)
    # And from then on, without the hub.
    assert look_up(tmp_path, "org/model", HF_HUB_OFFLINE="1") == [("found", path)]


def test_tells_the_refusals_of_the_hub_apart(tmp_path: Path, hub: Hub) -> None:
    outcomes = look_up(
        tmp_path, ("org/model", "v9"), "org/nothing", "org/gated", HF_ENDPOINT=hub.endpoint
    )
    expected = [
        ("org/model has no revision 'v9' on the hub",),
        ("no folder org/nothing", "no public model of that name"),
        ("org/gated is gated", "accept its terms", "hf auth login"),
    ]
    for (outcome, message), parts in zip(outcomes, expected, strict=True):
        assert outcome == "refused"
        assert all(part in message for part in parts), message


# What may be downloaded


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "model.pth", "modeling_olmoe.py", "last.ckpt", "a.pkl"],
)
def test_patterns_match_neither_pickles_nor_code(name: str) -> None:
    for path in (name, f"original/{name}", f"model.safetensors/{name}", f"x.json.{name}"):
        assert not any(fnmatch(path, pattern) for pattern in PATTERNS)


@given(st.text(), st.sampled_from([".bin", ".pt", ".pth", ".py", ".pkl", ".ckpt", ".h5"]))
def test_patterns_match_no_name_that_ends_in_a_pickle(stem: str, ending: str) -> None:
    assert not any(fnmatch(stem + ending, pattern) for pattern in PATTERNS)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00003.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
    ],
)
def test_patterns_match_what_an_export_needs(name: str) -> None:
    assert any(fnmatch(name, pattern) for pattern in PATTERNS)
