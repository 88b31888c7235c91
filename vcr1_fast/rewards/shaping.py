"""Terms added to a task's own rewards: length, repetition, and the use of the order of frames.

Each is a separate column, off unless configured, and reads lengths and scores, not answers.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\S+")


def soft_overlong(length: int, limit: int, buffer: int) -> float:
    """0 for a completion of up to limit - buffer tokens, falling to -1 at `limit`, -1 beyond:
    (limit - buffer - length) / buffer in between [DAPO, arXiv 2503.14476, equation 13].

    ValueError unless 0 < buffer <= limit.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"expected 0 < buffer <= limit, got {buffer} and {limit}")
    return -min(1.0, max(0, length - (limit - buffer)) / buffer)


def length_bonuses(
    lengths: Sequence[int],
    accuracies: Sequence[float],
    *,
    bonus: float = 0.2,
    band: tuple[int, int] = (320, 512),
    threshold: float = 0.1,
) -> list[float]:
    """`bonus` for each completion of a group that is right (its accuracy above `threshold`) and
    whose tokens lie in `band`, both ends included; 0 for all where fewer than two are right
    [Video-R1, arXiv 2503.21776, and its trainer]."""
    right = [accuracy > threshold for accuracy in accuracies]
    several = sum(right) > 1
    return [
        bonus if several and good and band[0] <= length <= band[1] else 0.0
        for length, good in zip(lengths, right, strict=True)
    ]


def repetition(text: str, ngram: int = 3) -> float:
    """-(1 - distinct / all) over the runs of `ngram` words of the text, in lower case: 0 when none
    repeats, near -1 when one is said all along; 0 for a text without such a run [the n-gram penalty
    of Demystifying Long CoT, arXiv 2502.03373, in Open-R1's linear form]."""
    words = _WORD.findall(text.lower())
    runs = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
    return len(set(runs)) / len(runs) - 1.0 if runs else 0.0


def temporal_bonuses(
    accuracies: Sequence[float],
    shuffled: Sequence[float],
    *,
    bonus: float = 0.3,
    ratio: float = 0.8,
    threshold: float = 0.1,
) -> list[float]:
    """T-GRPO's term for one group: `bonus` for each completion that is right (its accuracy above
    `threshold`), if the mean accuracy is at least `ratio` times that of completions sampled on the
    same clip with its frames shuffled; else 0 [Video-R1, arXiv 2503.21776, and its trainer].

    accuracies (G,), shuffled (G',) of at least one completion, both as the task scores them.
    """
    if not accuracies or not shuffled:
        raise ValueError(
            f"expected scores of both kinds, got {len(accuracies)} and {len(shuffled)} shuffled"
        )
    ordered, mixed = (sum(some) / len(some) for some in (accuracies, shuffled))
    ahead = ordered >= ratio * mixed
    return [bonus if ahead and accuracy > threshold else 0.0 for accuracy in accuracies]
