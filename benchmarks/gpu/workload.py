"""The measurements and checks of the stages, the most important first."""

from collections.abc import Sequence
from typing import Any

from adapterkern.bench.cases import BenchCase
from benchmarks.gpu.measuring import Task

QUICK = ("plain", "adapterhub", "addmm", "cublaslt", "lora", "limit")
COMPILED = (*QUICK, "compile")
WITH_NORM = ("separate", "plain", "adapterhub", "no-adapter", "limit")
OF_MANY = ("single", "loop", "lora-mixed", "routing", "limit")
FEW_TOKENS_SECONDS = 2.5


def adapter(
    hidden: int,
    bottleneck: int,
    tokens: int,
    mode: str = "forward",
    dtype: str = "bf16",
    activation: str = "gelu",
    *,
    seconds: float,
    baselines: Sequence[str] = QUICK,
    norm: str = "none",
    adapters: int = 0,
    mix: str = "even",
    **more: Any,
) -> Task:
    """Return the task of one adapter on every backend beside the baselines. With few tokens a graph
    holds hundreds of calls, whose capture takes time.
    """
    case: dict[str, Any] = {
        "hidden_size": hidden,
        "bottleneck_size": bottleneck,
        "tokens": tokens,
        "dtype": dtype,
        "activation": activation,
        "mode": mode,
        "norm": norm,
        "adapters": adapters,
        "mix": mix,
    }
    name = str(BenchCase(**case))
    if more.get("tf32"):  # nvmath's products of float32 are never TF32
        baselines = [name for name in baselines if name != "cublaslt"]
    request = {"do": "adapter", "case": case, "baselines": list(baselines), **more}
    return Task(" ".join([name, *more]), seconds + FEW_TOKENS_SECONDS * (tokens < 1024), request)


def compiled(*sizes: Any, seconds: float) -> Task:
    """Return an adapter's task with torch.compile among the baselines."""
    return adapter(*sizes, seconds=seconds, baselines=COMPILED)


def normed(*sizes: Any, seconds: float, norm: str = "layer") -> Task:
    """Return an adapter's task with the norm behind it in the same pass."""
    return adapter(*sizes, seconds=seconds, baselines=WITH_NORM, norm=norm)


def mixed(
    hidden: int, bottleneck: int, adapters: int, rows: int, mode: str = "forward",
    mix: str = "even", *, seconds: float,
) -> Task:  # fmt: skip
    """Return the task of many adapters in one batch, with so many tokens each."""
    return adapter(
        *(hidden, bottleneck, adapters * rows, mode),
        seconds=seconds, baselines=OF_MANY, adapters=adapters, mix=mix,
    )  # fmt: skip


def model(spec: str, mode: str, execution: str, seconds: float = 7.5) -> Task:
    """Return the task of a whole model in every variant."""
    request = {"do": "model", "spec": spec, "mode": mode, "execution": execution}
    return Task(f"{spec} {mode} {execution}", seconds, request)


CALIBRATE = Task("calibrate", 8, {"do": "calibrate"})
CALIBRATE_AGAIN = Task("calibrate again", 3, {"do": "calibrate again"})

