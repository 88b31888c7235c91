"""Numbers that are right or wrong, such as counts: equal to two decimals."""

from vcr1_fast.rewards.text import parse_number
from vcr1_fast.tasks.record import is_number
from vcr1_fast.tasks.single import Single, most_common
from vcr1_fast.tasks.written import number_text

TASK = Single(
    name="numeric",
    field="question",
    how="with the number alone, like <answer>3</answer>",
    measure="accuracy",
    read=parse_number,
    show=number_text,
    nearness=lambda prediction, answer: float(abs(prediction - answer) < 0.005),
    typical=most_common,
    fits=is_number,
    expected="a number",
).task()
