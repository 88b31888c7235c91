"""Questions to be answered with yes or no."""

from vcr1_fast.rewards.text import parse_boolean
from vcr1_fast.tasks.base import equal
from vcr1_fast.tasks.blind import most_common
from vcr1_fast.tasks.single_answer import SingleAnswer

TASK = SingleAnswer(
    name="boolean",
    field="question",
    answer_format="with yes or no, like <answer>yes</answer>",
    metric="accuracy",
    read=parse_boolean,
    write=lambda answer: "yes" if answer else "no",
    similarity=equal,
    typical=most_common,
    example=True,
    is_answer=lambda answer: isinstance(answer, bool),
    expected="true or false",
).task()
