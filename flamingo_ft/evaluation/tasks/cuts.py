"""Where a generated answer ends: after it, a model may write another demonstration.

The rules are those of OpenFlamingo's evaluation (github.com/mlfoundations/open_flamingo, open_flamingo/eval:
coco_metric.py, vqa_metric.py).
"""

from __future__ import annotations

import re

_NEXT_QUESTION = re.compile("Question|Answer|Short")


def cut_caption(text: str) -> str:
    """Return a generated caption up to the next "Output", without double quotes."""
    return text.partition("Output")[0].replace('"', "").strip()


def cut_short_answer(text: str) -> str:
    """Return a generated answer up to the next word of the prompt and up to the first ", "."""
    return _NEXT_QUESTION.split(text, maxsplit=1)[0].partition(", ")[0].strip()
