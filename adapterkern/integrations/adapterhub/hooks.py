"""Whether calling a module does more than its class says: hooks, or a forward of its own."""

from torch import nn
from torch.nn.modules import module as torch_module


def any_hooked(modules: tuple[nn.Module, ...]) -> bool:
    """Whether something happens where one of these is called that its own forward does not say."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        state = module.__dict__
        if (
            state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or "forward" in state
        ):
            return True
    return False
