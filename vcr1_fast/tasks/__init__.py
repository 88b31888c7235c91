"""Tasks by name. A new one is one file here and one line below, or `register` from anywhere."""

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
from vcr1_fast.tasks.base import Metrics, Reward, Task, mean_metrics
from vcr1_fast.tasks.record import FieldError, Record
from vcr1_fast.tasks.wording import check_wording

TASKS: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make a task known to records, training and evaluation. ValueError for a name that is taken,
    or a prompt that does not fit the task's own fields and tags."""
    if task.name in TASKS:
        raise ValueError(f"there is a task {task.name!r} already")
    check_wording(task)
    TASKS[task.name] = task
    return task


for _module in (
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
):
    register(_module.TASK)

__all__ = [
    "TASKS",
    "FieldError",
    "Metrics",
    "Record",
    "Reward",
    "Task",
    "mean_metrics",
    "register",
]
