"""Tasks by name. A built-in task is one file here and two lines below; any other is a `Task` that
the user's code gives to `register`."""

from vcr1_fast.tasks import (
    boolean,
    caption,
    classification,
    grounded_qa,
    image_grounded_qa,
    moment_retrieval,
    multiple_choice,
    numeric,
    ocr,
    open_ended,
    regression,
    spatial_grounding,
    spatio_temporal_grounding,
    temporal_grounding,
    tracking,
)
from vcr1_fast.tasks.base import Answer, Columns, Judged, Metrics, Reward, Task, check_task
from vcr1_fast.tasks.prompt_template import ask
from vcr1_fast.tasks.record import FieldError, Record

# The tests check the built-in tasks as `register` does: here the check would import torch, for the
# IoU ops, into data workers and `vcr1 --help`.
TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        temporal_grounding,
        tracking,
        grounded_qa,
        multiple_choice,
        classification,
        caption,
        spatial_grounding,
        image_grounded_qa,
        moment_retrieval,
        spatio_temporal_grounding,
        numeric,
        regression,
        boolean,
        ocr,
        open_ended,
    )
}


def register(task: Task) -> Task:
    """Make a task known to records, training and evaluation.

    ValueError for a name that is taken, and for a task that cannot work: its prompts do not fit its
    fields and tags, or its own target of its example is not parsed or does not earn 1.
    """
    if task.name in TASKS:
        raise ValueError(f"there is a task {task.name!r} already")
    check_task(task)
    TASKS[task.name] = task
    return task


__all__ = [
    "TASKS",
    "Answer",
    "Columns",
    "FieldError",
    "Judged",
    "Metrics",
    "Record",
    "Reward",
    "Task",
    "ask",
    "register",
]
