"""Numbers to be approximated, such as distances: mean relative accuracy."""

from statistics import median

from vcr1_fast.rewards.text import parse_number, relative_accuracy
from vcr1_fast.tasks.record import is_number
from vcr1_fast.tasks.single_answer import SingleAnswer, each
from vcr1_fast.tasks.written import number_text

TASK = SingleAnswer(
    name="regression",
    field="question",
    answer_format="with the number alone, like <answer>2.5</answer>",
    metric="MRA",
    read=parse_number,
    write=number_text,
    similarity=each(relative_accuracy),
    typical=median,
    example=2.5,
    is_answer=is_number,
    expected="a number",
).task()
