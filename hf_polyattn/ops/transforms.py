"""Whether a call is differentiated in forward mode, or transformed by torch.func: only the definition can be.

The other forms have a backward pass of their own, which torch.func cannot transform, and no forward-mode derivative:
tangents would be dropped without a word.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

# both names are private, and the public ways cost a decoding step microseconds: where a torch lacks the first, its own
# errors stay; where it lacks the second, every tensor is asked
_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_transformed(*tensors: torch.Tensor | None) -> bool:
    """Inside of torch.func's grad, vmap, jvp and so on; or one of the tensors is dual."""
    if _transforms_are_active():
        return True
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
