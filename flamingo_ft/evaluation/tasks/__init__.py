"""Standard evaluation sets, read from their published files: one small file each.

Its docstring states the format and the source, ``TASK.files`` what the folder of the files must contain, in
any of its subfolders. Files and images of training rows are read for demonstrations only. To add a task,
write such a file and list it in ``registry.py``; `task.Task` explains the fields.
"""

from .demonstrations import (
    count_demonstrations,
    draw_demonstrations,
    draw_eval_rows,
    nearest_demonstrations,
    with_shuffled_answers,
)
from .images import check_images
from .prompts import chat_prompt, few_shot_prompt
from .registry import TASKS, find_task
from .task import Example, Task

__all__ = [
    "TASKS",
    "Example",
    "Task",
    "chat_prompt",
    "check_images",
    "count_demonstrations",
    "draw_demonstrations",
    "draw_eval_rows",
    "few_shot_prompt",
    "find_task",
    "nearest_demonstrations",
    "with_shuffled_answers",
]
