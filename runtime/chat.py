"""A chat as the text a model was trained on: the checkpoint's own template.

Source: transformers' ``apply_chat_template``, whose templates these are. A template is a program:
``chat_worker.py`` renders it, in a sandbox and in a process with limits of time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ingot.export.tokenizer_files import TokenizerFilesError, read_tokenizer_files
from ingot.plugins.child import ChildError, ask
from ingot.plugins.errors import IngotError, install_hint, shown

TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
WORKER = Path(__file__).with_name("chat_worker.py")
# The longest released have 20 kB, and are rendered in milliseconds.
MOST_BYTES = 1 << 20
SECONDS = 4
MEGABYTES = 1024
# The names under which a message's reasoning is passed; templates read the first, or the second.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatError(IngotError):
    """A chat that has no template, or that the template refuses."""


def chat_text(
    folder: Path,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """The prompt of a chat, up to where the model is to answer.

    Args:
        folder: the ingot.
        messages: each with ``role`` (``system``, ``user`` or ``assistant``) and ``content``, and
            what else the template reads; all of it such as JSON can say.
        tools: a JSON schema each, for a template that offers tools.
        documents: each with ``title`` and ``text``, for a template that takes documents.
        add_generation_prompt: end with what begins an answer, where the template has such.
        variables: further ones that the template reads, such as ``thinking=True`` of Granite's.

    Returns:
        Text with the special tokens written out; encode it without adding any.

    Raises:
        IngotError: the ingot has no template, or the template fails on these messages.
    """
    # Here: only a chat needs it.
    if find_spec("jinja2") is None:
        raise ChatError(
            f"jinja2 is missing; install what renders a chat with: {install_hint('chat')}"
        )
    try:
        files = read_tokenizer_files(folder.joinpath)
    except TokenizerFilesError as error:
        raise ChatError(str(error)) from error
    template = _template(folder, files.config, tools)
    given = {
        **{name: str(token) for name, token in files.named.items()},
        **variables,
        "messages": [_message(each) for each in _mappings("messages", messages)],
        "tools": None if tools is None else _mappings("tools", tools),
        "documents": None if documents is None else _mappings("documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    if not given["messages"]:
        raise ChatError("the chat is empty; give at least one message.")
    try:
        text: str = ask(
            WORKER,
            {"template": template, "variables": given},
            seconds=SECONDS,
            megabytes=MEGABYTES,
        )
    except ChildError as error:
        raise ChatError(
            f"the chat template of {folder} refuses these messages: {error}."
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"messages and tools must be what JSON can say: {error}.") from error
    return text


def _mappings(name: str, values: Any) -> list[Mapping[str, Any]]:
    # A text is a sequence, too, of what are no messages.
    found = (
        list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    )
    for each in found:
        if not isinstance(each, Mapping):
            raise ChatError(f"{name} holds {shown(each)}; it must be a list of dictionaries.")
    return found


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it on: without what is None, reasoning by both names."""
    said = {name: value for name, value in message.items() if value is not None}
    reasoning = next((said[name] for name in REASONING if name in said), None)
    if reasoning is not None:
        said = {"thinking": reasoning, **said, "reasoning_content": reasoning}
    return said


def _template(
    folder: Path, config: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] | None
) -> str:
    """The template of a plain chat, or of one with tools; files win over the config, as a whole."""
    found: Any = {path.stem: _read(path) for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        found = {"default": _read(folder / TEMPLATE), **found}
    found = found or config.get("chat_template")
    if isinstance(found, list):
        found = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
    if isinstance(found, dict):
        names = ", ".join(shown(name) for name in found)
        found = found.get("tool_use" if tools is not None and "tool_use" in found else "default")
        if names and found is None:
            raise ChatError(
                f"{folder} has no chat template for this chat, only {names}; give --prompt."
            )
    if not isinstance(found, str):
        raise ChatError(
            f"{folder} has no chat template, as base models have none; give --prompt instead."
        )
    if len(found) > MOST_BYTES:
        raise ChatError(_too_large(folder))
    return found


def _read(path: Path) -> str:
    try:
        # A pipe in its place would be waited for.
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise ChatError(_too_large(path))
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatError(f"{path} cannot be read ({error}); export again.") from error


def _too_large(path: Path) -> str:
    return (
        f"the chat template of {path} is larger than {MOST_BYTES:,} bytes, the most that is read."
    )
