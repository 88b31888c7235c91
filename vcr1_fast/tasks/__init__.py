"""Tasks by name. A new one is one file here and one line below."""

from vcr1_fast.tasks import (
    boolean,
    caption,
    classification,
    grounded_qa,
    multiple_choice,
    numeric,
    ocr,
    open_ended,
    regression,
    spatial_grounding,
    temporal_grounding,
    tracking,
)
from vcr1_fast.tasks.base import Judged, Metrics, Reward, Task, mean_metrics

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        temporal_grounding.TASK,
        tracking.TASK,
        grounded_qa.TASK,
        multiple_choice.TASK,
        classification.TASK,
        caption.TASK,
        spatial_grounding.TASK,
        numeric.TASK,
        regression.TASK,
        boolean.TASK,
        ocr.TASK,
        open_ended.TASK,
    )
}

__all__ = ["TASKS", "Judged", "Metrics", "Reward", "Task", "mean_metrics"]
