"""`vcr1 parity`: what somebody's vLLM or SGLang server makes of a clip, beside the trainer's view.

The server is asked as a user asks it: chat completions (the OpenAI form) with the clip's file, its
own decoding, frames and preprocessing. Compared are the prompt's token ids, the number of vision
tokens, and the log-probs of the answer's tokens under our forward pass; a difference is explained
by the causes of `parity.py`.
"""

import base64
import json
import mimetypes
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vcr1_fast.engines.parity import Forward, Gap, Probe, causes
from vcr1_fast.model.forward import prompt_features
from vcr1_fast.model.prompt import Prompt
from vcr1_fast.model.wrapping import unwrap


@dataclass(frozen=True)
class Reply:
    """A server's answer. prompt: its token ids, None where it does not give them; prompt_tokens:
    how many it says it read; tokens, logprobs: of the answer, one for one."""

    prompt: list[int] | None
    prompt_tokens: int
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Row:
    """A line of the table: what is compared, ours, theirs, and whether they agree (None: cannot be
    told)."""

    what: str
    ours: str
    theirs: str
    agree: bool | None


def ask(url: str, clip: Path, question: str, tokens: int) -> Reply:
    """Ask the server greedily about a clip, whose file goes along; frames are of the server's
    choice (vLLM: `--media-io-kwargs`). OSError or ValueError names the address."""
    kind = mimetypes.guess_type(clip.name)[0] or "video/mp4"
    data = base64.b64encode(clip.read_bytes()).decode()
    base = url.rstrip("/").removesuffix("/v1")
    body: dict[str, Any] = {
        "model": _json(f"{base}/v1/models")["data"][0]["id"],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": question},
                    {"type": "video_url", "video_url": {"url": f"data:{kind};base64,{data}"}},
                ],
            }
        ],
        "temperature": 0,
        "max_tokens": tokens,
        "logprobs": True,
        # vLLM's names; SGLang takes the last one.
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    address = f"{base}/v1/chat/completions"
    answer = _json(address, body)
    choice = answer["choices"][0]
    content = (choice.get("logprobs") or {}).get("content")
    if not content:
        raise ValueError(f"{address}: the answer holds no log-probs")
    ids = choice.get("token_ids")
    if ids is None:
        ids = [_token_id(one["token"], address) for one in content]
    prompt = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    return Reply(
        prompt,
        int(answer["usage"]["prompt_tokens"]),
        list(ids)[: len(content)],
        [one["logprob"] for one in content],
    )


def compare(forward: Forward, prompt: Prompt, reply: Reply, limit: float) -> list[Row]:
    """The table's lines. limit: largest gap of a token's log-prob that counts as agreement."""
    model: Any = unwrap(forward.model)
    rows = [_token_row(prompt, reply), _vision_row(prompt, reply)]
    with torch.no_grad():
        (features,) = prompt_features(model, [prompt])
    probe = Probe("the clip", prompt, features)
    completion = [torch.tensor(reply.tokens)]
    theirs = torch.tensor(reply.logprobs)
    ours = forward.logps(probe, completion, full=True)
    gap = Gap.of(theirs, ours)
    rows.append(Row("log-probs of the answer", *_pair(ours, theirs), gap.max <= limit))
    rows.append(Row("", str(gap), f"limit {limit:g}", None))
    worst = int((theirs - ours).abs().argmax())
    at = f"token {worst + 1} of the answer ({reply.tokens[worst]})"
    rows.append(Row(f"furthest: {at}", f"{ours[worst]:.4f}", f"{theirs[worst]:.4f}", None))
    for cause, other in causes(forward, probe):
        found = Gap.of(theirs, forward.logps(other, completion, full=True))
        # A cause counts where it explains the gap, not where it merely comes nearer.
        explains = gap.max > limit and found.max <= max(limit, gap.max / 10)
        said = "explains the gap" if explains else ""
        rows.append(Row(f"if {cause}", f"max gap {found.max:.2g}", said, None))
    return rows


def _pair(ours: Tensor, theirs: Tensor) -> tuple[str, str]:
    return f"sum {float(ours.sum()):.4f}", f"sum {float(theirs.sum()):.4f}"


def _token_row(prompt: Prompt, reply: Reply) -> Row:
    ours = prompt.input_ids.tolist()
    if reply.prompt is None:
        same = None if reply.prompt_tokens == len(ours) else False
        return Row("prompt tokens", str(len(ours)), f"{reply.prompt_tokens}, ids not given", same)
    pairs = enumerate(zip(ours, reply.prompt, strict=False))
    shorter = min(len(ours), len(reply.prompt))
    first = next((i for i, (a, b) in pairs if a != b), shorter)
    if first == len(ours) == len(reply.prompt):
        return Row("prompt tokens", str(len(ours)), f"{len(ours)}, all equal", True)
    return Row(
        f"prompt tokens (first difference at {first})",
        f"{len(ours)}: {_around(ours, first)}",
        f"{len(reply.prompt)}: {_around(reply.prompt, first)}",
        False,
    )


def _around(tokens: Sequence[int], place: int) -> str:
    return " ".join(map(str, tokens[max(0, place - 2) : place + 3]))


def _vision_row(prompt: Prompt, reply: Reply) -> Row:
    own = set(prompt.input_ids[prompt.is_vision].tolist())
    count = int(prompt.is_vision.sum())
    if reply.prompt is None:
        # Text is the same on both sides, or the first line says that it is not.
        theirs = count + reply.prompt_tokens - len(prompt)
        return Row("vision tokens", str(count), f"{theirs}, if the text is the same", None)
    theirs = sum(token in own for token in reply.prompt)
    return Row("vision tokens", str(count), str(theirs), theirs == count)


def _token_id(token: str, address: str) -> int:
    number = token.removeprefix("token_id:")
    if not token.startswith("token_id:") or not number.isdigit():
        raise ValueError(f"{address}: the answer's log-probs name {token!r}, not a token id")
    return int(number)


def _json(address: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())
        raise ConnectionError(f"{address}: {error.code} {said[:500]}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise ConnectionError(f"{address}: {getattr(error, 'reason', error)}") from error
