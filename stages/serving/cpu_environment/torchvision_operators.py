"""Lets a torchvision be imported whose compiled part was built for another torch.

vLLM and transformers import torchvision for image transforms, which are plain torch. But its package registers fakes
for operators that the compiled part would have defined, and stops when there are none. This module, which
the environment's .pth file imports at start-up, defines them just before torchvision is imported, and not earlier,
because it needs torch. Calling one stays an error.
"""

import importlib.abc
import sys

KEEP = []  # a definition lives as long as its library object
OPERATORS = ("nms", "qnms")  # those that torchvision registers a fake for at import


class DefineOperators(importlib.abc.MetaPathFinder):
    """Finds nothing itself; sees the import of torchvision come."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            KEEP.append(library)


sys.meta_path.insert(0, DefineOperators())
