"""Peak memory of a training step on a GPU. On a CPU it is unknown: what the process holds at its
peak is mostly torch and the texts, the same under every method."""

import torch


def reset_peak(device: torch.device) -> None:
    """Start a new high-water mark of the allocator."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The allocator's high-water mark in bytes, None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
