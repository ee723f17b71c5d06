"""Launch Triton kernels again without Triton's own argument handling, which costs more than a small kernel's run.

Triton parses each call, works out what the kernel would be specialised for and looks that up. Here the same facts make
a short key, kernels found by it are launched by their own launchers, and everything else is left to Triton: the first
launch of each key, other Triton versions, the interpreter, launch hooks, and arguments of kinds not known here.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Protocol

import torch
import triton
from torch import Tensor, nn
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from .triton_launch import interpreting

__all__ = [
    'FastKernel',
    'FastKernels',
    'LaunchRecorder',
    'fast_kernel',
    'launches_are_direct',
    'launches_are_watched',
    'recording',
]

KNOWN_TRITON = ((3, 5), (3, 8))
"""First and last Triton version whose compiled kernels are known to take all arguments in order, constants too.

All of them pass `tests/ops/test_fast_launch.py`.
"""

NOTHING = contextlib.nullcontext()
INT32_LOW, INT32_HIGH = -(2**31), 2**31 - 1


def _triton_is_known() -> bool:
    """Whether compiled kernels may be launched here; other versions and ROCm always go through Triton."""
    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    return KNOWN_TRITON[0] <= version <= KNOWN_TRITON[1] and torch.version.hip is None


@functools.cache
def launches_are_direct() -> bool:
    """Whether the kernels of this process are `FastKernel`s."""
    return _triton_is_known() and not interpreting()


class LaunchRecorder(Protocol):
    """What is told of the launches of its thread; see `recording`."""

    def note_launch(
        self,
        run: Callable[..., None],
        grid: tuple[int, int, int],
        handles: tuple[object, object],
        arguments: Sequence[object],
        constants: Sequence[object],
    ) -> None:
        """Take note of `run(*grid, stream, *handles, None, None, None, *arguments, *constants)`, with tensors."""

    def refuse(self) -> None:
        """Take note of a launch that Triton made."""


class _Recording(threading.local):
    """Who is told of this thread's launches."""

    recorder: LaunchRecorder | None = None


recording = _Recording()


class FastKernel:
    """A Triton kernel whose repeated launches are cheap.

    `kernel[grid](*arguments, **constants)` is used as that of Triton, gives the same results, honours launch hooks and
    is captured by CUDA graphs. The grid is a tuple; run-time arguments are positional; constants and options are
    keywords. What differs is launched by Triton as ever. Triton's settings (`triton.knobs`, its environment variables)
    are looked at when a kernel is compiled, no longer at each launch. All other attributes are the kernel's.

    Args:
        kernel: Function under `triton.jit`.
    """

    def __init__(self, kernel: JITFunction) -> None:
        self.kernel = kernel
        self._specialised = [not param.do_not_specialize for param in kernel.params]
        self._found: dict[tuple, tuple] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launch(*arguments: object, **constants: object) -> object:
            active = driver.active
            device = active.get_current_device()
            recorder = recording.recorder
            # What is asked of tensors here is not for recorders, which would make it slow.
            with torch._C.DisableTorchFunction() if recorder is not None else NOTHING:
                key, values = _key_and_values(arguments, self._specialised)
            key = None if key is None else (device, *key, *constants, *constants.values())
            found = self._found.get(key)
            if found is None or launches_are_watched():
                if recorder is not None:
                    recorder.refuse()
                return self._launch_by_triton(key, grid, arguments, constants)
            compiled, run, function, metadata, rest = found
            x, y, z = (*grid, 1, 1)[:3]
            run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *values, *rest)
            if recorder is not None:
                recorder.note_launch(run, (x, y, z), (function, metadata), arguments, rest)
            return compiled

        return launch

    def _launch_by_triton(
        self, key: tuple | None, grid: tuple[int, ...], arguments: Sequence[object], constants: dict[str, object]
    ) -> object:
        """Launch as ever and remember the compiled kernel if it can be launched directly from now on."""
        compiled = self.kernel[grid](*arguments, **constants)
        params = self.kernel.params
        given, rest = params[: len(arguments)], params[len(arguments) :]
        as_expected = not any(param.is_constexpr for param in given) and all(
            param.is_constexpr and param.name in constants for param in rest
        )
        if key is not None and as_expected and isinstance(compiled, CompiledKernel) and not self.kernel.pre_run_hooks:
            handles = compiled.run, compiled.function, compiled.packed_metadata
            self._found[key] = (compiled, *handles, [constants[param.name] for param in rest])
        return compiled


def launches_are_watched() -> bool:
    """Whether a profiler wants Triton to be called at each launch. A hook is a function, a chain of them or None."""
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    if enter is not None and getattr(enter, 'calls', True):
        return True
    return leave is not None and bool(getattr(leave, 'calls', True))


def _key_and_values(arguments: Sequence[object], specialised: Sequence[bool]) -> tuple[list | None, list]:
    """Sort a launch's run-time arguments by what Triton compiles a kernel for.

    Args:
        arguments: Tensors and numbers.
        specialised: For each parameter whether Triton looks at its value.

    Returns:
        A list that is equal for two launches only if they need the same compiled kernel, None if that is not known;
        and the values to launch with, addresses in place of tensors.
    """
    key, values = [], list(arguments)
    for place, kind in enumerate(map(type, arguments)):
        argument = values[place]
        if kind is int:
            if not INT32_LOW <= argument <= INT32_HIGH:
                key.append((argument >= 2**63, argument % 16 == 0))
            elif specialised[place]:
                key.append(1 if argument == 1 else 0 if argument % 16 else 16)
            else:
                key.append(kind)
        elif kind is Tensor or kind is nn.Parameter:
            values[place] = address = argument.data_ptr()
            # The device is in the key so that Triton sees, and refuses, a tensor that is not where the others were.
            key += argument.dtype, argument.get_device(), address % 16 == 0
        elif kind is float:
            key.append(kind)
        else:
            return None, []
    return key, values


class FastKernels:
    """The kernels of a module as `FastKernel`; functions that are no compiled kernels are given as they are.

    Args:
        module: Where the kernels are defined.
    """

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> object:
        kernel = fast_kernel(getattr(self._module, name))
        setattr(self, name, kernel)  # found without this function from now on
        return kernel


def fast_kernel(kernel: object) -> object:
    """Make a kernel's repeated launches cheap where that is possible.

    Args:
        kernel: Function under `triton.jit`, or `gluon.jit`, whose kernels are of a class derived from its.

    Returns:
        A `FastKernel`, or the kernel itself in the interpreter and with Triton versions that are not known.
    """
    return FastKernel(kernel) if isinstance(kernel, JITFunction) and _triton_is_known() else kernel