_BASE, _WIDE = (1024, 64), (4096, 64)
VERIFIED = tuple(
    adapter(*sizes, seconds=5)  # on an H200: 1.2 to 3.5, and the first 12.7
    for sizes in (
        *((*_BASE, 16384, mode) for mode in ("forward", "backward", "step")),
        *((*shape, 16, "forward") for shape in (_BASE, _WIDE)),
        *((*_BASE, 2048, mode) for mode in ("forward", "step")),
        *((*_WIDE, 16384, mode) for mode in ("forward", "backward", "step")),
        (*_WIDE, 2048, "forward"),
        *((8192, 128, 16384, mode) for mode in ("forward", "step")),
        (4096, 256, 16384, "forward"),
    )
) + tuple(normed(*_BASE, 16384, mode, seconds=6) for mode in ("forward", "step"))
VERIFIED_MANY = tuple(
    mixed(*sizes, seconds=5)
    for sizes in ((*_BASE, 16, 128), (*_WIDE, 64, 1), (*_BASE, 16, 128, "step"))
)
VERIFIED_COMPILED = tuple(
    compiled(*sizes, seconds=21)
    for sizes in (
        *((*_BASE, 16384, mode) for mode in ("forward", "step")),
        (*_WIDE, 16384, "forward"),
    )
)
# Ten are timed with torch.compile, whose ratios the README shows.
COMPARED = tuple(
    compiled(*sizes, seconds=9)  # on an H200: 5.2
    for sizes in (
        *((*_BASE, 16384, mode) for mode in ("forward", "step")),
        *((*_WIDE, 16384, mode) for mode in ("forward", "step")),
        *((*_BASE, 2048, mode) for mode in ("forward", "step")),
        *((768, 48, 16384, mode) for mode in ("forward", "step")),
        *((*_BASE, 16, mode) for mode in ("forward", "step")),
    )
)
REPORTED = tuple(
    adapter(*sizes, seconds=2.9)
    for sizes in (
        *((*shape, 16384, "backward") for shape in (_BASE, _WIDE)),
        *((*_WIDE, tokens, "forward") for tokens in (16, 2048)),
        *((8192, 128, 16384, mode) for mode in ("forward", "step")),
        *((4096, 256, 16384, mode) for mode in ("forward", "step")),
        *((*_BASE, 65536, mode) for mode in ("forward", "step", "backward")),
        *((*_BASE, tokens, "backward") for tokens in (2048, 4096)),
        *((*_WIDE, 2048, mode) for mode in ("step", "backward")),
        *((*_BASE, tokens, "forward") for tokens in (1, 128, 512)),
        (768, 48, 2048, "forward"),
        *((*_WIDE, 65536, mode) for mode in ("forward", "step")),
        (8192, 128, 2048, "forward"),
        (4096, 256, 2048, "forward"),
        # No launch configuration is searched on these; a gap to the others would show an overfit.
        (1280, 24, 4097, "forward"),
        (2560, 96, 30011, "forward", "bf16", "relu"),
        (5120, 384, 1000, "forward", "bf16", "silu"),
        (1280, 48, 30011, "forward", "fp16"),
        (3072, 64, 16384, "forward", "fp32"),
    )
)
SPECIAL = (
    adapter(*_BASE, 16384, "forward", "fp16", seconds=3.2),
    adapter(*_BASE, 16384, "forward", "fp32", seconds=4, tf32=True),
    adapter(*_BASE, 16384, "step", "fp32", seconds=4, tf32=True),
    # The input was written just before, as a layer finds it.
    adapter(*_BASE, 16384, "step", "bf16", "relu", seconds=4, hot=True),
)
# Post-norm blocks as they are, and one of RMSNorm.
NORMED = (
    *(normed(*_BASE, 16384, mode, seconds=2.3) for mode in ("forward", "step", "backward")),
    *(normed(*_WIDE, 16384, mode, seconds=2.3) for mode in ("forward", "step")),
    normed(*_BASE, 2048, "forward", seconds=2.3),
    normed(*_WIDE, 16384, "forward", seconds=2.3, norm="rms"),
)
# Many adapters in one batch: what the goals ask for, then popular and less popular ones, and many.
MANY = tuple(
    mixed(*sizes, seconds=2.6)
    for sizes in (
        *((*shape, 16, 128, "forward") for shape in (_BASE, _WIDE)),
        (*_WIDE, 64, 1, "forward"),
        (*_BASE, 16, 128, "forward", "none"),
        *((*_BASE, 16, 128, "step", mix) for mix in ("even", "zipf")),
        (*_WIDE, 16, 1, "forward"),
        (*_BASE, 64, 32, "forward", "zipf"),
        (*_BASE, 16, 1024, "forward"),
    )
)
AUTOTUNED = adapter(
    *_BASE, 16384, "forward", "bf16", "gelu_tanh", seconds=45,
    baselines=("plain", "compile", "compile-max", "cublaslt", "limit"),
)  # fmt: skip

BLOCKS = (
    *(model("block-1024", mode, "graph", 12) for mode in ("forward", "step")),
    model("block-4096", "forward", "graph", 12),
)
MODELS = (
    *(model("block-1024", mode, "graph", 5) for mode in ("forward", "step")),
    model("block-4096", "forward", "graph", 5),
    model("bert-base-32x128", "forward", "graph", 7),
    *(model(f"gpt2-medium-{size}-H", "forward", "graph", 7) for size in ("32x512", "16x256")),
    model("gpt2-medium-1x128-H", "forward", "graph", 7),
    model("llama-7b-block-4x2048", "forward", "graph", 7),
    model("llama-7b-block-4x2048", "step", "graph", 8),
    model("bert-base-32x128-seq_bn", "forward", "eager", 7),
    model("gpt2-medium-16x256-seq_bn", "decode", "eager", 9),
    model("bert-base-32x128", "step", "graph", 8),
)
# Adapters beside full fine-tuning, which needs a whole optimiser's state.
TRAINING = (
    model("gpt2-medium-32x512-H", "step", "eager", 30),
    model("bert-base-32x128", "step", "eager", 15),
    model("llama-7b-block-4x2048", "step", "eager", 15),
)

# Patterns of ids of the parity grid: one case for each form of the CUDA kernels at 132 SMs, and the
# other cases of the sanitizers. tests/bench/test_gpu_stages.py checks which cases they match.
_ROWS, _SPLIT = "bf16-*-T14208-H65-R49*", "bf16-*-T777-H65-R49*"
_NARROW, _MIDDLE = "bf16-*-T37-H1030-R48*", "bf16-*-T1280-H512-R49*"
_WHOLE_ROWS = "bf16-*-T777-H1024-R48*"
FORMS = {
    "rows": _ROWS,
    "split": _SPLIT,
    "clusters of 16 tokens": _NARROW,
    "clusters of 64 tokens": _MIDDLE,
    "resident": _WHOLE_ROWS,
}
FORM_CASES = tuple(("cuda", case) for case in FORMS.values())
MEMCHECKED = FORM_CASES + tuple(
    ("cuda", case)
    for case in (
        *("bf16-*-T4097-H65-R136*", "bf16-*-T100-H520-R5*", "fp16-*-T777-H1536-R72*"),
        *("fp32-*-T8193-H65-R49*", "fp32-*-T300-H776-R16*", "tf32-*-T1537-H129-R16*"),
        *("bf16-*-T37-H1030-R49-parameters_fp32", "fp16-*-T37-H1030-R100-nonfinite"),
    )
)
