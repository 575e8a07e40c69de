"""A chat becomes the very text that transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ingot.runtime.chat import ChatError, chat_text

MESSAGES = [
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
}


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


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(tmp_path: Path, name: str, own_file: bool) -> None:
    _write(tmp_path, TEMPLATES[name], own_file=own_file)
    make: Any = PreTrainedTokenizerFast
    oracle = make(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    want = oracle.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )
    found = chat_text(tmp_path, MESSAGES)
    assert found == want
    assert "1 > 0" in found and "quotes" in found


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
    ],
)
def test_refuses_what_a_template_may_not_do(tmp_path: Path, template: str) -> None:
    _write(tmp_path, template)
    with pytest.raises(ChatError, match="refuses these messages"):
        chat_text(tmp_path, MESSAGES)


def test_refuses_a_damaged_config(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ChatError, match="not valid JSON"):
        chat_text(tmp_path, MESSAGES)
