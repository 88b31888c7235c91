"""A user's task in one file, with a new tag: which way does something move?"""

from collections import Counter

from vcr1_fast.tasks import FieldError, Record, Task, ask

WAYS = ("left", "right", "up", "down")


def check(record):
    if record.answer not in WAYS:
        raise FieldError("answer", f"expected one of {WAYS}, got {record.answer!r}")


def read(blocks, record):
    way = blocks.get("way", "").strip()
    return way if way in WAYS else None


def way_reward(predictions, records, durations):
    return [float(way == record.answer) for way, record in zip(predictions, records, strict=True)]


def axis_reward(predictions, records, durations):
    """Whether the answer is on the right axis."""
    axes = {"left": 0, "right": 0, "up": 1, "down": 1, None: 2}
    return [
        float(axes[way] == axes[record.answer])
        for way, record in zip(predictions, records, strict=True)
    ]


def metrics(predictions, records):
    return {"accuracy": way_reward(predictions, records, ())}


def blind_guesses(train, test):
    frequent = Counter(record.answer for record in train).most_common(1)[0][0]
    return {"most frequent way": [frequent] * len(test)}


def effort(completion, record, duration):
    """A user's reward (`rewards.functions`): a random model's completions differ in it."""
    return len(set(completion)) / 256


TASK = Task(
    name="direction",
    check=check,
    prompt_template=ask("Which way does the {thing} move?", "like <way>left</way>"),
    fields={"thing": lambda record: record.prompt["thing"]},
    required_placeholders=(("thing",),),
    target=lambda record: f"<way>{record.answer}</way>",
    read=read,
    tags=("way",),
    rewards={"way": way_reward, "axis": axis_reward},
    batch_metrics=metrics,
    primary="accuracy",
    blind_guesses=blind_guesses,
    example=Record("example", "direction", "example.mp4", {"thing": "circle"}, "left"),
    label=lambda record: record.answer,
)
