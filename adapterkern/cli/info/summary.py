"""The report's first line: whether adapters run on this machine, and with what."""

PLAIN = "adapters run in plain PyTorch (backend reference), correct but not faster."


def summarise(report: dict) -> str:
    """Whether adapters run here and with which backends, by the choice for a plain adapter."""
    choice = report["choice"]
    if "error" in choice:
        return "Whether adapters run on this machine is not known: the test of it failed."
    chosen = {dtype: backend for dtype, backend in choice.items() if dtype != "device"}
    failing = [dtype for dtype, backend in chosen.items() if backend.startswith("none")]
    if failing:
        which = "" if len(failing) == len(chosen) else f" in {', '.join(failing)}"
        return f"Adapters do not run on this machine{which}: every call raises an error."
    backends: dict[str, list[str]] = {}
    for dtype, backend in chosen.items():  # "triton", or "triton (named)" by the environment
        backends.setdefault(backend.split()[0], []).append(dtype)
    on_gpu = choice["device"] == "cuda"
    if list(backends) == ["reference"]:
        if any(backend.endswith("(named)") for backend in chosen.values()):
            return f"As ADAPTERKERN_BACKEND asks, {PLAIN}"
        if on_gpu:
            return f"On {_gpu_text(report['gpus'])}, {PLAIN}"
        return f"This machine has no GPU that PyTorch can use: {PLAIN}"
    told = ", ".join(
        backend if len(backends) == 1 else f"{backend} ({', '.join(dtypes)})"
        for backend, dtypes in backends.items()
    )
    if on_gpu:
        return f"Adapters run on this machine with: {told}, on {_gpu_text(report['gpus'])}."
    return (
        f"Adapters run on this machine with: {told}, in Triton's CPU interpreter, which is far "
        "slower than plain PyTorch: unset TRITON_INTERPRET unless you test kernels."
    )


def _gpu_text(gpus: dict) -> str:
    devices = gpus.get("devices")
    if not devices:  # that probe failed
        return "a GPU"
    first = devices[0]["name"]
    return first if len(devices) == 1 else f"{first}, the first of {len(devices)} GPUs"
