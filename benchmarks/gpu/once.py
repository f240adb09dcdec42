"""Runs one call of a case for a profiler, after a first one that compiles."""

import argparse

import torch

from adapterkern.bench.cases import MODES, BenchCase
from adapterkern.bench.measure import prepared_call
from adapterkern.bench.providers import PROVIDERS


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--hidden-size", type=int, required=True)
    parser.add_argument("--bottleneck-size", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, default="step")
    parser.add_argument("--dtype", default="bf16")
    chosen = parser.parse_args()
    sizes = chosen.hidden_size, chosen.bottleneck_size, chosen.tokens
    case = BenchCase(*sizes, chosen.dtype, mode=chosen.mode)
    inputs = case.draw("cuda")
    built = PROVIDERS[chosen.backend].build(case, inputs)
    call = prepared_call(built, case, inputs.x, inputs.dy)
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    print(f"ran {case} on {chosen.backend} twice")


if __name__ == "__main__":
    main()
