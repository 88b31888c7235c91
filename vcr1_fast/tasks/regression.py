"""Numbers to be met as nearly as possible, such as distances: mean relative accuracy."""

from statistics import median

from vcr1_fast.rewards.text import parse_number, relative_accuracy
from vcr1_fast.tasks.record import is_number
from vcr1_fast.tasks.single import Single
from vcr1_fast.tasks.written import number_text

TASK = Single(
    name="regression",
    field="question",
    how="with the number alone, like <answer>2.5</answer>",
    measure="MRA",
    read=parse_number,
    show=number_text,
    nearness=relative_accuracy,
    typical=median,
    fits=is_number,
    expected="a number",
).task()
