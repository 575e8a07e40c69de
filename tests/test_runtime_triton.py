"""Model repositories for Triton: what is written, what is refused, the linter, the Python model."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner
from conftest import MakeCheckpoint, MakeIngot
from google.protobuf import text_format
from test_imports import imported
from test_packaging import wheel  # noqa: F401
from test_runtime_classify import checkpoint as classifier

from ingot.export.cli import main as ingot_command
from ingot.export.engine import profiles
from ingot.export.ingot import ENGINE, GRAPH, MANIFEST, EngineInfo, Manifest, file_infos
from ingot.export.request import Limits
from ingot.graphs.state import key_value_states, recurrent_states
from ingot.plugins.errors import IngotError
from ingot.runtime import triton_repository
from ingot.runtime.cli import main as runtime_command
from ingot.runtime.generate import Sampling, generate
from ingot.runtime.loading import load
from ingot.runtime.onnxruntime_session import open_session
from ingot.runtime.session import SessionError
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import CONFIG, PLUGINS, RECORD, Settings, TritonError, make_plan
from ingot.runtime.triton_repository import CARRIED, CARRIED_FOR_ENGINES, write_repository
from ingot.runtime.triton_texts import TEMPLATES, memory_gib, rendered

ROOT = Path(__file__).resolve().parent.parent

# On a machine that only runs the tests of GPUs it may be missing.
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow

FAMILIES = ("granite", "jetmoe", "mamba2", "olmoe")
PROMPT = [17, 300, 5, 44, 101, 256, 7]
FINAL = 1


@pytest.fixture(scope="module")
def ingots(make_checkpoint: MakeCheckpoint, make_ingot: MakeIngot) -> Callable[..., Path]:
    """``ingots(family, target, **request)``: a tiny ingot, exported once; read only."""
    made: dict[str, Path] = {}

    def ingot(family: str, target: str = "ort", **request: Any) -> Path:
        key = f"{family} {target} {request}"
        if key not in made:
            made[key] = make_ingot(make_checkpoint(family), target, **request)
        return made[key]

    return ingot


@pytest.fixture(scope="module")
def repository(tiny_ort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLMoE's; read only."""
    out = tmp_path_factory.mktemp("repository") / "repository"
    write_repository(tiny_ort, out, Settings(name="m", streams=2, threads=1))
    return out


@pytest.fixture
def copied(repository: Path, tmp_path: Path) -> Path:
    """A copy of ``repository``, to be damaged."""
    return Path(shutil.copytree(repository, tmp_path / "copied"))


def _with_engine(source: Path, folder: Path, **changes: Any) -> Path:
    """An ingot that says it holds a TensorRT engine; the engine itself is a stand-in."""
    ingot = Path(shutil.copytree(source, folder))
    manifest = Manifest.read(ingot)
    (ingot / ENGINE).write_bytes(b"engine")
    (ingot / PLUGINS).write_bytes(b"plugins")
    engine = EngineInfo(
        builder="tensorrt",
        version="10.13.3",
        compute_capabilities=(90,),
        graph_sha256=manifest.files[GRAPH].sha256,
        plugins={"MoeDispatch": 2},
        libraries=(PLUGINS,),
        embedded=False,
        profiles=profiles(manifest.inputs, manifest.states, Limits(4, 256, 64)),
    )
    changed = replace(manifest, target="trt", engine=replace(engine, **changes))
    replace(changed, files=file_infos(ingot, {})).write(ingot)
    return ingot


def _parsed(path: Path) -> Any:
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


class Sequence:
    """What Triton's sequence batcher does with implicit state, over ONNX Runtime in this process.

    Everything is read off the config; the states' buffers are this class's.
    """

    def __init__(self, folder: Path) -> None:
        self.config = _parsed(folder / "config.pbtxt")
        path = folder / "1" / self.config.default_model_filename
        self.session = open_session(path)
        self.states = list(self.config.sequence_batching.state)
        self.values = {}
        for state in self.states:
            (first,) = state.initial_state
            assert first.zero_data and first.data_type == state.data_type
            self.values[state.input_name] = np.zeros((1, *first.dims), dtype=np.float32)

    def __call__(self, **inputs: list[int]) -> Any:
        feeds = {name: np.array([value], dtype=np.int64) for name, value in inputs.items()}
        assert {item.name for item in self.config.input} == set(feeds)
        outputs = [self.config.output[0].name, *(state.output_name for state in self.states)]
        result, *after = self.session.run(outputs, {**feeds, **self.values})
        for state, value in zip(self.states, after, strict=True):
            assert value.ndim == len(state.dims) + 1
            for dim, size in zip(state.dims, value.shape[1:], strict=True):
                assert dim in (-1, size), "Triton would refuse or misread this state"
            self.values[state.input_name] = value
        return result


