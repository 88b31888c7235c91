"""Text to be read off the video: 1 minus the word error rate."""

from vcr1_fast.rewards.text import word_accuracy
from vcr1_fast.tasks.blind import most_common
from vcr1_fast.tasks.single_answer import SingleAnswer, each, stripped

TASK = SingleAnswer(
    name="ocr",
    field="question",
    answer_format="with the text alone, like <answer>no entry</answer>",
    metric="word_accuracy",
    read=stripped,
    write=str,
    similarity=each(word_accuracy),
    typical=most_common,
    example="no entry",
).task()
