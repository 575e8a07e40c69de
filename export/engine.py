"""A TensorRT engine from a lowered graph, by TensorRT on a machine with a GPU or by TensorRT-RTX.

TensorRT-RTX builds on any machine; its engines are finished for the device when they are loaded.
Polygraphy drives either.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from ingot.export.ingot import (
    ENGINE,
    GRAPH,
    MODULES,
    EngineInfo,
    ProfileInfo,
    TensorInfo,
)
from ingot.export.ingot_schema import MOST_SIZE
from ingot.export.request import ExportRequest, Limits
from ingot.graphs.state import State
from ingot.plugins.device import compute_capability, has_gpu
from ingot.plugins.errors import IngotError, install_hint, shown
from ingot.plugins.kernels.form import COMPUTE_CAPABILITIES, runs_on
from ingot.plugins.library import PATH as KERNEL_LIBRARY
from ingot.plugins.library import PLUGINS as PLUGIN_LIBRARY
from ingot.plugins.operator import DOMAIN
from ingot.plugins.whole import sha256

TENSORRT, RTX = "tensorrt", "tensorrt-rtx"
INSTALL = {
    TENSORRT: install_hint("trt"),
    RTX: install_hint("trt-rtx"),
}


class EngineError(IngotError):
    """An engine that cannot be built: what is missing, or what TensorRT refused."""


def choose_builder(wanted: str, target: str) -> str | None:
    """The builder to use: ``tensorrt``, ``tensorrt-rtx``, or None for no engine.

    Args:
        wanted: ``auto`` or a builder's name, as ``--builder`` has it.
        target: ``trt`` or ``trt-rtx``; the second knows one builder only.

    Raises:
        EngineError: a builder that is not installed, or that this machine cannot run.
    """
    if wanted == "none":
        return None
    if target == "trt-rtx":
        if wanted == TENSORRT:
            raise EngineError("--target trt-rtx is built by tensorrt-rtx; leave --builder out.")
        wanted = RTX
    if wanted == "auto":
        wanted = TENSORRT if _installed(TENSORRT) and has_gpu() else RTX
    if not _installed(wanted):
        raise EngineError(
            f"the Python package {MODULES[wanted]} is missing; install it with: {INSTALL[wanted]} "
            "(or give --builder none for the graph without an engine)."
        )
    if importlib.util.find_spec("polygraphy") is None:
        raise EngineError(f"polygraphy is missing; install it with: {INSTALL[wanted]}")
    if wanted == TENSORRT and not has_gpu():
        raise EngineError(
            "tensorrt builds on a machine with an NVIDIA GPU only, and none is here; give "
            "--builder tensorrt-rtx, or --builder none for the graph alone."
        )
    return wanted


def _installed(builder: str) -> bool:
    return importlib.util.find_spec(MODULES[builder]) is not None


def profiles(
    inputs: Sequence[TensorInfo], states: Sequence[State], limits: Limits
) -> tuple[ProfileInfo, ...]:
    """The optimisation profiles: one for prefill and, where there is state, one for decode.

    Args:
        inputs: of the graph.
        states: of the graph; without any, each call is a prefill.
        limits: of the calls.
    """
    longest, usual = limits.max_seq, min(limits.opt_seq, limits.max_seq)
    batches = (1, 1, limits.max_batch)
    # least, usual, most
    prefill = {
        "batch": batches,
        "sequence": (1, usual, longest),
        "past_sequence": (0, 0, longest - 1),
        "total_sequence": (1, usual, longest),
    }
    decode = {
        "batch": batches,
        "sequence": (1, 1, 1),
        "past_sequence": (0, usual - 1, longest - 1),
        "total_sequence": (1, usual, longest),
    }
    named = {"prefill": prefill, "decode": decode} if states else {"prefill": prefill}
    return tuple(
        ProfileInfo(name, {tensor.name: _shapes(tensor, sizes) for tensor in inputs})
        for name, sizes in named.items()
    )


def _shapes(
    tensor: TensorInfo, sizes: Mapping[str, tuple[int, int, int]]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, usual, most = (
        tuple(d if isinstance(d, int) else sizes[d][which] for d in tensor.shape)
        for which in range(3)
    )
    return least, usual, most


class Builder:
    """TensorRT or TensorRT-RTX, with the plugins of the ``ingot`` operators registered.

    Args:
        name: ``tensorrt`` or ``tensorrt-rtx``.

    Attributes:
        trt: the builder's Python module.
    """

    def __init__(self, name: str) -> None:
        from polygraphy import config
        from polygraphy.logger import G_LOGGER

        from ingot.plugins.tensorrt.python_plugins import register
        from ingot.plugins.tensorrt.rtx import ensure_parser_can_load_plugins

        self.name = name
        G_LOGGER.module_severity = G_LOGGER.ERROR
        config.USE_TENSORRT_RTX = name == RTX
        if name == RTX:
            ensure_parser_can_load_plugins()
        self.trt: Any = importlib.import_module(MODULES[name])
        register(self.trt)

    @property
    def version(self) -> str:
        """The version of the Python module."""
        return str(self.trt.__version__)

    def plugin_layers(self, network: Any) -> int:
        """How many layers of a network are plugins."""
        return sum(layer.type == self.trt.LayerType.PLUGIN_V3 for layer in layers(network))

    def compute_capabilities(self, precision: str, plugins: bool) -> tuple[int, ...]:
        """Compute capabilities of the devices that an engine runs on, major times ten plus minor.

        Args:
            precision: of the engine; bfloat16 begins with Ampere.
            plugins: whether our kernels are in it.
        """
        if self.name == RTX:
            names = (name for name in dir(self.trt.ComputeCapability) if name.startswith("SM"))
            capabilities = sorted(int(name.removeprefix("SM")) for name in names)
        else:
            capabilities = [compute_capability()]
        if precision == "bfloat16":
            capabilities = [c for c in capabilities if c >= 80]
        if not plugins:
            return tuple(capabilities)
        return tuple(c for c in capabilities if any(runs_on(k, c) for k in COMPUTE_CAPABILITIES))

    def parse(self, graph: Path) -> tuple[Any, Any, Any]:
        """The network of an ONNX file: builder, network and parser, which must live together.

        Raises:
            EngineError: what the parser refused.
        """
        from polygraphy.backend.trt import network_from_onnx_path
        from polygraphy.exception import PolygraphyException

        try:
            parsed: tuple[Any, Any, Any] = network_from_onnx_path(str(graph), strongly_typed=True)
        except PolygraphyException as error:
            raise EngineError(
                f"{self.name} {self.version} cannot parse {graph}: {error}"
            ) from error
        self._let_attention_decompose(parsed[1])
        return parsed

    def _let_attention_decompose(self, network: Any) -> None:
        # There is a fused kernel for some head sizes and dtypes only; without this the builder
        # fails where there is none.
        for layer in layers(network):
            if layer.type == self.trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = self.trt.IAttentionInputLayer
                layer.attention.decomposable = True

    def build(
        self,
        parsed: tuple[Any, Any, Any],
        wanted: Sequence[ProfileInfo],
        embedded: Sequence[Path] = (),
    ) -> bytes:
        """The serialised engine.

        Args:
            parsed: from ``parse``.
            wanted: the optimisation profiles.
            embedded: plugin libraries to put into the engine.

        Raises:
            EngineError: what the builder refused.
        """
        from polygraphy.backend.trt import Profile, engine_bytes_from_network
        from polygraphy.exception import PolygraphyException

        made = []
        for info in wanted:
            profile = Profile()
            for name, (least, usual, most) in info.shapes.items():
                profile.add(name, min=least, opt=usual, max=most)
            made.append(profile)
        builder, network, _ = parsed
        config = self._config(builder, network, made)
        # TF32 would round float32 products to ten bits, without a word.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        if embedded:
            config.plugins_to_serialize = [str(path) for path in embedded]
        try:
            engine = engine_bytes_from_network(parsed, config=lambda *_: config)
        except PolygraphyException as error:
            raise EngineError(
                f"{self.name} {self.version} cannot build the engine ({error}); its messages are "
                "above. Try --builder none for the graph, or another --precision."
            ) from error
        return bytes(engine)

    def _config(self, builder: Any, network: Any, made: list[Any]) -> Any:
        if self.name == RTX:
            from polygraphy.backend.tensorrt_rtx import create_config_rtx

            return create_config_rtx(builder, network, profiles=made)
        from polygraphy.backend.trt import create_config

        return create_config(builder, network, profiles=made)


def plan_engine(request: ExportRequest) -> str | None:
    """Check what a TensorRT target is asked for, and choose its builder.

    Returns:
        The builder, or None for the graph alone.

    Raises:
        EngineError: sizes that contradict each other, or something that is not installed.
    """
    limits = request.limits
    for name, size in asdict(limits).items():
        if type(size) is not int or not 1 <= size <= MOST_SIZE:
            raise EngineError(
                f"--{name.replace('_', '-')} is {shown(size)}; it must be at least 1 and at most "
                f"{MOST_SIZE}."
            )
    if limits.opt_seq > limits.max_seq:
        raise EngineError(
            f"--opt-seq {limits.opt_seq} is more than --max-seq {limits.max_seq}; give a usual "
            "length within the longest."
        )
    if request.embed_plugins and not PLUGIN_LIBRARY.is_file():
        raise EngineError(
            f"--embed-plugins needs {PLUGIN_LIBRARY}, which is not built; run make plugins where "
            "TensorRT's headers are."
        )
    return choose_builder(request.builder, request.target)


def make_engine(
    folder: Path,
    builder_name: str,
    precision: str,
    made: tuple[ProfileInfo, ...],
    *,
    embed: bool,
) -> EngineInfo:
    """Build the engine of a lowered graph into its folder, with the libraries it needs.

    Args:
        folder: holds the graph and its weights.
        builder_name: from ``plan_engine``.
        precision: of the graph.
        made: the optimisation profiles.
        embed: whether the plugins go into the engine file.

    Raises:
        EngineError: TensorRT refused the graph, or did not take the plugins.
    """
    builder = Builder(builder_name)
    parsed = builder.parse(folder / GRAPH)
    wanted = custom_nodes(folder / GRAPH)
    found = builder.plugin_layers(parsed[1])
    if found != sum(wanted.values()):
        raise EngineError(
            f"{builder_name} took {found} of {sum(wanted.values())} operators for plugins; this "
            "is a fault of Ingot, please report it."
        )
    embedded = [PLUGIN_LIBRARY] if embed else []
    (folder / ENGINE).write_bytes(builder.build(parsed, made, embedded))
    libraries = []
    # The plugins' library holds the kernels too.
    library = PLUGIN_LIBRARY if PLUGIN_LIBRARY.is_file() else KERNEL_LIBRARY
    if wanted and library.is_file() and not embed:
        shutil.copyfile(library, folder / library.name)
        libraries.append(library.name)
    return EngineInfo(
        builder=builder_name,
        version=builder.version,
        compute_capabilities=builder.compute_capabilities(precision, bool(wanted)),
        graph_sha256=sha256(folder / GRAPH),
        plugins=wanted,
        libraries=tuple(libraries),
        embedded=embed,
        profiles=made,
    )


def trtexec_options(made: Sequence[ProfileInfo]) -> str:
    """What ``trtexec`` is to be told to build the same engine from the graph."""
    options = ["--stronglyTyped", "--noTF32"]
    for index, profile in enumerate(made):
        options.append(f"--profile={index}")
        for which, name in enumerate(("min", "opt", "max")):
            shapes = (
                f"{tensor}:{'x'.join(map(str, sizes[which]))}"
                for tensor, sizes in profile.shapes.items()
            )
            options.append(f"--{name}Shapes={','.join(shapes)}")
    return "\n".join(options) + "\n"


def layers(network: Any) -> Iterator[Any]:
    """The layers of a network, in order."""
    return (network.get_layer(index) for index in range(network.num_layers))


def custom_nodes(graph: Path) -> dict[str, int]:
    """How many nodes of a graph are ``ingot`` operators, each to be one plugin layer."""
    model = onnx.load(graph, load_external_data=False)
    return dict(Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN))
