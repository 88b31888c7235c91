"""Questions with an answer in free words, scored by ROUGE."""

from vcr1_fast.rewards.text import rouge
from vcr1_fast.tasks.blind import most_common
from vcr1_fast.tasks.single_answer import SingleAnswer, each, stripped

TASK = SingleAnswer(
    name="open_ended",
    field="question",
    answer_format="in a short text, like <answer>the man pours water into a glass</answer>",
    metric="ROUGE",
    read=stripped,
    write=str,
    similarity=each(rouge),
    typical=most_common,
    example="the man pours water into a glass",
).task()
