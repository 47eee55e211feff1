"""Chat templates that do what the named models' own do where they differ: generation prompt, thinking, tool calls.

Written for these tests, after the published templates; system prompts and much else is left out.
"""

from __future__ import annotations

# V2 and its chat models: words instead of control tokens, no tools.
DEEPSEEK_V2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# R1 and its distillations: always thinks; arguments are joined as a string, and calls are written only where the
# content is null.
DEEPSEEK_R1 = (
    "{% set ns = namespace(is_tool=false, is_first=true) %}{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
    "{% if message['role'] == 'user' %}{% set ns.is_tool = false %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' and message['content'] is none %}"
    "{{ '<｜Assistant｜><｜tool▁calls▁begin｜>' }}"
    "{% for tool in message['tool_calls'] %}"
    "{{ '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n```json\n'"
    " + tool['function']['arguments'] + '\n```<｜tool▁call▁end｜>' }}"
    "{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if message['role'] == 'assistant' and message['content'] is not none %}"
    "{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if message['role'] == 'tool' %}{% set ns.is_tool = true %}"
    "{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)

# V3: R1's, which knows no reasoning.
DEEPSEEK_V3 = DEEPSEEK_R1.replace("<think>\n", "").replace(".split('</think>')[-1]", "")

# V3.1: `thinking`, off by default, and a tag that is closed at once where it is off.
DEEPSEEK_V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}"
    "{% if message['role'] == 'assistant' and message['tool_calls'] is defined and message['tool_calls'] is not none %}"
    "{{ '<｜Assistant｜></think>' }}{% if message['content'] is not none %}{{ message['content'] }}{% endif %}"
    "{{ '<｜tool▁calls▁begin｜>' }}"
    "{% for tool in message['tool_calls'] %}"
    "{{ '<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments']"
    " + '<｜tool▁call▁end｜>' }}"
    "{% endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if message['role'] == 'assistant' and (message['tool_calls'] is not defined"
    " or message['tool_calls'] is none) %}"
    "{{ '<｜Assistant｜></think>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] == 'user' %}"
    "{{ '<｜Assistant｜>' }}{% if thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}{% endif %}"
)

_TURN = "{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
_TOOL_CALLS = (
    "{% for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + tool_call.name + '\", \"arguments\": ' }}ARGUMENTS{{ '}\n</tool_call>' }}"
    "{% endfor %}"
)
_CHAT = "{% for message in messages %}" + _TURN + _TOOL_CALLS + "{{ '<|im_end|>\n' }}{% endfor %}"
_START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}THINKING{% endif %}"

# Qwen 2.5: arguments as an object, or they are quoted twice.
QWEN25 = (_CHAT + _START).replace("ARGUMENTS", "{{ tool_call.arguments | tojson }}").replace("THINKING", "")

# Qwen 3: both; `enable_thinking` false opens and closes the tag.
QWEN3 = (
    (_CHAT + _START)
    .replace(
        "ARGUMENTS",
        "{% if tool_call.arguments is string %}{{ tool_call.arguments }}"
        "{% else %}{{ tool_call.arguments | tojson }}{% endif %}",
    )
    .replace(
        "THINKING",
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    )
)

# Hermes 2 Pro: the arguments first, and a tool's answer must have the tool's name.
HERMES = (
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if message.name is not defined %}{{ raise_exception('a tool response needs a name') }}{% endif %}"
    '{{ \'<tool_response>\n{"name": "\' + message.name + \'", "content": \' + message.content | tojson'
    " + '}\n</tool_response>' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'<tool_call>\n{"arguments": \' + call.function.arguments | tojson + \', "name": "\' + call.function.name'
    " + '\"}\n</tool_call>' }}"
    "{% else %}{{ message.content }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
)

# Qwen3-Coder walks through the arguments: no JSON at all.
QWEN3_CODER = (
    "{% for message in messages %}{{ message.role + ': ' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}"
    "{% for key, value in call.function.arguments | items %}"
    "{{ '<parameter=' + key + '>\n' }}{{ value }}{{ '\n</parameter>\n' }}{% endfor %}"
    "{{ '</function>\n</tool_call>' }}{% endfor %}{% endfor %}"
)

# Neither reasoning nor tools.
PLAIN = "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
