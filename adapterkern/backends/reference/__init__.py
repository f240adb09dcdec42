"""The plain PyTorch backend: runs everywhere, and is what the other backends are measured against."""
