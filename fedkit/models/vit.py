"""torchvision's vision transformer, in a form that can be narrow (``fedkit.models.slicing``).

torchvision's own code writes its width into a view of what the patches give; here that is as wide as what
comes. The numbers are the same. Imported by ``vision.vit`` alone, since torchvision need not be there.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torchvision.models import VisionTransformer


class SliceableVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """A ``VisionTransformer`` that says which tensors of its own follow the width."""

    sliced: ClassVar = {"class_token": (2,)}

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.encoder.sliced = {"pos_embedding": (2,)}

    def _process_input(self, x: Tensor) -> Tensor:
        """Images (B x C x H x W) -> patches (B x H' W' x width)."""
        patches: Tensor = self.conv_proj(x)
        return patches.flatten(2).transpose(1, 2)
