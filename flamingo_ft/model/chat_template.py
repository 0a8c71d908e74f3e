"""Fix chat templates whose generation prompt differs from the text they write before answers.

At inference an answer must be prompted with exactly the text that preceded answers in training. Not every
template ensures that: some ignore ``add_generation_prompt``, some open ``<think>`` in the prompt but write no
reasoning before earlier answers, and some write an empty reasoning block before the last answer only. Each
template is tried on short dialogues. If its prompt does not fit, the prompt becomes what the template writes
before its answers, and an empty block that is written before the last answer only is left out, so that all
answers begin alike. A template that drops the reasoning of every answer keeps that of the last one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message

from .compat import render_jinja_template

GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]
Turns = Sequence[Mapping[str, Any]]
# (template, turns) -> text and the spans of its generation marks
Render = Callable[..., tuple[str, list[Span]]]

# TEMPLATE and the other names in capitals are filled in by `_filled`. `{{ '' }}` keeps Jinja from dropping a
# line break at the beginning of the template.
OWN_PROMPT = (
    "{% set flamingo_asks = add_generation_prompt %}{% set add_generation_prompt = false %}{{ '' }}TEMPLATE"
    "{{ OPENING if flamingo_asks else '' }}"
)
# An answer that contains the block as text keeps it.
WITHOUT_BLOCK = (
    "{% set flamingo_text %}{{ '' }}TEMPLATE{{ '' }}{% endset %}"
    "{{ flamingo_text.rsplit(OPENING_AND_BLOCK, 1) | join(OPENING)"
    " if messages and messages[-1]['role'] == 'assistant'"
    " and not (WORDS | select('in', messages[-1]['content'] or '') | list) else flamingo_text }}"
)
# The reasoning of earlier answers is left out, as the model is prompted.
WITH_LAST_REASONING = (
    "{% set flamingo_last = messages[-1]['content'] if messages and messages[-1]['role'] == 'assistant'"
    " and THINK_END in (messages[-1]['content'] or '') else none %}"
    "{% if flamingo_last %}{% set messages = messages[:-1] + [dict(messages[-1], content=MARK)] %}{% endif %}"
    "{% set flamingo_answered %}{{ '' }}TEMPLATE{{ '' }}{% endset %}"
    "{{ flamingo_answered.rsplit(MARK, 1) | join(flamingo_last) if flamingo_last else flamingo_answered }}"
)
THINK_END = "</think>"
REASONED = "<think>\nqzwhy\n</think>\n\nqzsay"


@dataclass(frozen=True)
class AnswerTemplate:
    """A chat template for dialogues and prompts. problem: why it cannot be used for training, if so."""

    text: str
    problem: str | None = None


def answer_template(tokenizer: PreTrainedTokenizerBase, template: str) -> AnswerTemplate:
    """Return ``template`` itself if its prompts fit its answers, otherwise a corrected one."""
    return _answer_template(template, json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str))


def render(
    template: str,
    special_tokens: Mapping[str, Any],
    turns: Turns,
    marked: bool = False,
    add_generation_prompt: bool = False,
) -> tuple[str, list[Span]]:
    """Render a dialogue with a chat template; with ``marked``, also return the spans of its generation marks.

    transformers' own mask of assistant tokens is not used: it misses the last bytes of a span that ends in a
    character of several tokens. Raises UserError for a dialogue that the template rejects.
    """
    try:
        texts, spans = render_jinja_template(
            conversations=[[dict(turn) for turn in turns]],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except (TemplateError, TypeError) as error:  # TypeError: the template only takes content as typed blocks
        problem = error_message(error, None)
        raise UserError(
            f"chat template: refuses the dialogue ({problem}); change its roles or the template, "
            "or set data.template to flamingo"
        ) from None
    return texts[0], cast("list[Span]", spans[0]) if marked else []


def is_marked(template: str) -> bool:
    """Return whether the template marks what the assistant generates."""
    return GENERATION_MARK.search(template) is not None


# --- trying a template ---


@dataclass(frozen=True)
class _Answer:
    """An answer in a rendered dialogue.

    Attributes:
        prompt: the dialogue before the answer, with a generation prompt; None if the template rejects it.
        asked: the same without a generation prompt.
        lead: the rendered text before the answer.
        loss_start: index in ``lead`` where the text that is in the loss begins.
    """

    prompt: str | None
    asked: str | None
    lead: str
    loss_start: int

    @property
    def gap(self) -> str | None:
        """The text between prompt and answer, "" if it is only white space.

        None if the dialogue does not start with the prompt, or if there is no prompt.
        """
        if self.prompt is None or not self.lead.startswith(self.prompt):
            return None
        gap = self.lead[len(self.prompt) : self.loss_start]
        return gap if gap.strip() else ""

    @property
    def opening(self) -> str | None:
        """The text between question and answer, which would be the right prompt.

        Spaces before an answer belong to the answer: with most tokenizers they are part of its first token.
        """
        if self.asked is None or not self.lead.startswith(self.asked):
            return None
        return self.lead[len(self.asked) : self.loss_start].rstrip(" ")


@lru_cache(maxsize=32)
def _answer_template(template: str, special_tokens: str) -> AnswerTemplate:
    rendered: Render = partial(render, special_tokens=json.loads(special_tokens))
    dialogues = _dialogues(template, rendered)
    if isinstance(dialogues, str):
        return AnswerTemplate(template, dialogues)
    answers = partial(_answers, rendered, dialogues)
    if not answers(template) and _leaves_out(rendered(template, turns=dialogues[0])[0], dialogues[0]):
        return AnswerTemplate(template, "leaves out the assistant's answers")
    for candidate in (template, *_candidates(template, answers)):
        if _fits(answers(candidate)):
            return AnswerTemplate(_with_last_reasoning(candidate, rendered, dialogues[0]))
    return AnswerTemplate(template, "has a generation prompt that differs from the text before its answers")


def _dialogues(template: str, rendered: Render) -> list[Turns] | str:
    """Return dialogues of one and of two turns that the template accepts, or why it accepts none."""
    refusal = ""
    for system in ([], [{"role": "system", "content": "qzrole"}]):
        tried: list[Turns] = []
        for count in (1, 2):
            turns = [*system]
            for number in range(count):
                turns.append({"role": "user", "content": f"qzask{number}"})
                turns.append({"role": "assistant", "content": f"qzsay{number}"})
            try:
                rendered(template, turns=turns)
            except UserError as error:
                refusal = refusal or str(error).removeprefix("chat template: ").partition("; ")[0]
            else:
                tried.append(turns)
        if tried:
            return tried
    return refusal


def _answers(rendered: Render, dialogues: Sequence[Turns], template: str) -> list[_Answer]:
    """Return the answers of each dialogue that appear unchanged in its text, in order."""
    answers = []
    for turns in dialogues:
        text, marks = rendered(template, turns=turns, marked=is_marked(template))
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant" and text.count(turn["content"]) == 1:
                begin = text.index(turn["content"])
                loss_start = max((start for start, _ in marks if start <= begin), default=begin)
                prompt = _written(rendered, template, turns[:index], add_generation_prompt=True)
                asked = _written(rendered, template, turns[:index])
                answers.append(_Answer(prompt, asked, text[:begin], loss_start))
    return answers


def _written(rendered: Render, template: str, turns: Turns, **options: bool) -> str | None:
    try:
        return rendered(template, turns=turns, **options)[0]
    except UserError:
        return None


def _leaves_out(text: str, turns: Turns) -> bool:
    """Return whether the text lacks the last turn, upper and lower case ignored."""
    return turns[-1]["content"].lower() not in text.lower()


def _fits(answers: Sequence[_Answer]) -> bool:
    return all(answer.gap == "" for answer in answers)


def _candidates(template: str, answers: Callable[[str], list[_Answer]]) -> Iterator[str]:
    """Yield corrected templates: with another prompt, without the last answer's block, and with both changes.

    The prompt that fits an earlier answer comes first: it is how answers are written in the turns after them.
    """
    first = answers(template)
    if not is_marked(template):
        yield from _without_block(template, first)
    for opening in dict.fromkeys(answer.opening for answer in (*first[1:2], *first[:1], *first[-1:])):
        if opening is not None:
            prompted = _filled(OWN_PROMPT, template, OPENING=opening)
            yield prompted
            if not is_marked(template):
                yield from _without_block(prompted, answers(prompted))


def _without_block(template: str, answers: Sequence[_Answer]) -> Iterator[str]:
    """Yield the template without the reasoning block that it adds to the last answer only."""
    last = answers[-1]
    if not last.gap or last.prompt is None or last.asked is None or not last.prompt.startswith(last.asked):
        return
    if any(answer.gap == "" for answer in answers):
        opening = last.prompt[len(last.asked) :]
        yield _filled(
            WITHOUT_BLOCK,
            template,
            OPENING_AND_BLOCK=opening + last.gap,
            OPENING=opening,
            WORDS=last.gap.split(),
        )


def _with_last_reasoning(template: str, rendered: Render, dialogue: Turns) -> str:
    """Return the template, changed to keep the last answer's reasoning if it drops that."""
    reasoned = [*dialogue[:-1], {**dialogue[-1], "content": REASONED}]
    text = _written(rendered, template, reasoned)
    if is_marked(template) or text is None or "qzwhy" in text:
        return template
    return _filled(WITH_LAST_REASONING, template, THINK_END=THINK_END, MARK="qzlast")


def _filled(wrapper: str, template: str, **values: Any) -> str:
    """Return the wrapper with the template and the values filled in.

    Jinja drops a template's last line break, so it is removed before something is appended.
    """
    names = re.compile("|".join(sorted(["TEMPLATE", *values], key=len, reverse=True)))
    body = template.removesuffix("\n")
    return names.sub(lambda name: body if name[0] == "TEMPLATE" else jinja_literal(values[name[0]]), wrapper)


def jinja_literal(value: str | list[str]) -> str:
    """Return strings as Jinja source.

    Braces and percent signs are escaped, since they could begin or end Jinja blocks.
    """
    source = json.dumps(value, ensure_ascii=False)
    return source.replace("{", "\\x7b").replace("}", "\\x7d").replace("%", "\\x25")
