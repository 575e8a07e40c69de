"""A chat as the text a model was trained on: the checkpoint's own template, in a sandbox.

Source: transformers' ``apply_chat_template``, whose templates these are: Jinja with trimmed blocks,
``messages``, ``add_generation_prompt``, the special tokens and two functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ingot.plugins.errors import IngotError, install_hint

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"


class ChatError(IngotError):
    """A chat that has no template, or that the template refuses."""


def chat_text(folder: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """The prompt of a chat, up to where the model is to answer.

    Args:
        folder: the ingot.
        messages: each with ``role`` (``system``, ``user`` or ``assistant``) and ``content``.

    Returns:
        Text with the special tokens written out; encode it without adding any.

    Raises:
        ChatError: the ingot has no template, or the template fails on these messages.
    """
    config = _config(folder / CONFIG)
    source = _template(folder, config)
    # Here: only a chat pays for it.
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise ChatError(
            f"{error.name} is missing; install what renders a chat with: {install_hint('chat')}"
        ) from error

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source).render(
            messages=list(messages), add_generation_prompt=True, **_special_tokens(config)
        )
    # A template that expects other fields fails as the Python that it nearly is.
    except (TemplateError, TypeError, ValueError) as error:
        raise ChatError(f"the chat template of {folder} refuses these messages: {error}") from error


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ChatError(f"{path} is not valid JSON ({error}); export again.") from error
    return raw if isinstance(raw, dict) else {}


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        # Several by name; the one for a plain chat is the default.
        found = {each["name"]: each["template"] for each in found}.get("default")
    if not isinstance(found, str):
        raise ChatError(
            f"{folder} has no chat template, as base models have none; give --prompt instead."
        )
    return found


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and so on; a token may be written as text or with its properties."""
    return {
        name: value["content"] if isinstance(value, dict) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON as the templates expect it: jinja2's own filter escapes HTML's characters."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
