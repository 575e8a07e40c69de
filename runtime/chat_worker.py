"""Renders a chat template, in the child process of ``plugins.child``.

Source: transformers' ``render_jinja_template``, for whose environment templates are written.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# A prompt of a million tokens is some megabytes.
MOST_CHARACTERS = 32 << 20


def answer(request: dict[str, Any]) -> str:
    """The text of ``template`` over ``variables``."""
    pieces: list[str] = []
    room = MOST_CHARACTERS
    template = _environment().from_string(request["template"])
    for piece in template.generate(**request["variables"]):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            raise TemplateError(f"it writes more than {MOST_CHARACTERS:,} characters")
    return "".join(pieces)


class _Generation(Extension):
    """``{% generation %}``, around what a model is to learn to say, changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as in transformers: what is set inside is not seen outside.
        call = self.call_method("_as_it_is")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        text: str = caller()
        return text


class _Dict:
    """``dict``, without the attributes of a class."""

    def __call__(self, *args: Any, **more: Any) -> dict[Any, Any]:
        return dict(*args, **more)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """``namespace``, without attributes of Python's own."""

    # Jinja's signature: a template may name an attribute `self`.
    def __init__(*args: Any, **more: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **more)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may have no {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates expect it: Jinja's own filter escapes HTML's characters."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
