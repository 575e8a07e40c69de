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
from test_export_early import run_commands

from ingot.graphs.family import find_family
from ingot.graphs.folder import CheckpointError
from ingot.graphs.hub import ELSEWHERE, PATTERNS, REVISION, TEMPLATES, find
from ingot.graphs.preset import preset_config

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a person without a network can do, each of which the message must name.
WAYS = ("the path of a checkpoint folder", "Hugging Face cache", "--preset tiny")

LOOK_UP = """
import json, sys
from ingot.graphs.folder import CheckpointError
from ingot.graphs.hub import find
for model, revision in json.loads(sys.argv[1]):
    try:
        print("found", find(model, revision).fetch())
    except CheckpointError as error:
        print("refused", repr(str(error)))
"""


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a model, with its weights."""
    return find(model, revision).fetch()


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
    (snapshot / "model.safetensors").write_bytes(b"weights")
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
    [
        "no such model",
        "/no/such/folder",
        "olmo",
        "a/b/c",
        "../a/b",
        "org/",
        "/name",
        "org/na me",
        "org/name\n",
        "",
    ],
)
def test_refuses_what_is_neither_a_folder_nor_a_hub_name(model: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(model)
    for part in (repr(model), "folder", "family name", "org/name"):
        assert part in str(caught.value)


def test_refuses_a_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
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
    """A hub of public models and a gated one, and what was asked of it."""

    endpoint: str
    asked: list[str] = field(default_factory=list)

    def files(self, model: str) -> list[str]:
        """The files of a model that were asked for, in that order, each as often."""
        start = f"/{model}/resolve/{COMMIT}/"
        return [path.removeprefix(start) for path in self.asked if path.startswith(start)]


def index(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{n}": shard for n, shard in enumerate(shards)}}).encode()


INDEX = "model.safetensors.index.json"
TOOLS = "additional_chat_templates/tool_use.jinja"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"template",
    TOOLS: b"template of tools",
    # What other programs read of the same model.
    "pytorch_model.bin": b"pickle",
    "consolidated.00.pth": b"pickle",
    "consolidated.safetensors": b"weights",
    "model.fp16.safetensors": b"weights",
    "original/model.pt": b"pickle",
    "original/params.json": b"{}",
    "onnx/model.safetensors": b"weights",
    "onnx/config.json": b"{}",
    "onnx/chat_template.jinja": b"template",
    "additional_chat_templates/old/rag.jinja": b"template",
    "additional_chat_templates/config.json": b"{}",
    "additional/chat_template.jinja": b"template",
    "modeling_olmoe.py": b"code",
    "README.md": b"words",
}
SHARDED = {
    **{name: data for name, data in FILES.items() if name != "model.safetensors"},
    INDEX: index(*SHARDS, SHARDS[0]),
    **dict.fromkeys((*SHARDS, "model-00003-of-00003.safetensors"), b"weights"),
}
OLMOE = json.dumps(preset_config(find_family("olmoe"), "tiny")).encode()
REPOSITORIES = {
    "org/model": FILES,
    "org/sharded": SHARDED,
    "org/both": {**SHARDED, "model.safetensors": b"weights"},
    "org/escaped": {**SHARDED, INDEX: index("model-0000?-of-00002.safetensors")},
    "org/unfinished": {**SHARDED, INDEX: index(SHARDS[0], "model-00009.safetensors")},
    "org/outside": {**SHARDED, INDEX: index(SHARDS[0], "onnx/model.safetensors")},
    "org/pickles": {
        "config.json": json.dumps({"d_model": 64, "ssm_cfg": {"layer": "Mamba2"}}).encode(),
        "pytorch_model.bin": b"pickle",
        "training_args.bin": b"pickle",
    },
    "org/none": {"config.json": b"{}", "README.md": b"words"},
    "org/nemotron": {**FILES, "config.json": b'{"model_type": "nemotron_h"}'},
    "org/softcapped": {
        **FILES,
        "config.json": OLMOE[:-1] + b', "attn_logit_softcapping": 30.0}',
    },
    "org/olmoe": {**FILES, "config.json": OLMOE},
    "org/three-bits": {
        **FILES,
        "config.json": OLMOE[:-1]
        + b', "quantization_config": {"quant_method": "gptq", "bits": 3}}',
    },
    "org/adapter": {
        "adapter_config.json": b'{"peft_type": "LORA", "base_model_name_or_path": "org/olmoe"}',
        "adapter_model.safetensors": b"weights",
        "adapter_model.bin": b"pickle",
        "model.safetensors": b"weights",
        "README.md": b"words",
        "tokenizer.json": b"{}",
        "training_args.bin": b"pickle",
    },
    "org/tuned": {**FILES, "config.json": OLMOE, "adapter_config.json": b"{}"},
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
            if self.command == "GET":
                state.asked.append(path)
            model = "/".join(path.removeprefix("/api/models").split("/")[1:3])
            files = REPOSITORIES.get(model, {})
            # Each name with one name a file, as a hash of its content is.
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": f"{index:040x}"}
                for index, (name, data) in enumerate(files.items())
            ]
            commit = "../../../x" if "org/hostile" in path else COMMIT
            if "org/gated" in path:
                self.answer(403, b"{}", X_Error_Code="GatedRepo")
            elif model not in REPOSITORIES and model != "org/hostile":
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif path in (f"/api/models/{model}", f"/api/models/{model}/revision/main"):
                info = {"id": model, "sha": commit, "siblings": []}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            elif path.startswith(f"/api/models/{model}/tree/"):
                self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            elif path.startswith(f"/{model}/resolve/{COMMIT}/"):
                name = path.removeprefix(f"/{model}/resolve/{COMMIT}/")
                tag = f'"{list(files).index(name):040x}"'
                self.answer(200, files[name], ETag=tag, X_Repo_Commit=COMMIT)
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
    got = {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in Path(path).rglob("*")
        if file.is_file()
    }
    wanted = ("config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", TOOLS)
    assert got == {name: FILES[name] for name in wanted}
    # Each once, the weights last.
    asked = hub.files("org/model")
    assert sorted(asked) == sorted(wanted)
    assert asked[-1] == "model.safetensors"
    # And from then on, without the hub.
    assert look_up(tmp_path, "org/model", HF_HUB_OFFLINE="1") == [("found", path)]


def test_downloads_the_weights_that_are_read_and_each_once(tmp_path: Path, hub: Hub) -> None:
    names = ("org/sharded", "org/both", "org/sharded")
    outcomes = look_up(tmp_path, *names, HF_ENDPOINT=hub.endpoint)
    assert [outcome for outcome, _ in outcomes] == ["found"] * 3
    small = {"config.json", "tokenizer.model", "chat_template.jinja", TOOLS, INDEX}
    assert sorted(hub.files("org/sharded")) == sorted((*small, *SHARDS))
    assert sorted(hub.files("org/both")) == sorted((*small, "model.safetensors"))


def test_refuses_a_repository_without_whole_weights_and_downloads_none(
    tmp_path: Path, hub: Hub
) -> None:
    expected = {
        "org/unfinished": ("model-00009.safetensors", "no safetensors file of that repository"),
        "org/escaped": ("model-0000?-of-00002.safetensors", "no safetensors file"),
        "org/outside": ("outside the folder", "onnx/model.safetensors"),
        "org/none": ("neither model.safetensors nor model.safetensors.index.json",),
        "org/pickles": (
            "pickle weights only",
            "in the layout of mamba_ssm",
            "hf download org/pickles --local-dir pickles && python -c",
            "pickles pytorch_model.bin",
        ),
    }
    told = look_up(tmp_path, *expected, HF_ENDPOINT=hub.endpoint)
    for model, (outcome, message) in zip(expected, told, strict=True):
        assert outcome == "refused"
        assert all(part in message for part in expected[model]), message
        assert not [name for name in hub.files(model) if not name.endswith((".json", ".jinja"))
                    and name != "tokenizer.model"]  # fmt: skip


def test_an_adapter_is_downloaded_without_a_model(tmp_path: Path, hub: Hub) -> None:
    expected = {
        ("org/olmoe", "--adapter", "org/adapter"): "is not a whole safetensors file",
        ("org/olmoe", "--adapter", "org/olmoe"): "it has no adapter_config.json",
        ("org/adapter",): "give --model org/olmoe --adapter org/adapter.",
        ("org/tuned",): "merge it with --adapter org/tuned, or take the base",
    }
    commands = [["export", "--out", str(tmp_path / "out"), "--model", *words] for words in expected]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    told = run_commands(*commands, **environment, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    for (status, said, _), wanted in zip(told, expected.values(), strict=True):
        assert status == 2 and wanted in said, said
    files = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert set(hub.files("org/adapter")) == files
    assert hub.files("org/tuned").count("model.safetensors") == 0


def test_an_export_refuses_a_config_before_it_downloads_weights(tmp_path: Path, hub: Hub) -> None:
    expected = {
        ("org/nemotron",): (False, "nearest is granitemoehybrid"),
        ("org/softcapped",): (True, "attn_logit_softcapping is 30.0"),
        ("org/three-bits",): (True, "GPTQ's bits is 3"),
        ("org/olmoe", "--task", "classify"): (True, "olmoe has no task 'classify'"),
        ("org/olmoe", "--output", "router_logits"): (True, "not a whole safetensors file"),
    }
    commands = [["export", "--out", str(tmp_path / "out"), "--model", *words] for words in expected]
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    told = run_commands(*commands, **environment, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path))
    for (status, said, torch), wanted in zip(told, expected.values(), strict=True):
        assert status == 2
        assert torch == wanted[0]
        assert wanted[1] in said
    for model, weights in (("nemotron", 0), ("softcapped", 0), ("three-bits", 0), ("olmoe", 1)):
        assert hub.files(f"org/{model}").count("model.safetensors") == weights


def test_refuses_a_commit_that_is_none(tmp_path: Path, hub: Hub) -> None:
    [(outcome, message)] = look_up(tmp_path, "org/hostile", HF_ENDPOINT=hub.endpoint)
    assert outcome == "refused"
    assert "reached" not in message


@pytest.mark.parametrize(
    "revision",
    ["../../x", "/etc", "a//b", "a/../b", ".git", "main\n", "-x", "a b", "", "a\\b", "main/"],
)
def test_refuses_what_is_no_revision(revision: str) -> None:
    with pytest.raises(CheckpointError, match="is no revision; give a branch, a tag or a commit"):
        resolve("org/name", revision)


@pytest.mark.parametrize("revision", ["main", "v1.0", "feature/x-y", "refs/pr/12", COMMIT])
def test_knows_a_revision(revision: str) -> None:
    assert REVISION.match(revision)


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
def test_patterns_match_what_an_export_needs_beside_weights(name: str) -> None:
    assert any(fnmatch(name, pattern) for pattern in PATTERNS)


@given(
    st.sampled_from([TEMPLATES, TEMPLATES[:9], TEMPLATES[:3], "x"]),
    st.text(st.sampled_from("ad_/"), min_size=1, max_size=3),
)
def test_downloads_from_no_folder_but_that_of_templates(start: str, more: str) -> None:
    for end in (".jinja", ".json", ".model"):
        path = f"{start}{more}{end}"
        folder, _, _ = path.rpartition("/")
        wanted = "/" not in path or (folder == TEMPLATES and end == ".jinja")
        assert wanted != any(fnmatch(path, pattern) for pattern in ELSEWHERE), path
