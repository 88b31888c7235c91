"""Questions with an answer in free words, scored by ROUGE."""

from vcr1_fast.rewards.text import rouge
from vcr1_fast.tasks.single import Single, most_common

TASK = Single(
    name="open_ended",
    field="question",
    how="in a short text, like <answer>the man pours water into a glass</answer>",
    measure="ROUGE",
    read=lambda text: text.strip() or None,
    show=str,
    nearness=rouge,
    typical=most_common,
).task()
