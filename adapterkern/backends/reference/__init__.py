"""The plain PyTorch backend: runs everywhere, and every other one is measured against it."""
