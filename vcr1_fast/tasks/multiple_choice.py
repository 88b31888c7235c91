"""Multiple choice: a question about the video with lettered options. Answer: the letter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from string import ascii_uppercase

from vcr1_fast.rewards import strict
from vcr1_fast.tasks.base import Metrics, Task, mean_metrics
from vcr1_fast.tasks.record import Record, check_letter, check_prompt
from vcr1_fast.tasks.wording import ask


def _lettered(record: Record) -> list[str]:
    return [
        f"({letter}) {option}"
        for letter, option in zip(ascii_uppercase, record.options, strict=False)
    ]


FIELDS = {
    "question": lambda record: record.prompt["question"].strip(),
    "options": lambda record: " ".join(_lettered(record)),
    "option_lines": lambda record: "\n".join(_lettered(record)),
    "option_list": lambda record: str(_lettered(record)),  # as VideoChat-R1 shows them
}
NEEDS = (("question",), ("options", "option_lines", "option_list"))


def check(record: Record) -> None:
    """`prompt["question"]`; 2 to 26 `options`; `answer` the letter of one."""
    check_prompt(record, "question")
    check_letter("answer", record.answer, record.options)


def target(record: Record) -> str:
    return f"<answer>{record.answer}</answer>"


def parse(completion: str, record: Record | None = None) -> str | None:
    return strict.read_letter(completion, record.options if record else ())


def format_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the tags asked for around one readable letter, else 0."""
    return strict.letter_format(completion, record.options, think)


def accuracy_reward(
    completion: str, record: Record, duration: float | None = None, *, think: bool = False
) -> float:
    """1 for the right letter, else 0."""
    return strict.letter_accuracy(completion, record.answer, record.options)


def metrics(prediction: str | None, record: Record) -> Metrics:
    return {"accuracy": float(prediction == record.answer)}


def blind(train: Sequence[Record], test: Sequence[Record]) -> dict[str, Metrics]:
    strategies = blind_letters(train, test, lambda record: record.answer)
    return {name: mean_metrics(map(metrics, letters, test)) for name, letters in strategies.items()}


def blind_letters(
    train: Sequence[Record], test: Sequence[Record], letter_of: Callable[[Record], str]
) -> dict[str, list[str]]:
    """Per strategy, one letter for each test record: the letter most often right in `train`, and
    the option whose text was right most often among the times it was offered. A record that is in
    `train` too does not vote for its own option."""
    counts = Counter(letter_of(record) for record in train)
    frequent = min(counts, key=lambda letter: (-counts[letter], letter)) if counts else "A"
    offered = Counter(option for record in train for option in record.options)
    right = Counter(
        record.options[ascii_uppercase.index(letter_of(record))]
        for record in train
        if ascii_uppercase.index(letter_of(record)) < len(record.options)
    )

    known = {record.id for record in train}

    def likeliest(record: Record) -> str:
        own = record.options[ascii_uppercase.index(letter_of(record))]
        votes = record.id in known
        rates = [
            (right[option] - (votes and option == own)) / max(offered[option] - votes, 1)
            for option in record.options
        ]
        return ascii_uppercase[rates.index(max(rates))] if rates else frequent

    return {
        "most frequent letter": [frequent] * len(test),
        "likeliest option": [likeliest(record) for record in test],
    }


TASK = Task(
    name="multiple_choice",
    check=check,
    wording=ask("{question} {options}", "with the letter, like <answer>B</answer>"),
    fields=FIELDS,
    needs=NEEDS,
    target=target,
    parse=parse,
    rewards={"format": format_reward, "accuracy": accuracy_reward},
    metrics=metrics,
    primary="accuracy",
    blind=blind,
    label=lambda record: record.answer,
)
