"""A chat becomes the very text that transformers makes of it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ingot.runtime import chat_worker
from ingot.runtime.chat import ChatError, chat_text

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Two lines:\n  1 > 0"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": 'And "quotes"?'},
]
# Shapes of templates on the hub: OLMoE-Instruct's, Granite's, and one that uses most features.
TEMPLATES = {
    "olmoe": (
        "{{ bos_token }}{% for message in messages %}\n{% if message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + '\n' }}\n"
        "{% elif message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + '\n' }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}\n{% endif %}\n"
        "{% endfor %}"
    ),
    "granite": (
        "{%- if messages[0]['role'] == 'system' -%}\n"
        "    {%- set system_message = messages[0]['content'] -%}\n"
        "    {%- set loop_messages = messages[1:] -%}\n{%- endif -%}\n"
        "{{ '<|start_of_role|>system<|end_of_role|>' + system_message + eos_token }}\n"
        "    {%- for message in loop_messages %}\n"
        "    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' }}\n"
        "    {{- message['content'] }}\n"
        "    {%- if loop.last and add_generation_prompt %}\n"
        "{{- '<|start_of_role|>assistant<|end_of_role|>' }}\n    {%- endif %}\n  {%- endfor %}"
    ),
    "features": (
        "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
        "  {{ message | tojson }}{{ message.content | trim | tojson(indent=2) }}\n{% endfor %}"
    ),
    # Mistral's and Codestral's: roles must alternate, and tools stand before the last question.
    "mistral": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0].content %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}"
        "{%- endif %}\n{%- if not tools is defined %}{%- set tools = none %}{%- endif %}\n"
        "{{- bos_token }}{%- set ns = namespace(index=0) %}{%- for message in loop_messages %}\n"
        "{%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}"
        "{{- raise_exception('roles must alternate') }}{%- endif %}\n"
        "{%- set ns.index = ns.index + 1 %}{%- if message['role'] == 'user' %}\n"
        "{%- if tools is not none and loop.last %}{{- '[AVAILABLE_TOOLS] [' }}"
        "{%- for tool in tools %}{%- set tool = tool.function %}"
        '{{- \'{"type": "function", "function": {\' }}'
        "{%- for key, val in tool.items() if key != 'return' %}"
        "{%- if val is string %}{{- '\"' + key + '\": \"' + val + '\"' }}"
        "{%- else %}{{- '\"' + key + '\": ' + val|tojson }}{%- endif %}"
        "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- '}}' }}"
        "{%- endfor %}{{- ']' }}{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{{- '[INST] ' + message['content'] + '[/INST]' }}"
        "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
    ),
    # Granite 3.3's: a date, tools, documents and controls in a system message of its own.
    "granite 3.3": (
        "{%- if messages[0].role == 'system' %}{%- set system_message = messages[0].content %}"
        "{%- set loop_messages = messages[1:] %}{%- else %}"
        "{%- set system_message = 'Today is ' + strftime_now('%B %d, %Y') + '.' %}"
        "{%- if tools and documents %}{%- set system_message = system_message + ' Both.' %}"
        "{%- elif tools %}{%- set system_message = system_message + ' Tools.' %}"
        "{%- elif thinking %}{%- set system_message = system_message + ' Think.' %}{%- endif %}"
        "{%- if 'citations' in controls and documents %}"
        "{%- set system_message = system_message + ' Cite.' %}{%- endif %}"
        "{%- set loop_messages = messages %}{%- endif %}\n"
        "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}\n"
        "{%- if tools %}{{- '<|start_of_role|>available_tools<|end_of_role|>' }}"
        "{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}{%- endif %}\n"
        "{%- if documents %}{%- for document in documents %}"
        "{{- '<|start_of_role|>document {\"id\": \"' + document['doc_id'] | string + '\"}' }}"
        "{{- '<|end_of_role|>\\n' + document['text'] + '<|end_of_text|>\\n' }}"
        "{%- endfor %}{%- endif %}\n"
        "{%- for message in loop_messages %}"
        "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}"
        "{{- '<|end_of_text|>\\n' }}"
        "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}"
        "{%- if controls %}{{- ' ' + controls | tojson }}{%- endif %}"
        "{{- '<|end_of_role|>' }}{%- endif %}{%- endfor %}"
    ),
    # What trainers write: the span that is learned, with a scope of its own.
    "generation": (
        "{% set a = 1 %}{% for message in messages %}{% if message.role == 'assistant' %}\n"
        "{% generation %}{% set a = 2 %}{{ message.content + eos_token }}{% endgeneration %}\n"
        "{%- generation -%}  {{ a }} {%- endgeneration -%}"
        "{% else %}[{{ message.role }}]{{ message.content }}{% break %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% generation %}{{ m.content }}{{ loop.index }}{% endgeneration %}"
        "{% endfor %}{{ a }}"
    ),
    "json": (
        "{{ messages | tojson(ensure_ascii=true) }}{{ messages[0] | tojson(sort_keys=True) }}"
        "{{ messages | tojson(separators=(',', ':')) }}{{ tools | tojson(indent=2) }}"
        "{{ {'b': [1, 2.5, none, true], 'a': '<&>\u00e9'} | tojson(true, 1, (', ', ': '), true) }}"
    ),
    "absent": (
        "{{ tools is defined }}{{ tools is none }}{{ documents is defined }}{{ documents is none }}"
        "{{ tools | tojson }}{{ documents | tojson }}{{ pad_token is defined }}{{ builtin_tools }}"
        "{{ dict(a=1) }}{{ dict([['b', 2]]).b }}{{ dict.fromkeys([1, 2]) }}"
        "{{ namespace(self=5).self }}"
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.type }}:{{ part.text }}{% endfor %}{% endif %}"
        "{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.tool_calls }}{{ 'tool_calls' in m }}\r\n"
        "{% endfor %}"
    ),
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Of a "place" & <time>, caf\u00e9.',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
]
DOCUMENTS = [{"doc_id": 7, "title": "One", "text": "First."}, {"doc_id": "b", "text": "Second."}]
PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]},
    {"role": "assistant", "content": "", "tool_calls": None, "thinking": "Hm", "name": None},
    {"role": "assistant", "content": "So.", "reasoning": "R", "tool_calls": [{"id": "1", "a": 2}]},
    {"role": "tool", "content": "5", "reasoning_content": "both", "thinking": "old"},
]


def _write(folder: Path, template: Any, *, own_file: bool = False) -> None:
    config: dict[str, Any] = {
        "bos_token": {"content": "<s>", "lstrip": False, "special": True},
        "eos_token": "</s>",
    }
    if own_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _oracle() -> Any:
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a child does, here: so many interpreters would take long."""

    def ask(_worker: Path, request: Any, **_limits: int) -> Any:
        return chat_worker.answer(json.loads(json.dumps(request)))

    monkeypatch.setattr("ingot.runtime.chat.ask", ask)


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("name", ["olmoe", "granite", "features"])
def test_renders_as_transformers_does(tmp_path: Path, name: str, own_file: bool) -> None:
    _write(tmp_path, TEMPLATES[name], own_file=own_file)
    want = _oracle().apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    found = chat_text(tmp_path, MESSAGES)
    assert found == want
    assert "1 > 0" in found and "quotes" in found


GIVEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": TOOLS},
    "documents": {"documents": DOCUMENTS},
    "all": {
        "tools": TOOLS,
        "documents": DOCUMENTS,
        "controls": {"citations": True},
        "thinking": True,
        "bos_token": "<other>",
    },
    "none of them": {"tools": [], "documents": []},
}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", TEMPLATES)
def test_hands_on_what_transformers_does(
    tmp_path: Path, name: str, given: str, add_generation_prompt: bool
) -> None:
    _write(tmp_path, TEMPLATES[name])
    more = {**GIVEN[given], "add_generation_prompt": add_generation_prompt}
    for messages in (MESSAGES, MESSAGES[1:], MESSAGES[3:], PARTS if name == "parts" else MESSAGES):
        try:
            want = _oracle().apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, **more
            )
        except UndefinedError:
            # Granite's older one has no system message to begin with.
            with pytest.raises(UndefinedError):
                chat_text(tmp_path, messages, **more)
        else:
            assert chat_text(tmp_path, messages, **more) == want


def test_takes_special_tokens_from_every_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ image_token }}")
    config: dict[str, Any] = {"eos_token": "<old>", "image_token": "<image>", "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens))
    assert chat_text(tmp_path, MESSAGES) == "<s></s><image>"
    # Where the newer field is, the older file does not count.
    config["added_tokens_decoder"] = {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert chat_text(tmp_path, MESSAGES) == "<old><image>"


@pytest.mark.usefixtures("in_process")
def test_takes_the_template_that_transformers_takes(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "granite"}')

    def same(*, tools: bool) -> str:
        oracle = AutoTokenizer.from_pretrained(tmp_path)
        given: dict[str, Any] = {"tools": TOOLS} if tools else {}
        found = chat_text(tmp_path, MESSAGES, **given)
        want = oracle.apply_chat_template(MESSAGES, tokenize=False, **given)
        assert found == want
        return found

    assert (same(tools=False), same(tools=True)) == ("plain", "tools")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("rag")
    with pytest.raises(ChatError, match="no chat template for this chat, only 'rag'"):
        chat_text(tmp_path, MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("of the\r\nfile\n")
    assert (same(tools=False), same(tools=True)) == ("of the\nfile", "of the\nfile")
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tools of a file")
    assert (same(tools=False), same(tools=True)) == ("of the\nfile", "tools of a file")


def test_takes_the_default_of_several_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    _write(tmp_path, named)
    assert chat_text(tmp_path, MESSAGES) == "yes"


def test_refuses_a_model_without_a_template(tmp_path: Path) -> None:
    with pytest.raises(ChatError, match=r"has no chat template.*give --prompt"):
        chat_text(tmp_path, MESSAGES)
    _write(tmp_path, [{"name": "tool_use", "template": "no"}])
    with pytest.raises(ChatError, match="has no chat template"):
        chat_text(tmp_path, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        # What a sandbox is for: a template comes with a checkpoint from the hub.
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0]['name'] + 1 }}",
        "{{ 'a' + messages | length }}",
        "{{ messages[0].content.x.y }}",
        "{{ namespace(_a=1) }}",
        "{{ 1 / 0 }}",
        "{{ 10 ** 5000 }}",
        "{% include '/etc/hostname' %}",
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = [n.l] %}{% endfor %}"
        "{{ n.l }}",
        "{{ raise_exception(messages) }}",
        "{{ messages | tojson(indent={}) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ '%09999999999d' % 1 }}",
        "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
        "{{ raise_exception('a\n' * 99999) }}",
        "{{ raise_exception('\x1b[31m\ud800'.encode) }}",
    ],
)
def test_refuses_what_a_template_may_not_do(tmp_path: Path, template: str) -> None:
    _write(tmp_path, template)
    with pytest.raises(ChatError, match="refuses these messages: ") as error:
        chat_text(tmp_path, MESSAGES)
    said = str(error.value)
    assert len(said) < 500 and all(character.isprintable() for character in said)


