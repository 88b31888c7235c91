"""Lets torchvision's Python half import on a CPU build of torch, for processors of transformers.

PyPI's torchvision links CUDA. On a CPU build its operators do not load, and the import ends where
it registers a fake kernel for one of them. `make test-engines` puts this file and a .pth that
imports it into vLLM's environment: the operators are declared before torchvision is imported.
"""

import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    """Finds nothing; the first search for torchvision declares the operators."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision" or DeclareOperators.library is not None:
            return
        import torch

        if torch.version.cuda is None:
            DeclareOperators.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                DeclareOperators.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )


sys.meta_path.insert(0, DeclareOperators())
