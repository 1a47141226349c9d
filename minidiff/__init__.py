"""minidiff: text-to-image diffusion, written out from scratch."""

from minidiff import ops  # noqa: F401  (attaches the operators to Tensor)
from minidiff.backend import kernels, load_compiled
from minidiff.tensor import Tensor, no_grad

__version__ = "0.1.0"
__all__ = ["Tensor", "kernels", "no_grad"]

load_compiled()
