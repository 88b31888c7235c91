"""Numbers that are right or wrong, such as counts: equal to two decimals."""

from vcr1_fast.rewards.text import parse_number
from vcr1_fast.tasks.blind import most_common
from vcr1_fast.tasks.record import is_number
from vcr1_fast.tasks.single_answer import SingleAnswer, each
from vcr1_fast.tasks.written import number_text

TASK = SingleAnswer(
    name="numeric",
    field="question",
    answer_format="with the number alone, like <answer>3</answer>",
    metric="accuracy",
    read=parse_number,
    write=number_text,
    similarity=each(lambda prediction, answer: float(abs(prediction - answer) < 0.005)),
    typical=most_common,
    example=3,
    is_answer=is_number,
    expected="a number",
).task()
