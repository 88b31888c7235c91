"""A task of a user's own, all of it in one file: which way does something move?"""

from collections import Counter

from vcr1_fast.rewards import last_block
from vcr1_fast.tasks import FieldError, Task, mean_metrics
from vcr1_fast.tasks.base import tagged
from vcr1_fast.tasks.wording import ask

WAYS = ("left", "right", "up", "down")


def check(record):
    if record.answer not in WAYS:
        raise FieldError("answer", f"expected one of {WAYS}, got {record.answer!r}")


def parse(completion, record=None):
    answer = last_block(completion, "answer")
    return answer.strip() if answer and answer.strip() in WAYS else None


def way_reward(completion, record, duration=None, *, think=False):
    return float(parse(completion) == record.answer)


def form_reward(completion, record, duration=None, *, think=False):
    return float(tagged(completion, think, "answer"))


def effort_reward(completion, record, duration=None, *, think=False):
    return len(set(completion)) / 256  # so that a random model's completions differ


def metrics(prediction, record):
    return {"accuracy": float(prediction == record.answer)}


def blind(train, test):
    frequent = Counter(record.answer for record in train).most_common(1)[0][0]
    return {"most frequent way": mean_metrics(metrics(frequent, record) for record in test)}


TASK = Task(
    name="direction",
    check=check,
    wording=ask("Which way does the {thing} move?", "like <answer>left</answer>"),
    fields={"thing": lambda record: record.prompt["thing"]},
    needs=(("thing",),),
    target=lambda record: f"<answer>{record.answer}</answer>",
    parse=parse,
    rewards={"form": form_reward, "way": way_reward, "effort": effort_reward},
    metrics=metrics,
    primary="accuracy",
    blind=blind,
    label=lambda record: record.answer,
)
