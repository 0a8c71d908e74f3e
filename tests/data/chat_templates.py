"""Chat templates like well-known ones, each with the text that has loss for an answer."""

from __future__ import annotations

from .dialogues import CHATML, LLAMA_2, VICUNA

EACH = "{% for m in messages %}"
REFUSE_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
NO_PROMPT = CHATML.replace(PROMPT, "")
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
HEADERS = (
    "{{ bos_token }}{{ '[system]\n\nToday: ' + strftime_now('%d %b %Y') + '[end]' }}"
    + EACH
    + "{{ '[' + m.role + ']\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
TURNS = (
    REFUSE_SYSTEM + "{{ bos_token }}" + EACH + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}" + EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}"
    "{% endfor %}"
)
# The system message stands in the last question.
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}"
    "{{ '[INST]' + (system + '\n\n' if m is sameas asked[-1] and system else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# Ends the text unless there is a generation prompt.
ENDS_THE_TEXT = (
    EACH + "{{ '[' + m.role + ']\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '[assistant]\n' if add_generation_prompt else '<|endoftext|>' }}"
)
END_AT_LAST = (
    EACH + "{{ m.role + ': ' + m.content + (eos_token if loop.last and m.role == 'assistant' else '\n') }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
LINE_AFTER_END = CHATML.replace("'<|im_end|>\n'", "eos_token + '\n\n'")
PROMPT_WHEN_ASKED = (
    EACH + "{{ m.role + ': ' + m.content + eos_token }}"
    "{% if loop.last and m.role == 'user' %}{{ 'assistant:' }}{% endif %}{% endfor %}"
).replace("m.role + ': '", "(m.role if m.role == 'user' else 'assistant') + ': '")
CHANNELS = (
    EACH + "{{ '<|im_start|>' + m.role }}{% if m.role == 'assistant' %}{{ '[final]' }}{% endif %}"
    "{{ ':' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
# Reasoning in the last turn only; an empty block for an answer without reasoning.
LAST_REASONING = """\
{%- for m in messages %}
    {%- set words = m.content.split('</think>')[-1].lstrip('\\n') %}
    {%- set reasoning = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content %}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<|im_start|>assistant\\n<think>\\n' + (reasoning or '') + '\\n</think>\\n\\n' + words + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + words + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
OPENS_REASONING = LAST_REASONING.replace(
    "    {{- '<|im_start|>assistant\\n' }}", "    {{- '<|im_start|>assistant\\n<think>\\n' }}"
)
NEVER_REASONING = (
    "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}{{ '[User]' + m.content }}{% else %}"
    "{{ '[Assistant]' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[Assistant]<think>\n' }}{% endif %}"
)
# A reasoning block before every answer; an empty one for an answer without reasoning.
EMPTY_REASONING = (
    EACH
    + "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and '</think>' not in m.content %}"
    "{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
MARKED_WITHOUT_PROMPT = (
    EACH + "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)

# Each with the text for an answer, and for the last answer if that differs.
FAMILIES = {
    "chatml": (CHATML, "{}<|im_end|>"),
    "default system prompt": (DEFAULT_SYSTEM, "{}<|im_end|>"),
    "headers, trimmed, with a date": (HEADERS, "{}<|im_end|>"),
    "turns without a system role": (TURNS, "{}<|im_end|>"),
    "llama-2": (LLAMA_2, " {} <|im_end|>"),
    "inst with a bos": (INST, " {}<|im_end|>"),
    "system message in the last question": (SYSTEM_LAST, " {}<|im_end|>"),
    "vicuna": (VICUNA, " {}<|im_end|>"),
    "end of text without a prompt": (ENDS_THE_TEXT, "{}<|im_end|>", "{}<|im_end|>\n<|endoftext|>"),
    "end token after the last answer alone": (END_AT_LAST, " {}", " {}<|im_end|>"),
    "line breaks after the end token": (LINE_AFTER_END, "{}<|im_end|>"),
    "prompt wherever a question is last": (PROMPT_WHEN_ASKED, " {}<|im_end|>"),
    "no generation prompt": (NO_PROMPT, "{}<|im_end|>"),
    "empty reasoning in every turn": (EMPTY_REASONING, "{}<|im_end|>"),
    "no generation prompt, marked": (MARKED_WITHOUT_PROMPT, "{}<|im_end|>"),
    "prompt without the channel": (CHANNELS, "{}<|im_end|>"),
    "reasoning in the last turn alone": (LAST_REASONING, "{}<|im_end|>"),
    "reasoning opened by the prompt": (OPENS_REASONING, "{}<|im_end|>"),
    "reasoning opened by the prompt, and never written": (NEVER_REASONING, "{}<|im_end|>"),
}