def test_ends_a_template_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingot.runtime.chat.SECONDS", 1)
    long = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for template in (long, "{{ lipsum(n=99999) }}"):
        _write(tmp_path, template)
        with pytest.raises(ChatError, match=r"refuses these messages: takes more than \d second"):
            chat_text(tmp_path, MESSAGES)


def test_a_template_sees_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox of the bound of pyproject.toml holds, and a child has nothing to give away."""
    monkeypatch.setenv("INGOT_SECRET", "s3cret")
    environ = "__globals__['__builtins__']['__import__']('os').environ['INGOT_SECRET']"
    for template in (
        # CVE-2025-27516, of Jinja2 before 3.1.6.
        "{{ ('{0.__init__.__globals__}' | attr('format'))(raise_exception) }}",
        "{{ raise_exception." + environ + " }}",
        "{{ ''['format']('{0}', self) }}{{ cycler.__init__." + environ + " }}",
        "{{ ['{0.__globals__}'] | map('format', strftime_now) | list }}",
    ):
        _write(tmp_path, template)
        with suppress(ChatError):
            assert "s3cret" not in chat_text(tmp_path, MESSAGES)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hello",
        ["hello"],
        [None],
        [[{"role": "user", "content": "a chat of a batch"}]],
        [{"role": "user", "content": {1, 2}}],
        [{"role": "user", "content": object()}],
        [{("role",): "user"}],
    ],
)
def test_refuses_what_are_no_messages(tmp_path: Path, messages: Any) -> None:
    _write(tmp_path, "{{ messages }}")
    with pytest.raises(ChatError):
        chat_text(tmp_path, messages)
    with pytest.raises(ChatError):
        chat_text(tmp_path, MESSAGES, tools=messages or [1])


@pytest.mark.parametrize("found", [5, {"default": 5}, [5], [{"name": "x"}], [], {}, True])
def test_refuses_a_template_of_another_kind(tmp_path: Path, found: Any) -> None:
    _write(tmp_path, found)
    with pytest.raises(ChatError, match="has no chat template"):
        chat_text(tmp_path, MESSAGES)


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"a" * (2 << 20)])
def test_refuses_a_file_that_is_no_template(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(raw)
    with pytest.raises(ChatError, match=r"chat_template\.jinja"):
        chat_text(tmp_path, MESSAGES)


def test_renders_in_several_threads_at_once(tmp_path: Path) -> None:
    _write(tmp_path, "{{ messages[0].content }}{{ strftime_now('%Y') | length }}")
    with ThreadPoolExecutor(4) as pool:
        said = pool.map(lambda n: chat_text(tmp_path, [{"role": "u", "content": n}]), range(8))
    assert list(said) == [f"{n}4" for n in range(8)]


def test_refuses_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ChatError, match="not valid JSON"):
        chat_text(tmp_path, MESSAGES)
