"""The texts of a repository: configs, README, scripts and the manifest for Kubernetes."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped]
from google.protobuf import text_format
from kinds import KINDS
from triton_ingots import Sequence, parsed, with_engine

from ingot.export.ingot import ENGINE, Manifest
from ingot.graphs.state import key_value_states, recurrent_states
from ingot.runtime.generate import generate
from ingot.runtime.loading import load
from ingot.runtime.triton_lint import lint
from ingot.runtime.triton_plan import CONFIG, PLUGINS, Settings, TritonError, make_plan
from ingot.runtime.triton_repository import write_repository
from ingot.runtime.triton_texts import memory_gib, rendered

# On a machine that only runs the tests of GPUs it may be missing.
model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

# Minutes of exports; `make test-slow` runs them, and so does CI.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "target"),
    # Of the onnx target, a cache that grows and a state of fixed size.
    [*((family, "ort") for family in KINDS), ("olmoe", "onnx"), ("mamba2", "onnx")],
)
def test_writes_configs_by_which_the_graph_computes_what_the_session_does(
    ingots: Callable[..., Path], tmp_path: Path, family: str, target: str
) -> None:
    ingot = ingots(family, target)
    write_repository(ingot, tmp_path / "r", Settings(name="m"))
    assert lint(tmp_path / "r") == []
    manifest = Manifest.read(ingot)
    for state in manifest.states:
        assert state.shared == (state.axis is not None and target == "ort")
    grown = family != "mamba2"
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
        if "position_ids" in [tensor.name for tensor in manifest.inputs]:
            given["position_ids"] = list(range(seen, seen + count))
        found = sequence(**given)
        expected = session.step(np.array([new]), np.ones((1, count), dtype=np.int64))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        seen += count


def test_describes_a_stream_of_tokens(repository: Path) -> None:
    config = parsed(repository / "m_generate" / "config.pbtxt")
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


def test_describes_an_engine_with_its_profiles(tiny_onnx: Path, tmp_path: Path) -> None:
    ingot = with_engine(tiny_onnx, tmp_path / "ingot")
    plan = write_repository(ingot, tmp_path / "r", Settings(name="m", max_batch=8))
    assert plan.models == ["m", "m_generate"]
    config = parsed(tmp_path / "r" / "m" / "config.pbtxt")
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert config.default_model_filename == ENGINE
    # A batch of caches that grow would be misread; the capacity is the engine's.
    assert config.max_batch_size == 1
    settings = parsed(tmp_path / "r" / "m_generate" / "config.pbtxt").parameters
    assert settings["capacity"].string_value == "256"
    (group,) = config.instance_group
    assert list(group.profile) == ["0", "1"]
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    state = config.sequence_batching.state[0]
    assert list(state.dims) == [2, -1, 16] and list(state.initial_state[0].dims) == [2, 1, 16]
    assert not state.use_same_buffer_for_input_output and not state.use_growable_memory
    assert lint(tmp_path / "r") == []
    assert "TensorRT 10.13.3, the version that built" in (tmp_path / "r" / "README.md").read_text()


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
    ingot = with_engine(tiny_onnx, tmp_path / "i", embedded=embedded, libraries=libraries)
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
    # A stream has a cache of 128 MiB and a piece of its prompt; a sequence of the graph has 0.77
    # GiB of logits beside.
    assert memory(streams=8) == (5, 22)
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
        "engine": with_engine(tiny_onnx, tmp_path / "ingot"),
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
