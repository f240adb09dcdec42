"""Attention without a mask, so that models run flash attention as they do in use.

Where no mask is given, transformers still builds one: a dense causal mask for input that is already
embedded, and for BERT a mask of ones whose every forward asks the GPU whether it is one. A dense
mask keeps `scaled_dot_product_attention` from its flash kernel, which hides an adapter's share of
the time, and the question cannot be captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

NAME = "sdpa_without_mask"


def leave_masks_out(model: nn.Module) -> None:
    """Let a model of transformers, 4.57 or later, build no attention mask; it is causal as before.

    No mask function is registered under NAME, for which its mask builders give None.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(NAME, sdpa_attention_forward)
    some: Any = model
    some.config._attn_implementation = NAME
    if hasattr(some, "attn_implementation"):  # transformers 4's BERT, which builds its own
        some.attn_implementation = NAME
        some.get_extended_attention_mask = lambda *_arguments, **_options: None


class MaskedError(RuntimeError):
    """Attention was given a mask."""


class RefuseMasks(TorchFunctionMode):
    """Within it, attention with a mask raises, whatever this version of a library does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            mask = options.get("attn_mask", args[3] if len(args) > 3 else None)
            if mask is not None:
                raise MaskedError(
                    f"attention got a mask of {list(mask.shape)}, which keeps it from its flash "
                    "kernel, so this model's times would understate what adapters add"
                )
        return func(*args, **options)
