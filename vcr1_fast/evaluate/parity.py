"""`vcr1 parity`: print how an endpoint's view of a clip compares with training's."""

from argparse import Namespace
from pathlib import Path

from vcr1_fast.data.sampling import FrameConfig
from vcr1_fast.data.video import read_clip
from vcr1_fast.engines.endpoint import Row, ask, compare
from vcr1_fast.engines.parity import (
    LIMITS,
    REDUCED_LIMIT,
    Forward,
    ParityError,
    check_parity,
)
from vcr1_fast.engines.vllm_server import VllmServer
from vcr1_fast.model.checkpoint import load, policy_weights
from vcr1_fast.model.forward import lm_head
from vcr1_fast.model.rollout import SamplingConfig
from vcr1_fast.report.table import Table, print_table


def main_parity(options: Namespace) -> int:
    """Print the table; exit status 1 where anything differs."""
    model, processor = load(options.model, dtype=options.dtype)
    frames = processor.frames
    if options.frames is not None:
        frames = FrameConfig(num_frames=options.frames)
    processor = processor.with_frames(frames)
    clip = read_clip(options.clip, frames, backend="pyav", fit=processor.fit())
    prompt = processor.prompt(options.question, [clip])
    limit = options.limit or LIMITS.get(lm_head(model)[0].dtype, REDUCED_LIMIT)
    forward = Forward(model, processor, SamplingConfig(max_new_tokens=options.tokens))
    given = ask(options.endpoint, Path(options.clip), options.question, options.tokens)
    rows = compare(forward, prompt, given, limit)
    if options.change_weights:
        with VllmServer(model, processor, options.endpoint) as server:
            server.sync(policy_weights(model), 0)
            try:
                gap = check_parity(
                    server,
                    forward,
                    [prompt],
                    limit=limit,
                    sync=lambda version: server.sync(policy_weights(model), version),
                )
                rows.append(Row("with our features, before and after a change", f"{gap}", "", True))
            except ParityError as error:
                server.sync(policy_weights(model), 0)
                rows.append(Row("before and after a change", str(error), "", False))
    words = {True: "yes", False: "NO", None: ""}
    print_table(
        Table(
            ("compared", "training", "endpoint", "agree"),
            [[row.what, row.ours, row.theirs, words[row.agree]] for row in rows],
            title=f"{options.endpoint} beside {options.model}",
            left=frozenset({0, 1, 2, 3}),
        )
    )
    return int(any(row.agree is False for row in rows))
