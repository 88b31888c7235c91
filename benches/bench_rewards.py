"""Scoring a step's completions beside the released per-completion rewards, in Python.

Ours scores what the trainer scores: format, IoU and metrics of each completion, one parse each,
with the spans of the batch in one call of the IoU op. The baseline is what the peers' trainers run:
VideoChat-R1's format and IoU rewards, one function call and one scan a completion, without metrics
(`rewards/legacy.py`, whose patterns take linear time; the released ones are slower).

Bytes: the completions' text read once.
"""

import random

from harness import Bench, arguments

from vcr1_fast.rewards import legacy
from vcr1_fast.tasks import TASKS
from vcr1_fast.tasks.record import Record

REASON = (
    "<think>The event begins at <timestep>{start} to {end}</timestep> when the person walks to the "
    "door and opens it.</think>\n<answer>{start} to {end}</answer>"
)


def samples(count: int) -> tuple[list[str], list[Record], list[float]]:
    """Completions of groups of 8, their records and the clips' seconds."""
    random.seed(0)
    texts, records, durations = [], [], []
    for i in range(count):
        if i % 8 == 0:
            duration = random.uniform(20, 60)
            start, end = sorted(round(random.uniform(0, duration), 1) for _ in range(2))
            task = "temporal_grounding"
            record = Record(str(i), task, "v.mp4", {"event": "x"}, [start, end + 0.1])
        start, end = sorted(random.uniform(0, duration) for _ in range(2))
        texts.append(REASON.format(start=f"{start:.2f}", end=f"{end:.2f}"))
        records.append(record)
        durations.append(duration)
    return texts, records, durations


def bench_grounding(bench: Bench, count: int) -> None:
    texts, records, durations = samples(count)
    task, released = TASKS["temporal_grounding"], legacy.REWARDS["temporal_grounding"]

    def ours() -> None:
        answers = task.answers(texts, records)
        task.score_batch(answers, records, durations, think=True)
        task.measure([answer.prediction for answer in answers], records)

    def per_completion() -> None:
        for reward in released.values():
            for text, record in zip(texts, records, strict=True):
                reward(text, record.answer)

    bench.run(
        "temporal_grounding rewards",
        f"{count}",
        "float64",
        {"released": per_completion, "ours": ours},
        sum(map(len, texts)),
        limit="read",
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    with Bench("rewards", **vars(args)) as bench:
        for count in (256, 4096):
            bench_grounding(bench, count)


if __name__ == "__main__":
    main()