@pytest.mark.parametrize(
    ("family", "target"),
    # Of the onnx target, a cache that grows and a state of fixed size.
    [*((family, "ort") for family in FAMILIES), ("olmoe", "onnx"), ("mamba2", "onnx")],
)
def test_writes_configs_by_which_the_graph_computes_what_the_session_does(
    ingots: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    ingot = ingots(family, target)
    write_repository(ingot, tmp_path / "r", Settings(name="m"))
    assert lint(tmp_path / "r") == []
    shared = [state.shared for state in Manifest.read(ingot).states]
    grown = family != "mamba2"
    assert shared == [grown and target == "ort"] * len(shared)
    sequence = Sequence(tmp_path / "r" / "m")
    session = load(ingot)
    session.reset(1, 64)
    random = np.random.default_rng(3)
    seen = 0
    for count in (5, 1, 1, 3, 1):
        new = random.integers(0, 512, count).tolist()
        # The README's rule for the mask.
        mask = [1] * (count if not grown else seen + count)
        given = {"input_ids": new, "attention_mask": [0] * (grown and target == "onnx") + mask}
        if grown:
            given["position_ids"] = list(range(seen, seen + count))
        found = sequence(**given)
        expected = session.step(np.array([new]), np.ones((1, count), dtype=np.int64))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        seen += count


def test_describes_a_stream_of_tokens(repository: Path) -> None:
    config = _parsed(repository / "m_generate" / "config.pbtxt")
    assert (config.name, config.backend, config.max_batch_size) == ("m_generate", "python", 0)
    assert config.model_transaction_policy.decoupled
    optional = {item.name: item.optional for item in config.input}
    assert [name for name, left_out in optional.items() if not left_out] == ["input_ids"]
    assert set(optional) == {
        *("input_ids", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop_ids")
    }
    assert [item.name for item in config.output] == ["token_id", "index", "finish_reason"]
    assert config.parameters["streams"].string_value == "2"
    assert config.parameters["capacity"].string_value == "512"
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU


def test_keeps_one_copy_of_the_ingot_and_opens_it_from_both_models(repository: Path) -> None:
    assert len(list(repository.rglob("weights.safetensors"))) == 1
    settings = _parsed(repository / "m_generate" / "config.pbtxt").parameters
    place = repository / "m_generate" / settings["ingot"].string_value
    assert Manifest.read(place).verdict == "skipped"
    assert place.resolve() == (repository / "m" / "1").resolve()


def test_describes_an_engine_with_its_profiles(tiny_onnx: Path, tmp_path: Path) -> None:
    ingot = _with_engine(tiny_onnx, tmp_path / "ingot")
    plan = write_repository(ingot, tmp_path / "r", Settings(name="m", max_batch=8))
    assert plan.models == ["m", "m_generate"]
    config = _parsed(tmp_path / "r" / "m" / "config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == ENGINE
    # A batch of caches that grow would be misread; the capacity is the engine's.
    assert config.max_batch_size == 1
    settings = _parsed(tmp_path / "r" / "m_generate" / "config.pbtxt").parameters
    assert settings["capacity"].string_value == "256"
    (group,) = config.instance_group
    assert list(group.profile) == ["0", "1"]
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    state = config.sequence_batching.state[0]
    assert list(state.dims) == [2, -1, 16] and list(state.initial_state[0].dims) == [2, 1, 16]
    assert not state.use_same_buffer_for_input_output and not state.use_growable_memory
    assert lint(tmp_path / "r") == []
    assert "TensorRT 10.13.3, the version that built" in (tmp_path / "r" / "README.md").read_text()


@pytest.mark.parametrize("engine", [False, True])
def test_batches_states_of_fixed_size(
    ingots: Callable[..., Path], tmp_path: Path, engine: bool
) -> None:
    ingot = ingots("mamba2", "onnx")
    if engine:
        ingot = _with_engine(ingot, tmp_path / "ingot")
    write_repository(ingot, tmp_path / "r", Settings(name="m", max_batch=8))
    # The engine's limit, not the option's.
    assert _parsed(tmp_path / "r" / "m" / "config.pbtxt").max_batch_size == (4 if engine else 8)
    assert lint(tmp_path / "r") == []
    assert "takes those of its batch with it" in (tmp_path / "r" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"builder": "tensorrt-rtx"}, "loads no engine of tensorrt-rtx"),
        ({"libraries": ("libingot_kernels.so",)}, f"needs the plugins as {PLUGINS}"),
    ],
)
def test_leaves_out_a_graph_that_tritons_backend_cannot_run(
    tiny_onnx: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    ingot = _with_engine(tiny_onnx, tmp_path / "ingot", **changes)
    plan = write_repository(ingot, tmp_path / "r", Settings(name="m"))
    assert plan.models == ["m_generate"] and reason in plan.why
    assert reason in (tmp_path / "r" / "README.md").read_text()
    assert not (tmp_path / "r" / "m").exists()
    assert lint(tmp_path / "r") == []


def test_serves_features_and_classes_by_the_graph_alone(
    ingots: Callable[..., Path], make_ingot: MakeIngot, tmp_path: Path
) -> None:
    plan = write_repository(
        ingots("olmoe", task="features"), tmp_path / "f", Settings(name="features")
    )
    assert plan.models == ["features"] and "no next token" in plan.why
    config = _parsed(tmp_path / "f" / "features" / "config.pbtxt")
    assert config.output[0].name == "last_hidden_state"
    assert lint(tmp_path / "f") == []
    ingot = make_ingot(classifier(tmp_path / "checkpoint"), "ort", task="classify")
    write_repository(ingot, tmp_path / "c", Settings(name="classes"))
    config = _parsed(tmp_path / "c" / "classes" / "config.pbtxt")
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    # Without state a warm-up is possible.
    (warmup,) = config.model_warmup
    assert set(warmup.inputs) == {item.name for item in config.input}
    assert lint(tmp_path / "c") == []


def _failed(ingot: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(ingot, folder))
    replace(Manifest.read(copy), validation={"verdict": "failed"}).write(copy)
    return copy


def test_refuses_an_ingot_that_does_not_fit_and_leaves_nothing(
    ingots: Callable[..., Path], tiny_onnx: Path, tmp_path: Path
) -> None:
    graph_only = Path(shutil.copytree(tiny_onnx, tmp_path / "graph"))
    replace(Manifest.read(graph_only), target="trt").write(graph_only)
    features = ingots("olmoe", task="features")
    damaged = Path(shutil.copytree(tiny_onnx, tmp_path / "damaged"))
    (damaged / "weights.safetensors").write_bytes(b"no")
    cases = {
        "failed its validation": _failed(tiny_onnx, tmp_path / "failed"),
        "no engine, and Triton builds none": graph_only,
        "only its graph could be served": _with_engine(
            features, tmp_path / "rtx", builder="tensorrt-rtx"
        ),
        "without the GPU kernels of MoeDispatch": _with_engine(
            tiny_onnx, tmp_path / "bare", libraries=()
        ),
        "is not the file that was validated": damaged,
        "is not an ingot": tmp_path,
    }
    for sentence, ingot in cases.items():
        with pytest.raises(IngotError, match=sentence):
            write_repository(ingot, tmp_path.with_name(f"{tmp_path.name}-out"), Settings())
        assert not tmp_path.with_name(f"{tmp_path.name}-out").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (Settings(name="a/b"), "'a/b' is no model name"),
        (Settings(name="x" * 41), "at most 40"),
        (Settings(streams=0), "--streams is 0"),
        (Settings(threads=-1), "--threads is -1"),
        (Settings(max_batch=0), "--max-batch is 0"),
        (Settings(capacity=513), "--capacity is 513; it must be 2 to 512"),
        (Settings(capacity=1), "--capacity is 1"),
    ],
)
def test_refuses_a_setting_that_does_not_fit(
    tiny_ort: Path, tmp_path: Path, settings: Settings, sentence: str
) -> None:
    with pytest.raises(TritonError, match=re.escape(sentence)):
        write_repository(tiny_ort, tmp_path / "r", settings)
    assert list(tmp_path.iterdir()) == []


