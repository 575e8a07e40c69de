"""``libingot_cpu.so``, the kernels for CPUs, called by ctypes.

The structures mirror those of ``src/ingot_cpu.h``; there it says what their members mean.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
)
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ingot.plugins.activations import ACTIVATIONS
from ingot.plugins.cpu.panels import NUMBERS, Bytes, Floats, Format, rounding
from ingot.plugins.errors import IngotError

VERSION = 1
PATH = Path(__file__).resolve().parents[1] / "lib" / "libingot_cpu.so"

_TASK = CFUNCTYPE(None, c_void_p, c_size_t)
_RUN = CFUNCTYPE(None, c_void_p, c_size_t, _TASK, c_void_p)


class LibraryError(IngotError):
    """The kernels are not built, or refuse a call."""


class _Threads(Structure):
    _fields_ = (("run", _RUN), ("self", c_void_p))


class _Format(Structure):
    _fields_ = (("numbers", c_int32), ("block", c_int32), ("zero_points", c_int32))


class _Output(Structure):
    _fields_ = (
        ("out_features", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("scale", c_float),
        ("y", c_void_p),
    )


class _Linear(Structure):
    _fields_ = (
        ("format", _Format),
        ("round_activations", c_int32),
        ("count", c_int32),
        ("tokens", c_int64),
        ("in_features", c_int64),
        ("x", c_void_p),
        ("outputs", POINTER(_Output)),
    )


class _Mlp(Structure):
    _fields_ = (
        ("gate_up_format", _Format),
        ("down_format", _Format),
        ("round_activations", c_int32),
        ("activation", c_int32),
        *((name, c_int64) for name in ("tokens", "hidden", "intermediate")),
        *((name, c_void_p) for name in ("x", "gate", "up", "down", "residual")),
        ("scale", c_float),
        ("y", c_void_p),
    )


class _Embedding(Structure):
    _fields_ = (
        ("format", _Format),
        ("tokens", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("ids", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
    )


class _MoeDispatch(Structure):
    _fields_ = (
        ("gate_up_format", _Format),
        ("down_format", _Format),
        ("round_activations", c_int32),
        ("activation", c_int32),
        ("normalize", c_int32),
        ("top_k", c_int32),
        ("tokens", c_int64),
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("experts", c_int64),
        ("x", c_void_p),
        ("router_logits", c_void_p),
        ("gate_up", c_void_p),
        ("down", c_void_p),
        ("y", c_void_p),
    )


class _MoeLinear(Structure):
    _fields_ = (
        ("format", _Format),
        ("round_activations", c_int32),
        ("per_choice", c_int32),
        ("top_k", c_int32),
        ("tokens", c_int64),
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("experts", c_int64),
        ("x", c_void_p),
        ("expert_ids", c_void_p),
        ("weight", c_void_p),
        ("y", c_void_p),
    )


class _Mamba2Scan(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "tokens", "heads", "head_size")),
        ("groups", c_int64),
        ("states", c_int64),
        *((name, c_int64) for name in ("x_stride", "dt_stride", "bc_stride")),
        ("dt_min", c_float),
        ("dt_max", c_float),
        *((name, c_void_p) for name in ("x", "dt", "a", "b", "c", "d", "dt_bias")),
        ("state", c_void_p),
        ("mask", c_void_p),
        ("y", c_void_p),
        ("new_state", c_void_p),
    )


class _Mamba2Mixer(Structure):
    _fields_ = (
        ("activation", c_int32),
        *((name, c_int64) for name in ("batch", "tokens", "heads", "head_size", "groups")),
        *((name, c_int64) for name in ("states", "width", "norm_groups")),
        *((name, c_float) for name in ("epsilon", "dt_min", "dt_max")),
        *((name, c_void_p) for name in ("projected", "mask", "conv_state", "state")),
        *((name, c_void_p) for name in ("conv_weight", "conv_bias", "a", "d", "dt_bias", "norm")),
        *((name, c_void_p) for name in ("y", "new_conv_state", "new_state")),
    )


class _Attention(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "tokens", "heads", "key_heads", "head_size")),
        *((name, c_int64) for name in ("past", "past_capacity", "capacity", "rotated")),
        ("scale", c_float),
        *((name, c_void_p) for name in ("query", "key", "value", "cos", "sin", "visible")),
        *((name, c_void_p) for name in ("past_key", "past_value", "present_key", "present_value")),
        ("y", c_void_p),
    )


class _CausalConv(Structure):
    _fields_ = (
        ("activation", c_int32),
        *((name, c_int64) for name in ("batch", "tokens", "channels", "width", "x_stride")),
        *((name, c_void_p) for name in ("x", "mask", "state", "weight", "bias", "y", "new_state")),
    )


class CpuLibrary:
    """The loaded library.

    Args:
        path: of the shared library.
        threads: that calls are computed by.

    Raises:
        LibraryError: missing, another library, or of another version.
    """

    def __init__(self, path: Path = PATH, threads: int = 1) -> None:
        self.path = path
        if not path.is_file():
            raise LibraryError(f"{path} is missing; build the CPU kernels with: make cpu")
        try:
            self._library = ctypes.CDLL(str(path))
            version = self._library.ingot_cpu_version()
        except (OSError, AttributeError) as error:
            raise LibraryError(f"{path} is not a library of Ingot's kernels: {error}") from error
        if version != VERSION:
            raise LibraryError(
                f"{path} has interface version {version} and this Ingot needs {VERSION}; rebuild "
                "it with: make cpu"
            )
        for name in ("last_error", "targets", "target"):
            getattr(self._library, f"ingot_cpu_{name}").restype = c_char_p
        self._library.ingot_cpu_use.argtypes = [c_char_p]
        self._library.ingot_cpu_weight_bytes.restype = c_size_t
        self._library.ingot_cpu_weight_bytes.argtypes = [POINTER(_Format), c_int64, c_int64]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._threads = _Threads(_RUN(self._run), None)

    @property
    def targets(self) -> list[str]:
        """The instruction sets that may be used here, the best first."""
        found: bytes = self._library.ingot_cpu_targets()
        return found.decode().split(",")

    @property
    def target(self) -> str:
        """The one that is used."""
        found: bytes = self._library.ingot_cpu_target()
        return found.decode()

    def use(self, target: str) -> None:
        """Use another one of ``targets``.

        Raises:
            LibraryError: it is none of them.
        """
        self._check(self._library.ingot_cpu_use(target.encode()))

    def weight_bytes(self, form: Format, rows: int, columns: int) -> int:
        """Of a matrix ``[rows, columns]`` in panels."""
        size: int = self._library.ingot_cpu_weight_bytes(byref(_format(form)), rows, columns)
        return size

    def linear(
        self,
        form: Format,
        x: Floats,
        weight: Bytes,
        rows: int,
        bias: Floats | None = None,
        residual: Floats | None = None,
        *,
        scale: float = 1.0,
        round_activations: bool = False,
    ) -> Floats:
        """``residual + scale * (x W^T + bias)``, or without a residual ``x W^T + bias``.

        Args:
            form: of the weight.
            x: ``[N, K]``, contiguous.
            weight: ``[rows, K]`` in panels.
            rows: outputs.
            bias: ``[rows]``.
            residual: ``[N, rows]``.
            scale: of what is added to it.
            round_activations: whether x is rounded to what products with such a weight may.

        Returns:
            ``[N, rows]``.
        """
        y = np.full((len(x), rows), np.nan, np.float32)
        given = (_address(weight), _address(bias), _address(residual), scale, _address(y))
        self._linear(form, x, [_Output(rows, *given)], round_activations)
        return y

    def linears(
        self,
        form: Format,
        x: Floats,
        weights: Sequence[tuple[Bytes, int]],
        *,
        round_activations: bool = False,
    ) -> list[Floats]:
        """``x W^T`` of several weights.

        Args:
            form: of all of them.
            x: ``[N, K]``, contiguous.
            weights: each in panels, and its rows.
            round_activations: whether x is rounded to what products with such a weight may.

        Returns:
            ``[N, rows]`` of each.
        """
        results = [np.full((len(x), rows), np.nan, np.float32) for _, rows in weights]
        outputs = [
            _Output(rows, _address(weight), None, None, 1.0, _address(y))
            for (weight, rows), y in zip(weights, results, strict=True)
        ]
        self._linear(form, x, outputs, round_activations)
        return results

    def _linear(self, form: Format, x: Floats, outputs: list[_Output], rounds: bool) -> None:
        held = (_Output * len(outputs))(*outputs)
        params = _Linear(
            _format(form), rounding(rounds, form), len(outputs), *x.shape, _address(x), held
        )
        self._check(self._library.ingot_cpu_linear(byref(params), byref(self._threads)))

    def mlp(
        self,
        forms: tuple[Format, Format],
        x: Floats,
        gate: Bytes,
        up: Bytes,
        down: Bytes,
        intermediate: int,
        residual: Floats | None = None,
        *,
        activation: str,
        scale: float = 1.0,
        round_activations: bool = False,
    ) -> Floats:
        """``residual + scale * (activation(x G^T) * (x U^T)) D^T``; the first may be missing.

        Args:
            forms: of ``gate`` and ``up``, and of ``down``.
            x: ``[N, H]``, contiguous.
            gate: ``[I, H]`` in panels.
            up: ``[I, H]`` in panels.
            down: ``[H, I]`` in panels.
            intermediate: I.
            residual: ``[N, H]``.
            activation: a key of ``plugins.activations.ACTIVATIONS``.
            scale: of what is added to the residual.
            round_activations: whether what is multiplied is rounded.

        Returns:
            ``[N, H]``.
        """
        y = np.full(x.shape, np.nan, np.float32)
        params = _Mlp(
            *map(_format, forms),
            rounding(round_activations, *forms),
            ACTIVATIONS[activation].number,
            *x.shape,
            intermediate,
            *(_address(tensor) for tensor in (x, gate, up, down, residual)),
            scale,
            _address(y),
        )
        self._check(self._library.ingot_cpu_mlp(byref(params), byref(self._threads)))
        return y

    def embedding(
        self, form: Format, ids: npt.NDArray[np.int64], weight: Bytes, rows: int, columns: int
    ) -> Floats:
        """Rows ``[N, columns]`` of a table ``[rows, columns]`` in panels."""
        y = np.full((len(ids), columns), np.nan, np.float32)
        addresses = (_address(ids), _address(weight), _address(y))
        params = _Embedding(_format(form), len(ids), columns, rows, *addresses)
        self._check(self._library.ingot_cpu_embedding(byref(params), byref(self._threads)))
        return y

    def moe_dispatch(
        self,
        forms: tuple[Format, Format],
        x: Floats,
        router_logits: Floats,
        gate_up: Bytes,
        down: Bytes,
        intermediate: int,
        *,
        top_k: int,
        normalize: bool,
        activation: str,
        round_activations: bool = False,
    ) -> Floats:
        """``plugins.moe_dispatch`` in float32.

        Args:
            forms: of ``gate_up`` and of ``down``.
            x: ``[N, H]``.
            router_logits: ``[N, E]``.
            gate_up: E matrices ``[2I, H]`` in panels.
            down: E matrices ``[H, I]`` in panels.
            intermediate: I.
            top_k: K.
            normalize: whether the chosen weights are divided by their sum.
            activation: a key of ``plugins.activations.ACTIVATIONS``.
            round_activations: whether what is multiplied is rounded.

        Returns:
            ``[N, H]``.
        """
        y = np.full(x.shape, np.nan, np.float32)
        tensors = (x, router_logits, gate_up, down, y)
        params = _MoeDispatch(
            *map(_format, forms),
            rounding(round_activations, *forms),
            ACTIVATIONS[activation].number,
            normalize,
            top_k,
            *x.shape,
            intermediate,
            router_logits.shape[1],
            *(_address(tensor) for tensor in tensors),
        )
        self._check(self._library.ingot_cpu_moe_dispatch(byref(params), byref(self._threads)))
        return y

    def moe_linear(
        self,
        form: Format,
        x: Floats,
        expert_ids: npt.NDArray[np.int64],
        weight: Bytes,
        rows: int,
        experts: int,
        *,
        round_activations: bool = False,
    ) -> Floats:
        """``plugins.moe_linear`` in float32.

        Args:
            form: of the weight.
            x: ``[N, Kin]``, or ``[N, K, Kin]`` with a row per choice.
            expert_ids: ``[N, K]``.
            weight: E matrices ``[rows, Kin]`` in panels.
            rows: outputs.
            experts: E.
            round_activations: whether x is rounded to what products with such a weight may.

        Returns:
            ``[N, K, rows]``.
        """
        y = np.full((*expert_ids.shape, rows), np.nan, np.float32)
        tensors = (x, expert_ids, weight, y)
        params = _MoeLinear(
            _format(form),
            rounding(round_activations, form),
            x.ndim == 3,
            expert_ids.shape[1],
            expert_ids.shape[0],
            x.shape[-1],
            rows,
            experts,
            *(_address(tensor) for tensor in tensors),
        )
        self._check(self._library.ingot_cpu_moe_linear(byref(params), byref(self._threads)))
        return y

    def mamba2_scan(
        self,
        x: Floats,
        dt: Floats,
        a: Floats,
        b: Floats,
        c: Floats,
        d: Floats,
        dt_bias: Floats,
        state: Floats,
        mask: Floats,
        *,
        limits: tuple[float, float] = (0.0, math.inf),
        in_place: bool = False,
    ) -> tuple[Floats, Floats]:
        """``ingot::Mamba2Scan``; arguments and results are the operator's, in its shapes.

        ``limits`` are those of a step. With ``in_place`` the new state is written over the old.
        """
        y = np.full_like(x, np.nan)
        new_state = state if in_place else np.full_like(state, np.nan)
        strides = (x.shape[2] * x.shape[3], x.shape[2], b.shape[2] * b.shape[3])
        sizes = (*x.shape, *b.shape[2:], *strides)
        arrays = (x, dt, a, b, c, d, dt_bias, state, mask, y, new_state)
        params = _Mamba2Scan(*sizes, *limits, *map(_address, arrays))
        self._check(self._library.ingot_cpu_mamba2_scan(byref(params), byref(self._threads)))
        return y, new_state

    def causal_conv(
        self,
        x: Floats,
        state: Floats,
        weight: Floats,
        bias: Floats | None,
        activation: str,
        *,
        in_place: bool = False,
    ) -> tuple[Floats, Floats]:
        """``ingot::CausalConv``; arguments and results as in ``mamba2_scan``."""
        y = np.full_like(x, np.nan)
        new_state = state if in_place else np.full_like(state, np.nan)
        number = ACTIVATIONS[activation].number
        arrays = (x, None, state, weight, bias, y, new_state)
        sizes = (*x.shape, weight.shape[2], x.shape[2])
        params = _CausalConv(number, *sizes, *map(_address, arrays))
        self._check(self._library.ingot_cpu_causal_conv(byref(params), byref(self._threads)))
        return y, new_state

    def mamba2_mixer(
        self,
        projected: Floats,
        mask: Floats,
        states: tuple[Floats, Floats],
        conv: tuple[Floats, Floats | None],
        a: Floats,
        d: Floats,
        dt_bias: Floats,
        *,
        groups: int,
        activation: str = "silu",
        norm: tuple[Floats, int, float] | None = None,
        limits: tuple[float, float] = (0.0, math.inf),
        in_place: bool = False,
    ) -> tuple[Floats, Floats, Floats]:
        """A Mamba2 block between its projections.

        Args:
            projected: ``[B, T, I + C + Hm]``: gate, x with B and C, and dt.
            mask: ``[B, T]``.
            states: of the convolution ``[B, C, W-1]``, and of the scan ``[B, Hm, Pm, Ns]``.
            conv: taps ``[C, 1, W]`` and, or None, the bias ``[C]``.
            a: ``[Hm]``, as are d and dt_bias.
            d: see ``mamba2_scan``.
            dt_bias: see ``mamba2_scan``.
            groups: G.
            activation: of the convolution.
            norm: weight ``[I]``, groups and epsilon of the gated norm; None without one.
            limits: of a step.
            in_place: whether new states are written over the old.

        Returns:
            ``[B, T, I]`` and the new states.
        """
        batch, tokens, _ = projected.shape
        heads, size, of_state = states[1].shape[1:]
        weight, norm_groups, epsilon = norm or (None, 0, 0.0)
        y = np.full((batch, tokens, heads * size), np.nan, np.float32)
        new = states
        if not in_place:
            new = (np.full_like(states[0], np.nan), np.full_like(states[1], np.nan))
        params = _Mamba2Mixer(
            ACTIVATIONS[activation].number,
            *(batch, tokens, heads, size, groups, of_state, conv[0].shape[2]),
            *(norm_groups, epsilon, *limits),
            *map(_address, (projected, mask, *states, *conv, a, d, dt_bias, weight, y, *new)),
        )
        self._check(self._library.ingot_cpu_mamba2_mixer(byref(params), byref(self._threads)))
        return (y, *new)

    def attention(
        self,
        query: Floats,
        key: Floats,
        value: Floats,
        caches: tuple[Floats, Floats],
        visible: npt.NDArray[np.bool_],
        *,
        rotation: tuple[Floats, Floats] | None = None,
        scale: float = 1.0,
        capacity: int | None = None,
    ) -> tuple[Floats, Floats, Floats]:
        """Attention of new tokens over caches and over each other.

        Args:
            query: ``[B, T, Hq, D]``.
            key: ``[B, T, Hk, D]``, as is ``value``.
            value: the new ones.
            caches: keys and values before, ``[B, Hk, C, D]`` of which the first S - T are read.
            visible: ``[B, T, S]``, which keys each token may see.
            rotation: cosines and sines ``[B, T, R/2]`` of the first R numbers of a head.
            scale: of the scores.
            capacity: of new caches; where it is None, those before are written in place.

        Returns:
            ``[B, T, Hq, D]``, and the caches, the new tokens behind the old.
        """
        batch, tokens, heads, size = query.shape
        room = caches[0].shape[2]
        shape = (batch, key.shape[2], capacity or 0, size)
        present = caches
        if capacity is not None:
            present = (np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32))
        y = np.full_like(query, np.nan)
        cos, sin = rotation or (None, None)
        params = _Attention(
            *(batch, tokens, heads, key.shape[2], size),
            *(visible.shape[2] - tokens, room, room if capacity is None else capacity),
            0 if cos is None else 2 * cos.shape[2],
            scale,
            *map(_address, (query, key, value, cos, sin, visible, *caches, *present, y)),
        )
        self._check(self._library.ingot_cpu_attention(byref(params), byref(self._threads)))
        return (y, *present)

    def _run(self, _self: Any, count: int, task: Callable[[Any, int], None], data: Any) -> None:
        if self._pool is None:
            for index in range(count):
                task(data, index)
        else:
            list(self._pool.map(lambda index: task(data, index), range(count)))

    def _check(self, status: int) -> None:
        if status:
            raise LibraryError(self._library.ingot_cpu_last_error().decode())


def _format(form: Format) -> _Format:
    return _Format(NUMBERS[form.numbers], form.block, form.zero_points)


def _address(array: npt.NDArray[Any] | None) -> int | None:
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data
