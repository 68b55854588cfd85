"""Chat templates render as `transformers` renders them, in a sandbox."""

from __future__ import annotations

from typing import Any

import pytest

from nybble.errors import InvalidRequest
from nybble.text.template import ChatTemplate
from support_engine import TEMPLATE

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": "  1 + 1?\n"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "sure?"},
]
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RICH = """
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.role == 'assistant' %}
{% generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}
{{ message | tojson }} {{ '-' * 3 }} {{ loop.index % 2 }}
    {%- endif %}
{%- endfor %}
{{ ns.count }}{{ bos_token }}
"""


@pytest.mark.parametrize("source", [TEMPLATE, SMOLLM, RICH], ids=["tiny", "smollm", "rich"])
@pytest.mark.parametrize("prompt", [False, True], ids=["closed", "open"])
def test_renders_as_transformers_does(source: str, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[MESSAGES], chat_template=source, add_generation_prompt=prompt, bos_token="<s>"
    )
    assert (
        ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES, add_generation_prompt=prompt)
        == rendered[0][0]
    )


def test_continued_message_ends_where_it_ends() -> None:
    template = ChatTemplate(TEMPLATE, {"bos_token": ""})
    said = [*MESSAGES, {"role": "assistant", "content": "2 "}]
    text = template.render(said, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\n2 ")
    assert said[-1]["content"] == "2 ", "the caller's messages are left alone"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 300000000 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
        "{{ messages[0].content.nothing.here }}",
        "{{ 1 / 0 }}",
    ],
    ids=["raises", "class", "subclasses", "mutation", "repeat", "power", "endless", "undefined", "division"],
)
def test_failing_template_is_an_invalid_request(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render(MESSAGES)
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 300


def test_allowed_variables_reach_the_template() -> None:
    kwargs: dict[str, Any] = {"enable_thinking": False}
    assert ChatTemplate("{{ enable_thinking }}", {}).render(MESSAGES, kwargs=kwargs) == "False"
