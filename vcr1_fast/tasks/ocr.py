"""Text to be read off the video: 1 less the word error rate."""

from vcr1_fast.rewards.text import word_accuracy
from vcr1_fast.tasks.single import Single, most_common

TASK = Single(
    name="ocr",
    field="question",
    how="with the text alone, like <answer>no entry</answer>",
    measure="word_accuracy",
    read=lambda text: text.strip() or None,
    show=str,
    nearness=word_accuracy,
    typical=most_common,
).task()