def test_replaces_only_a_repository_and_only_when_told(tiny_ort: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    write_repository(tiny_ort, out, Settings(name="first"))
    with pytest.raises(TritonError, match="exists; give --overwrite"):
        write_repository(tiny_ort, out, Settings(name="second"))
    assert (out / "first").is_dir()
    write_repository(tiny_ort, out, Settings(name="second"), overwrite=True)
    assert (out / "second").is_dir() and not (out / "first").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note").write_text("keep")
    with pytest.raises(TritonError, match="was not made by ingot triton"):
        write_repository(tiny_ort, tmp_path / "mine", Settings(), overwrite=True)
    assert (tmp_path / "mine" / "note").read_text() == "keep"


def test_never_replaces_what_holds_the_ingot(tiny_ort: Path, tmp_path: Path) -> None:
    repository = tmp_path / "r"
    write_repository(tiny_ort, repository, Settings(name="m"))
    for out in (repository, repository / "m", repository / "m" / "1" / "inside"):
        with pytest.raises(TritonError, match="lie in one another"):
            write_repository(repository / "m" / "1", out, Settings(), overwrite=True)
    assert lint(repository) == []


def test_leaves_the_old_repository_where_a_new_one_fails(
    tiny_ort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    write_repository(tiny_ort, out, Settings(name="first"))

    def broken(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(triton_repository, "write_record", broken)
    with pytest.raises(OSError, match="no space"):
        write_repository(tiny_ort, out, Settings(name="second"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert lint(out) == []


def test_says_what_to_install_where_jinja2_is_missing(
    tiny_ort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(TritonError, match=re.escape("pip install 'ingot-export[triton]'")):
        write_repository(tiny_ort, tmp_path / "r", Settings())
    assert list(tmp_path.iterdir()) == []


def _launched(repository: Path, tmp_path: Path, *options: str, **environment: str) -> list[str]:
    """The options that the launch script gives the server."""
    server = tmp_path / "tritonserver"
    server.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    server.chmod(0o755)
    done = subprocess.run(
        [repository / "launch.sh", *options],
        env={**os.environ, "TRITONSERVER": str(server), **environment},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return done.stdout.splitlines()


def test_launches_the_server_over_its_own_folder(repository: Path, tmp_path: Path) -> None:
    # A folder whose name the shell would split.
    moved = Path(shutil.copytree(repository, tmp_path / "my models"))
    options = _launched(moved, tmp_path, "--http-port=1")
    assert f"--model-repository={moved}" in options
    assert {"--load-model=m", "--load-model=m_generate"} <= set(options)
    assert options[-1] == "--http-port=1"
    assert not [option for option in options if option.startswith("--backend-config")]
    one = _launched(moved, tmp_path, MODELS="m_generate")
    assert "--load-model=m" not in one and "--load-model=m_generate" in one


@pytest.mark.parametrize("embedded", [False, True])
def test_launches_the_server_with_an_engines_plugins(
    tiny_onnx: Path, tmp_path: Path, embedded: bool
) -> None:
    libraries = () if embedded else (PLUGINS,)
    ingot = _with_engine(tiny_onnx, tmp_path / "i", embedded=embedded, libraries=libraries)
    write_repository(ingot, tmp_path / "r", Settings(name="m"))
    given = [o for o in _launched(tmp_path / "r", tmp_path) if o.startswith("--backend-config")]
    path = tmp_path / "r" / "m" / "1" / PLUGINS
    # An engine with its plugins inside holds code for the host, which this flag allows.
    wanted = "version-compatible=true" if embedded else f"plugins={path}"
    assert given == [f"--backend-config=tensorrt,{wanted}"]


def _objects(repository: Path) -> dict[str, Any]:
    """What the manifest for Kubernetes holds, by kind."""
    documents = yaml.safe_load_all((repository / "kubernetes.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("name", ["m", "My_Model-1", "7B_Model", f"1{'x' * 38}_"])
def test_writes_a_manifest_for_kubernetes(tiny_ort: Path, tmp_path: Path, name: str) -> None:
    write_repository(tiny_ort, tmp_path / "r", Settings(name=name))
    found = _objects(tmp_path / "r")
    assert set(found) == {"Deployment", "Service", "HorizontalPodAutoscaler", "ConfigMap"}
    for document in found.values():
        # A Service's name is the strictest: it begins with a letter.
        host = document["metadata"]["name"]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", host) and len(host) <= 63
    pod = found["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    labels = found["Deployment"]["spec"]["selector"]["matchLabels"]
    assert labels.items() <= pod["metadata"]["labels"].items()
    assert found["Service"]["spec"]["selector"] == labels
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    named = {port["targetPort"] for port in found["Service"]["spec"]["ports"]}
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    assert named | {probe["httpGet"]["port"] for probe in probes} == set(ports)
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    (rule,) = yaml.safe_load(found["ConfigMap"]["data"]["config.yaml"])["rules"]
    assert rule["name"]["as"] == metric
    # Both are counters of Triton's own.
    for counter in ("nv_inference_queue_duration_us", "nv_inference_request_success"):
        assert f"sum(rate({counter}{{<<.LabelMatchers>>}}[3m]))" in rule["metricsQuery"]
    # Queue time does not fall with the number of pods as a load does: without a policy, a short
    # queue would make as many as there may be.
    assert scaler["behavior"]["scaleUp"]["policies"] == [
        {"type": "Pods", "value": 1, "periodSeconds": 60}
    ]


def test_asks_for_no_privileges(repository: Path) -> None:
    pod = _objects(repository)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    # What the Pod Security Standard "restricted" demands.
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 1000,
        "runAsGroup": 1000,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(pod)
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert pod["automountServiceAccountToken"] is False


def test_runs_the_image_of_its_dockerfile(repository: Path) -> None:
    lines = (repository / "Dockerfile").read_text().splitlines()
    pod = _objects(repository)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user = "{runAsUser}:{runAsGroup}".format_map(pod["securityContext"])
    assert f"COPY --chown={user} . /models" in lines
    assert lines[-2:] == [f"USER {user}", f"CMD {json.dumps(container['args'])}"]
    # What pip installs is for all users of the image.
    assert any(line.startswith("RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip") for line in lines)
    built = re.search(r"docker build -t (\S+) ", lines[0])
    assert built and container["image"] == f"{built[1]}:latest"
    # Of an image "latest" that only the node has, Always would find none.
    assert container["imagePullPolicy"] == "IfNotPresent"


def test_gives_running_streams_the_time_to_end(repository: Path, tmp_path: Path) -> None:
    pod = _objects(repository)["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pause == "sleep"
    options = dict(
        option.removeprefix("--").split("=", 1)
        for option in _launched(repository, tmp_path)
        if "=" in option
    )
    ends = int(seconds) + int(options["exit-timeout-secs"])
    # Triton unloads its models after that, and logs.
    assert ends + 15 <= pod["terminationGracePeriodSeconds"]
    # More is for args; of an option that is there twice, Triton takes the last.
    longer = _launched(repository, tmp_path, "--exit-timeout-secs=600")
    assert longer[-1] == "--exit-timeout-secs=600"


def _memory(repository: Path) -> tuple[int, int]:
    """What the manifest asks for and is limited to, in GiB."""
    pod = _objects(repository)["Deployment"]["spec"]["template"]["spec"]
    resources = pod["containers"][0]["resources"]

    def gib(kind: str) -> int:
        found = re.fullmatch(r"(\d+)Gi", resources[kind]["memory"])
        assert found is not None
        return int(found[1])

    return gib("requests"), gib("limits")


def _as_small(manifest: Manifest) -> Manifest:
    """With the weights, states and logits of OLMoE's preset ``small``."""
    state = next(state for state in manifest.states if state.kind == "key")
    (logits,) = (each for each in manifest.outputs if each.name == manifest.main_output)
    return replace(
        manifest,
        weight_bytes=1_046_000_000,
        states=(replace(state, input_shape=("batch", 8, "past_sequence", 64)),) * 16,
        outputs=(replace(logits, shape=("batch", "sequence", 50304)),),
        generation={**manifest.generation, "context_length": 4096},
    )


def test_asks_for_the_memory_that_was_measured(tiny_ort: Path) -> None:
    manifest = _as_small(Manifest.read(tiny_ort))

    def memory(manifest: Manifest = manifest, **settings: Any) -> tuple[int, int]:
        return memory_gib(make_plan(tiny_ort, manifest, Settings(**settings)), manifest)

    asked, limit = memory()
    # Triton 2.51 with both models holds 0.7 GiB when it is ready, 1.6 with its file cache, and 12.3
    # after four streams and four sequences of 4000 tokens.
    assert asked == 4 and 12.3 < limit <= 18
    # A stream has a cache of 128 MiB and 0.77 GiB of logits.
    assert memory(streams=8) == (5, 33)
    assert memory(capacity=512) == (3, 6)
    # One model only: one copy of the weights.
    heavy = replace(manifest, weight_bytes=10 * 2**30)
    assert memory(heavy)[0] == 22
    assert memory(replace(heavy, task="features"))[0] == 11


def test_asks_for_the_hosts_memory_where_an_engine_has_its_own(
    ingots: Callable[..., Path], tiny_onnx: Path, tmp_path: Path
) -> None:
    asked: dict[str, tuple[int, int]] = {}
    for name, ingot in {
        "mamba2": ingots("mamba2", "ort"),
        "olmoe": tiny_onnx,
        "engine": _with_engine(tiny_onnx, tmp_path / "ingot"),
    }.items():
        write_repository(ingot, tmp_path / name, Settings(name="m"))
        asked[name] = _memory(tmp_path / name)
    assert asked == {"mamba2": (1, 2), "olmoe": (1, 2), "engine": (3, 4)}
    limits = _objects(tmp_path / "engine")["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert limits[0]["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize(
    ("family", "target", "rule"),
    [
        ("olmoe", "ort", "- `attention_mask [1,S]`: ones"),
        ("olmoe", "onnx", "- `attention_mask [1,1+S]`: **a 0**, then ones"),
        ("mamba2", "ort", "- `attention_mask [1,T]`: ones"),
    ],
)
def test_explains_a_sequence_of_the_graph(
    ingots: Callable[..., Path], tmp_path: Path, family: str, target: str, rule: str
) -> None:
    write_repository(ingots(family, target), tmp_path / "r", Settings(name="m"))
    text = (tmp_path / "r" / "README.md").read_text()
    assert rule in text
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        ast.parse(block)
    assert "{{" not in text and "{%" not in text
    # Run the client of the graph against the sequence batcher of this file.
    sequence = Sequence(tmp_path / "r" / "m")
    printed = _run_client(blocks[1], sequence)
    session = load(ingots(family, target))
    steps = generate(session, [[3, 14, 15]], max_new_tokens=8, stop_ids=())
    assert printed == [3, 14, 15, *(token for (token,) in steps)]


@pytest.mark.parametrize("shared", [True, False])
def test_describes_each_state_of_a_hybrid_as_it_grows(tiny_ort: Path, shared: bool) -> None:
    manifest = Manifest.read(tiny_ort)
    caches = [replace(state, shared=shared) for state in key_value_states(0, 2, 16)]
    fixed = recurrent_states(1, (24, 3), (2, 8, 5))
    hybrid = replace(
        manifest,
        states=(*caches, *fixed),
        inputs=tuple(
            each for each in manifest.inputs if each.name in ("input_ids", "attention_mask")
        ),
        outputs=tuple(each for each in manifest.outputs if each.name == manifest.main_output),
    )
    plan = make_plan(tiny_ort, hybrid, Settings(name="m", capacity=64, max_batch=8))
    texts = rendered(plan, hybrid)
    text = texts[f"m/{CONFIG}"]
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    # A cache's length may differ in each sequence.
    assert config.max_batch_size == 1
    found = {
        state.input_name: (list(state.dims), state.use_same_buffer_for_input_output)
        for state in config.sequence_batching.state
    }
    cache = ([2, 64 if shared else -1, 16], shared)
    assert found == {
        **{state.input: cache for state in caches},
        "past_states.1.conv": ([24, 3], False),
        "past_states.1.ssm": ([2, 8, 5], False),
    }
    assert ("Each cache has room for 64 tokens" in text) == shared
    assert ("Each cache grows by the tokens" in text) == (not shared)
    assert "Every other state has one size" in text
    readme = texts["README.md"]
    assert f"- `attention_mask [1,{'' if shared else '1+'}S]`" in readme
    # This graph takes no positions.
    assert "position_ids" not in readme


def _run_client(source: str, sequence: Sequence) -> list[int]:
    """The list that a README's client prints, given a sequence in place of a server."""

    class Input:
        def __init__(self, name: str, shape: tuple[int, ...], kind: str) -> None:
            assert kind == "INT64"
            self.name, self.shape = name, shape

        def set_data_from_numpy(self, array: Any) -> None:
            assert array.shape == tuple(self.shape) and array.shape[0] == 1
            self.values = array[0].tolist()

    class Client:
        def __init__(self, url: str) -> None:
            assert url == "127.0.0.1:8001"

        def infer(self, model: str, inputs: list[Input], **options: Any) -> Any:
            assert model == "m" and set(options) == {
                *("sequence_id", "sequence_start", "sequence_end")
            }
            result = sequence(**{each.name: each.values for each in inputs})
            return types.SimpleNamespace(as_numpy=lambda name: result)

    printed: list[list[int]] = []
    client = types.SimpleNamespace(InferenceServerClient=Client, InferInput=Input)
    source = source.replace("import tritonclient.grpc as grpc", "")
    exec(compile(source, "README.md", "exec"), {"grpc": client, "print": printed.append})
    (tokens,) = printed
    return tokens


# --- the linter


def _edit(repository: Path, file: str, old: str, new: str) -> None:
    path = repository / file
    text = path.read_text()
    assert old in text, f"{old!r} is not in {file}"
    path.write_text(text.replace(old, new, 1))


STATE = 'output_name: "present.0.key"\n      data_type: TYPE_FP32'
EDITS = {
    "state dtype": ("m", STATE, STATE.replace("FP32", "FP16"), "state input past_key_values.0.key"),
    "state output dtype": (
        *("m", STATE, STATE.replace("FP32", "FP16")),
        "state output present.0.key is TYPE_FP16; in model.onnx it is TYPE_FP32",
    ),
    "initial dtype": (
        *("m", 'name: "zero" data_type: TYPE_FP32', 'name: "zero" data_type: TYPE_INT32'),
        "the initial state of past_key_values.0.key is TYPE_INT32 and the state TYPE_FP32",
    ),
    "state dims": ("m", "dims: [ 2, 512, 16 ]", "dims: [ 3, 512, 16 ]", "behind the batch"),
    "state rank": ("m", "dims: [ 2, 512, 16 ]", "dims: [ 2, 512 ]", "has dims [2, 512]"),
    "initial dims": (
        *("m", "dims: [ 2, 512, 16 ] zero_data", "dims: [ 2, 100, 16 ] zero_data"),
        "has dims [2, 100, 16], which do not fit [2, 512, 16]",
    ),
    "initial dims of none": (
        *("m", "dims: [ 2, 512, 16 ] zero_data", "dims: [ 2, 0, 16 ] zero_data"),
        "has dims [2, 0, 16]",
    ),
    "variable cache": ("m", "dims: [ 2, 512, 16 ]", "dims: [ 2, -1, 16 ]", "must be fixed"),
    "initial data": ("m", "zero_data: true", 'data_file: "x"', "is not zero_data"),
    "initial name": ("m", 'initial_state { name: "zero"', "initial_state {", "has no name"),
    "other output": (
        *("m", 'output_name: "present.0.key"', 'output_name: "present.1.key"'),
        "goes on as present.0.key, and not as present.1.key",
    ),
    "unknown state": ("m", "past_key_values.0.key", "past.0", "past.0 is not in model.onnx"),
    "input dtype": ("m", "TYPE_INT64", "TYPE_INT32", "input input_ids is TYPE_INT32"),
    "input gone": (
        *("m", '  { name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ] },\n', ""),
        "attention_mask, an input of model.onnx, is neither",
    ),
    "output dims": ("m", "dims: [ -1, 512 ]", "dims: [ -1, 513 ]", "output logits has dims"),
    "no batch": ("m", "max_batch_size: 1", "max_batch_size: 0", "max_batch_size is 0"),
    "batch of caches": ("m", "max_batch_size: 1", "max_batch_size: 4", "lengths of a batch's"),
    "warm-up": (
        *("m", "instance_group", 'model_warmup [ { name: "x" batch_size: 1 } ]\ninstance_group'),
        "model_warmup and state exclude each other",
    ),
    "other name": ("m", 'name: "m"', 'name: "n"', "names the model 'n'"),
    "no protobuf": ("m", 'name: "m"', 'nane: "m"', "cannot be read"),
    "no such graph": ("m", "model.onnx", "other.onnx", "1/other.onnx, which it runs, is missing"),
    "not decoupled": ("m_generate", "decoupled: true", "decoupled: false", "must be true"),
    "no streams": ("m_generate", 'string_value: "2"', 'string_value: "0"', "streams is '0'"),
    "ingot moved": ("m_generate", "../m/1", "../n/1", "is '../n/1', where no ingot lies"),
    "batched stream": ("m_generate", "max_batch_size: 0", "max_batch_size: 2", "it must be 0"),
}


def test_finds_nothing_in_a_new_repository(repository: Path) -> None:
    assert lint(repository) == []


@pytest.mark.parametrize("case", EDITS)
def test_finds_a_fault_in_a_config(copied: Path, case: str) -> None:
    model, old, new, sentence = EDITS[case]
    _edit(copied, f"{model}/config.pbtxt", old, new)
    assert any(sentence in problem for problem in lint(copied)), lint(copied)


def test_lets_an_operator_edit_what_is_theirs(copied: Path) -> None:
    _edit(copied, "m_generate/config.pbtxt", 'string_value: "2"', 'string_value: "16"')
    _edit(copied, "m/config.pbtxt", "KIND_CPU count: 1", "KIND_CPU count: 2")
    (copied / "launch.sh").write_text("#!/bin/sh\n")
    assert lint(copied) == []


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("m/1/model.onnx", "model.onnx"),
        ("m/1/weights.safetensors", "weights.safetensors"),
        ("m/1/ingot.json", "ingot.json"),
        ("m/config.pbtxt", "m/config.pbtxt"),
        ("m_generate/1/model.py", "m_generate/1/model.py"),
        ("m_generate/1/ingot/runtime/generate.py", "m_generate/1/ingot/runtime/generate.py"),
    ],
)
@pytest.mark.parametrize("fault", ["gone", "changed"])
def test_finds_a_file_that_is_gone_or_changed(
    copied: Path, file: str, sentence: str, fault: str
) -> None:
    path = copied / file
    if fault == "gone":
        path.unlink()
    elif file.endswith("config.pbtxt"):
        path.write_bytes(b"\x01")
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert any(sentence in problem for problem in lint(copied)), lint(copied)


def test_finds_an_engine_or_a_plugin_that_changed(tiny_onnx: Path, tmp_path: Path) -> None:
    ingot = _with_engine(tiny_onnx, tmp_path / "ingot")
    write_repository(ingot, tmp_path / "r", Settings(name="m"))
    plugin = tmp_path / "r" / "m" / "1" / PLUGINS
    plugin.write_bytes(b"PLUGINS")
    assert [PLUGINS in problem for problem in lint(tmp_path / "r")] == [True]
    plugin.unlink()
    assert any(f"1/{PLUGINS}, which the engine needs" in p for p in lint(tmp_path / "r"))
    other = _with_engine(tiny_onnx, tmp_path / "other", graph_sha256="0" * 64)
    write_repository(other, tmp_path / "s", Settings(name="m"))
    assert lint(tmp_path / "s") == [f"m/config.pbtxt: {ENGINE} was built from another {GRAPH}."]
    _edit(tmp_path / "s", "m/config.pbtxt", 'profile: [ "0", "1" ]', 'profile: [ "0", "2" ]')
    _edit(tmp_path / "s", "m/config.pbtxt", "max_batch_size: 1", "max_batch_size: 5")
    assert any("has no profile 2" in p for p in lint(tmp_path / "s"))
    assert any("the engine was built for 4" in p for p in lint(tmp_path / "s"))


def test_finds_a_growing_cache_in_one_buffer(tiny_onnx: Path, tmp_path: Path) -> None:
    write_repository(tiny_onnx, tmp_path / "r", Settings(name="m"))
    assert _parsed(tmp_path / "r" / "m" / "config.pbtxt").max_batch_size == 1
    state = "dims: [ 2, -1, 16 ]"
    _edit(
        *(tmp_path / "r", "m/config.pbtxt", state),
        f"{state}\n      use_same_buffer_for_input_output: true",
    )
    assert any("they cannot be one buffer" in problem for problem in lint(tmp_path / "r"))
    write_repository(tiny_onnx, tmp_path / "r", Settings(name="m"), overwrite=True)
    _edit(tmp_path / "r", "m/config.pbtxt", state, "dims: [ 2, 1, 16 ]")
    assert any("its dims cannot all be fixed" in problem for problem in lint(tmp_path / "r"))


def test_refuses_to_check_what_is_no_repository(tmp_path: Path, copied: Path) -> None:
    with pytest.raises(TritonError, match=f"has no {RECORD}"):
        lint(tmp_path)
    (copied / RECORD).write_text("{")
    with pytest.raises(TritonError, match="is damaged"):
        lint(copied)
    (copied / RECORD).write_text('{"schema_version": 99}')
    with pytest.raises(TritonError, match="has schema version 99"):
        lint(copied)


# --- the commands


@pytest.mark.parametrize("group", [ingot_command, runtime_command], ids=["ingot", "runtime"])
def test_makes_and_checks_a_repository_by_its_command(
    group: Any, tiny_ort: Path, tmp_path: Path
) -> None:
    run = CliRunner()
    out = tmp_path / "r"
    made = run.invoke(group, ["triton", str(tiny_ort), "--out", str(out), "--name", "m"])
    assert made.exit_code == 0 and "m, m_generate" in made.stdout
    checked = run.invoke(group, ["triton", "--check", str(out)])
    assert (checked.exit_code, checked.stdout) == (0, f"{out}: nothing found\n")
    (out / "m" / "1" / GRAPH).unlink()
    checked = run.invoke(group, ["triton", "--check", str(out)])
    assert checked.exit_code == 1 and GRAPH in checked.stdout
    again = run.invoke(group, ["triton", str(tiny_ort), "--out", str(out)])
    assert again.exit_code == 2
    assert (
        again.stderr == f"error: {out} exists; give --overwrite to replace it, or another --out.\n"
    )
    for arguments in ([], [str(tiny_ort)], [str(tiny_ort), "--check", str(out)]):
        assert run.invoke(group, ["triton", *arguments]).exit_code == 2


def test_packs_its_templates_into_the_wheel(wheel: Path) -> None:  # noqa: F811
    templates = {path.relative_to(ROOT).as_posix() for path in TEMPLATES.iterdir()}
    assert len(templates) == 7
    assert templates <= set(zipfile.ZipFile(wheel).namelist())


# --- the Python model


class FakeTensor:
    def __init__(self, name: str, array: Any) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> Any:
        return self.array


class FakeError:
    INTERNAL, INVALID_ARG, UNAVAILABLE = range(3)

    def __init__(self, text: str, code: int) -> None:
        self.text, self.code = text, code


class FakeResponse:
    def __init__(self, output_tensors: list[FakeTensor], error: FakeError | None = None) -> None:
        self.values = {tensor.name: tensor.array for tensor in output_tensors}
        self.error = error


@dataclass
class FakeSender:
    """Keeps what is sent.

    Attributes:
        cancel_after: responses, after which the client cancels.
        meet: where every response waits for those of the other streams.
    """

    cancel_after: int = 10**9
    meet: threading.Barrier | None = None
    tokens: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    error: FakeError | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def is_cancelled(self) -> bool:
        return len(self.tokens) >= self.cancel_after

    def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
        assert not self.done.is_set(), "a response behind the final one"
        if response is not None and response.error is not None:
            self.error = response.error
        elif response is not None:
            assert response.values["index"].tolist() == [len(self.tokens)]
            self.tokens.append(int(response.values["token_id"][0]))
            self.reasons.append(response.values["finish_reason"][0].decode())
        if flags == FINAL:
            self.done.set()
        if self.meet is not None and response is not None and response.error is None:
            self.meet.wait(30)


class FakeRequest:
    def __init__(self, sender: FakeSender, **inputs: Any) -> None:
        self.sender, self.inputs = sender, inputs

    def get_response_sender(self) -> FakeSender:
        return self.sender


def _input(request: FakeRequest, name: str) -> FakeTensor | None:
    if name not in request.inputs:
        return None
    value = request.inputs[name]
    if isinstance(value, np.ndarray):
        return FakeTensor(name, value)
    kind = {"temperature": np.float32, "top_p": np.float32, "input_ids": np.int64}
    kind |= {"stop_ids": np.int64, "seed": np.int64}
    array = np.array(value if isinstance(value, list) else [value], kind.get(name, np.int32))
    return FakeTensor(name, array)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``runtime.triton_model`` over a stand-in for what Triton gives it."""
    fake = types.ModuleType("triton_python_backend_utils")
    members = {
        "Tensor": FakeTensor,
        "TritonError": FakeError,
        "InferenceResponse": FakeResponse,
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "get_input_tensor_by_name": _input,
        "Logger": types.SimpleNamespace(log_info=lambda text: None),
    }
    for name, member in members.items():
        setattr(fake, name, member)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delitem(sys.modules, "ingot.runtime.triton_model", raising=False)
    module = importlib.import_module("ingot.runtime.triton_model")
    yield module
    monkeypatch.delitem(sys.modules, "ingot.runtime.triton_model")


@pytest.fixture
def started(backend: Any) -> Iterator[Callable[..., Any]]:
    """``started(repository, **parameters)``: its model, initialised as Triton does."""
    models = []

    def start(repository: Path, **changes: str) -> Any:
        config = _parsed(repository / "m_generate" / "config.pbtxt")
        parameters = {
            name: {"string_value": changes.get(name, value.string_value)}
            for name, value in config.parameters.items()
        }
        model = backend.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps({"parameters": parameters}),
                "model_repository": str(repository / "m_generate"),
                "model_name": "m_generate",
            }
        )
        models.append(model)
        return model

    yield start
    for model in models:
        model.finalize()


def _solo(ingot: Path, prompt: list[int], new: int, **options: Any) -> list[int]:
    steps = generate(load(ingot), [prompt], max_new_tokens=new, **options)
    return [token for (token,) in steps if token is not None]


def _ask(model: Any, **inputs: Any) -> FakeSender:
    sender = FakeSender()
    model.execute([FakeRequest(sender, **inputs)])
    assert sender.done.wait(30)
    return sender


def test_streams_one_token_a_response(
    started: Callable[..., Any], repository: Path, tiny_ort: Path
) -> None:
    model = started(repository)
    sender = _ask(model, input_ids=PROMPT, max_new_tokens=16)
    assert sender.tokens == _solo(tiny_ort, PROMPT, 16)
    assert sender.reasons == [""] * 15 + ["length"]
    sampled = _ask(model, input_ids=PROMPT, max_new_tokens=16, temperature=1.5, seed=3)
    assert sampled.tokens == _solo(tiny_ort, PROMPT, 16, sampling=Sampling(1.5, seed=3))
    stop = sampled.tokens[4]
    stopped = _ask(model, input_ids=PROMPT, temperature=1.5, seed=3, stop_ids=[7, stop])
    assert stopped.tokens == sampled.tokens[: sampled.tokens.index(stop) + 1]
    assert stopped.reasons[-1] == "stop"
    # By default 64 tokens, or as many as there is room for.
    assert len(_ask(model, input_ids=PROMPT).tokens) == 64
    assert len(_ask(model, input_ids=[1] * 510).tokens) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_keeps_the_state_of_each_stream_apart(
    started: Callable[..., Any], ingots: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    ingot = ingots(family)
    write_repository(ingot, tmp_path / "r", Settings(name="m", streams=3))
    model = started(tmp_path / "r")
    meet = threading.Barrier(3)
    prompts = [PROMPT, [411], [9, 8, 207]]
    senders = [FakeSender(meet=meet) for _ in prompts]
    options = {"temperature": 1.0, "max_new_tokens": 12}
    # All three take each step together, so whatever they shared would show.
    threading.Thread(
        target=model.execute,
        args=(
            [
                FakeRequest(sender, input_ids=prompt, **options)
                for sender, prompt in zip(senders, prompts, strict=True)
            ],
        ),
    ).start()
    for sender, prompt in zip(senders, prompts, strict=True):
        assert sender.done.wait(30) and sender.error is None
        assert sender.tokens == _solo(ingot, prompt, 12, sampling=Sampling(1.0))


def test_holds_the_weights_once_for_all_streams(
    started: Callable[..., Any], repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    real = onnxruntime.InferenceSession

    def counted(*arguments: Any, **options: Any) -> Any:
        opened.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    started(repository, streams="6")
    assert len(opened) == 1


def test_lets_triton_keep_what_waits_for_a_stream(
    started: Callable[..., Any], repository: Path
) -> None:
    model = started(repository, streams="2")
    meet = threading.Barrier(2)
    first, second = FakeSender(meet=meet), FakeSender()
    # The first stops at its first token until it is met there.
    model.execute([FakeRequest(first, input_ids=PROMPT, max_new_tokens=1)])
    caller = threading.Thread(
        target=model.execute,
        args=([FakeRequest(second, input_ids=PROMPT, max_new_tokens=4, temperature=1.0)],),
    )
    caller.start()
    assert second.done.wait(30)
    caller.join(30)
    assert not caller.is_alive()
    third = FakeSender(meet=meet)
    busy = threading.Thread(
        target=model.execute, args=([FakeRequest(third, input_ids=PROMPT, max_new_tokens=2)],)
    )
    # Both streams are taken now, so `execute` keeps the caller and with it the queue.
    blocked = threading.Barrier(2)
    third.meet = blocked
    busy.start()
    busy.join(0.5)
    assert busy.is_alive()
    meet.wait(30)
    busy.join(30)
    assert not busy.is_alive()
    for _ in range(2):
        blocked.wait(30)
    assert third.done.wait(30)


@pytest.mark.parametrize("after", [0, 3])
def test_stops_a_cancelled_stream_and_frees_it(
    started: Callable[..., Any], repository: Path, tiny_ort: Path, after: int
) -> None:
    model = started(repository, streams="1")
    sender = FakeSender(cancel_after=after)
    model.execute([FakeRequest(sender, input_ids=PROMPT, max_new_tokens=400)])
    assert sender.done.wait(30)
    assert len(sender.tokens) == after and sender.error is None
    assert _ask(model, input_ids=[5], max_new_tokens=4).tokens == _solo(tiny_ort, [5], 4)
    session = model._idle.get()
    assert session.state()["present.0.key"].size == 0
    model._idle.put(session)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong dtype": ({"input_ids": np.ones(2, np.int32)}, "input_ids is int32"),
    "wrong rank": ({"input_ids": np.ones((1, 2), np.int64)}, "of shape [1, 2]"),
    "none": ({}, "input_ids holds no tokens"),
    "empty": ({"input_ids": []}, "input_ids holds no tokens"),
    "out of vocabulary": ({"input_ids": [3, 512]}, "token id 512 is outside"),
    "below 0": ({"input_ids": [-1]}, "token id -1 is outside"),
    "too long": ({"input_ids": [1] * 512}, "leaves no room in a capacity of 512"),
    "too many": ({"input_ids": [1] * 500, "max_new_tokens": 13}, "it must be 1 to 12"),
    "no new": ({"input_ids": [1], "max_new_tokens": 0}, "max_new_tokens is 0"),
    "NaN": ({"input_ids": [1], "temperature": float("nan")}, "temperature is nan"),
    "top-p": ({"input_ids": [1], "top_p": float("nan")}, "top-p is nan"),
    "top-k": ({"input_ids": [1], "top_k": -1}, "top-k is -1"),
    "two": ({"input_ids": [1], "seed": [1, 2]}, "seed has shape [2]"),
    "stop ids": ({"input_ids": [1], "stop_ids": np.ones((1, 1), np.int64)}, "stop_ids is int64"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_refuses_a_malformed_request_and_serves_the_next(
    started: Callable[..., Any], repository: Path, case: str
) -> None:
    inputs, sentence = MALFORMED[case]
    model = started(repository, streams="1")
    sender = _ask(model, **inputs)
    assert sender.tokens == [] and sender.error is not None
    assert sender.error.code == FakeError.INVALID_ARG and sentence in sender.error.text
    assert len(_ask(model, input_ids=[1], max_new_tokens=2).tokens) == 2


def test_survives_a_fault_in_a_stream(
    started: Callable[..., Any], repository: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = started(repository, streams="1")

    def broken(*_: Any, **__: Any) -> Iterator[list[int]]:
        yield [5]
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "generate", broken)
        sender = _ask(model, input_ids=PROMPT)
    assert sender.tokens == [5] and sender.error is not None
    assert sender.error.code == FakeError.INTERNAL
    assert sender.error.text == "RuntimeError: out of memory"
    assert len(_ask(model, input_ids=[1], max_new_tokens=2).tokens) == 2


def test_ends_its_streams_when_it_is_finalized(
    started: Callable[..., Any], repository: Path
) -> None:
    model = started(repository, streams="2")
    meet = threading.Barrier(2)
    sender = FakeSender(meet=meet)
    model.execute([FakeRequest(sender, input_ids=PROMPT, max_new_tokens=400)])
    ending = threading.Thread(target=model.finalize)
    ending.start()
    assert model._stopping.wait(30)
    meet.wait(30)
    ending.join(30)
    assert not ending.is_alive()
    assert len(sender.tokens) == 1 and sender.error is not None
    assert sender.error.code == FakeError.UNAVAILABLE


def test_opens_no_ingot_that_is_damaged_or_has_no_tokens(
    started: Callable[..., Any], copied: Path, ingots: Callable[..., Path]
) -> None:
    place = copied / "m" / "1"
    (place / GRAPH).write_bytes((place / GRAPH).read_bytes()[::-1])
    with pytest.raises(IngotError, match="is not the file that was validated"):
        started(copied)
    shutil.rmtree(place)
    shutil.copytree(ingots("olmoe", task="features"), place)
    with pytest.raises(SessionError, match="not exported with --task generate"):
        started(copied)


ISOLATED = """
import importlib.util, json, sys, types

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "click", "rich", "jinja2", "safetensors"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Absent())
fake = sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
fake.Logger = types.SimpleNamespace(log_info=print)
spec = importlib.util.spec_from_file_location("model", sys.argv[1] + "/1/model.py")
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
made = model.TritonPythonModel()
made.initialize({
    "model_config": sys.argv[2], "model_repository": sys.argv[1], "model_name": "m_generate"
})
made.finalize()
print(json.dumps([
    m.__file__ for name, m in sys.modules.items()
    if name.partition(".")[0] == "ingot"
]))
"""


def test_carries_all_the_code_it_needs(copied: Path) -> None:
    home = copied / "m_generate"
    config = _parsed(home / "config.pbtxt")
    parameters = {k: {"string_value": v.string_value} for k, v in config.parameters.items()}
    text = json.dumps({"parameters": parameters})
    command = [sys.executable, "-I", "-c", ISOLATED, str(home), text]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    files = {Path(file) for file in json.loads(done.stdout.splitlines()[-1])}
    assert files == {home / "1" / file for file in CARRIED}


def test_carries_everything_that_an_engines_session_imports() -> None:
    carried = set(CARRIED + CARRIED_FOR_ENGINES)
    for file in carried:
        for name in imported((ROOT / file).read_text(encoding="utf-8")):
            parts = name.split(".")
            if parts[0] != "ingot":
                continue
            # The longest part of the dotted name that is a module.
            modules = ["/".join(parts[: n + 1]) for n in range(len(parts))]
            known = [m for m in modules if (ROOT / f"{m}.py").is_file()]
            known += [f"{m}/__init__" for m in modules if (ROOT / m / "__init__.py").is_file()]
            assert {f"{module}.py" for module in known} <= carried, f"{file} imports {name}"


def test_writes_the_same_repository_twice(repository: Path, tiny_ort: Path, tmp_path: Path) -> None:
    write_repository(tiny_ort, tmp_path / "r", Settings(name="m", streams=2, threads=1))
    assert file_infos(tmp_path / "r", {}) == file_infos(repository, {})
    assert (tmp_path / "r" / "m" / "1" / MANIFEST).read_bytes() == (
        tiny_ort / MANIFEST
    ).read_bytes()
