"""Launches of Triton kernels, repeated without Triton's own search for the compiled kernel.

`kernel[grid](...)` binds its arguments, specialises on each, builds a key and asks the driver of
every pointer, at each launch: about 10 us for twenty arguments. A repetition (see `repeat.Repeat`)
calls the compiled kernel itself, with integers for pointers. It holds for calls that Triton would
give the same kernel: Triton's specialisation reads of a tensor its dtype and whether its address
divides by 16, of a number its type, whether it is 1 and whether it divides by 16, and the value of
constexprs and options; `repeat.Repeats` keys on the layout and alignment of every tensor and on the
options of the call, from which all numbers follow.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from adapterkern import _env
from adapterkern.backends.repeat import STREAM, Option, Recording, Repeats, Results

try:
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    _source = inspect.getsource(JITFunction.run)
except (ImportError, AttributeError, OSError, TypeError):  # nothing below then asks for a name
    _source = ""

# What `JITFunction.run` does with a compiled kernel in Triton 3.5.1 to 3.9.0, and all settings that
# it reads. `is_plain` asks for those that change a launch; the homomorphic casts do so together
# with an instrumentation mode alone.
_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, "
    "launch_metadata, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, "
    "*bound_args.values())"
)
_SETTINGS = {
    "runtime.debug",
    "runtime.add_stages_inspection_hook",
    "runtime.launch_enter_hook",
    "runtime.launch_exit_hook",
    "compilation.instrumentation_mode",
    "compilation.fpsan_homomorphic_casts",
}


def layout_problem(source: str) -> str | None:
    """Why launches cannot be repeated with a Triton whose `JITFunction.run` is `source`."""
    unknown = {*re.findall(r"knobs\.(\w+\.\w+)", source)} - _SETTINGS
    if _LAUNCH in " ".join(source.split()) and not unknown:
        return None
    return (
        f"triton {triton.__version__} launches kernels in another way than 3.5.1 to 3.9.0, so each "
        "launch takes the host about 10 us more; a later release of adapterkern may know it"
    )


PROBLEM = layout_problem(_source)
_hooks: list[list] = []  # the hooks of every kernel that is repeated: lists that Triton changes


class Launches(Recording):
    """The launches of one call."""

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        """As `kernel[grid](*arguments, **named)`."""
        compiled = kernel[grid](*arguments, **named)
        if not self._keeps:
            return
        if not isinstance(compiled, CompiledKernel):  # one that another thread still compiles
            self._keeps = False
            return
        if not any(kernel.pre_run_hooks is hooks for hooks in _hooks):
            _hooks.append(kernel.pre_run_hooks)
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        values = [given.get(parameter.name, parameter.default) for parameter in kernel.params]
        bound = [self.slot(v.data_ptr()) if isinstance(v, Tensor) else v for v in values]
        bound = [
            Option(value) if parameter.is_constexpr and isinstance(value, float) else value
            for value, parameter in zip(bound, kernel.params, strict=True)
        ]
        where = *(*grid, 1, 1)[:3], STREAM, compiled.function, compiled.packed_metadata
        self.step(compiled.run, (*where, None, None, None, *bound), compiled)  # None: no hooks


_repeats = Repeats(Launches)
forget = _repeats.clear  # for a stand-in of the driver, which its recordings would keep alive


def is_plain() -> bool:
    """Whether a launch is only that: no hook is to be called, and kernels are compiled as usual."""
    runtime = knobs.runtime
    return not (
        runtime.debug
        or getattr(knobs.compilation, "instrumentation_mode", None)
        or getattr(runtime, "add_stages_inspection_hook", None)
        or _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
        or any(_hooks)
    )


def _has_calls(hook: Any) -> bool:
    """Whether a hook does anything: only Triton's own chain of hooks is known to be empty."""
    if type(hook) is getattr(knobs, "HookChain", None):
        return bool(hook.calls)
    return hook is not None


def run(
    inputs: tuple[Tensor | None, ...],
    options: tuple,
    code: Callable[[Launches], Results],
    scale: float = 1.0,
) -> Results:
    """Run a call's launches on the device of x, as `Repeats.run` does."""
    x: Any = inputs[0]
    # Triton launches on the current device, whatever device its pointers are on.
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(inputs, options, code, scale)
    if PROBLEM is not None or _env.TRITON_INTERPRET or not is_plain():
        return code(Launches((), keeps=False))
    active = driver.active  # has loaded the kernels; another driver has its own
    stream = active.get_current_stream(x.device.index)
    return _repeats.run(inputs, (active, *options), stream, code, scale)
