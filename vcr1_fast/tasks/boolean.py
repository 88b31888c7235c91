"""Questions to be answered by yes or no."""

from vcr1_fast.rewards.text import parse_boolean
from vcr1_fast.tasks.single import Single, most_common

TASK = Single(
    name="boolean",
    field="question",
    how="with yes or no, like <answer>yes</answer>",
    measure="accuracy",
    read=parse_boolean,
    show=lambda answer: "yes" if answer else "no",
    nearness=lambda prediction, answer: float(prediction == answer),
    typical=most_common,
    fits=lambda answer: isinstance(answer, bool),
    expected="true or false",
).task()
