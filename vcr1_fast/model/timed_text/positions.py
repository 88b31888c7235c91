"""Three-axis rotary positions (M-RoPE) of prompts in which times are text.

Every token has a (time, height, width) position. Text counts up by one on all three axes together.
Time is given as text, not by positions: each temporal patch of a clip is a separate block, in which
the merged patch in row y and column x has, after text that ended at position s - 1,

    time = s,  height = s + y,  width = s + x

and the text after it resumes at s + max(rows, columns). An image is one such block.

Source: `get_rope_index` of the families' models in transformers, the same in all releases from 4.57
on. So there is one convention, and `mrope` changes nothing.
"""

from itertools import groupby

import torch
from torch import Tensor

from vcr1_fast.model.prompt import IMAGE, VIDEO


def mrope_positions(types: Tensor, videos: Tensor, images: Tensor, *, merge: int = 2) -> Tensor:
    """Positions of one prompt.

    Args:
        types: (P,) int64 `mm_token_type_ids`: 0 text, 1 image, 2 video.
        videos: (n, 3) patches along time, height and width of each clip, in prompt order.
        images: (m, 3), the same for images.
        merge: side, in patches, of the square that makes one token.

    Returns:
        (3, P) int64.

    Raises:
        ValueError: where the vision tokens and the grids do not match.
    """
    # A clip is as many runs of tokens as it has temporal patches.
    left = {
        IMAGE: [(h, w) for _, h, w in images.tolist()],
        VIDEO: [(h, w) for t, h, w in videos.tolist() for _ in range(t)],
    }
    parts: list[Tensor] = []
    position = 0
    for kind, run in groupby(types.tolist()):
        length = len(list(run))
        if kind == 0:
            parts.append(torch.arange(position, position + length).expand(3, -1))
            position += length
            continue
        if not left[kind]:
            raise ValueError("the prompt has more runs of vision tokens than the grids given")
        height, width = (side // merge for side in left[kind].pop(0))
        if height * width != length:
            raise ValueError(
                f"a run of {length} vision tokens, but its grid merged by {merge} has "
                f"{height} x {width}"
            )
        block = torch.full((3, height, width), position)
        block[1] += torch.arange(height)[:, None]
        block[2] += torch.arange(width)
        parts.append(block.flatten(1))
        position += max(height, width)
    missing = sum(map(len, left.values()))
    if missing:
        raise ValueError(f"the prompt has no vision tokens for {missing} temporal patches")
    return torch.cat(parts, dim=1) if parts else torch.zeros(3, 0, dtype=torch.int64)
