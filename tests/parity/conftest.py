# SPDX-License-Identifier: Apache-2.0
"""Lets timm be imported beside PyTorch's CPU build."""

import torch

try:
    import torchvision
except RuntimeError:
    # PyPI's torchvision is built for CUDA; beside a CPU build its operators are absent,
    # and it only imports if those that it decorates are declared. No test calls them.
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float limit) -> Tensor")
    import torchvision  # noqa: F401
