"""Launch a kernel with a driver that records instead of running: python launch_recorder.py [VERSION].

Triton compiles as for a card of compute capability 9.0 but calls a launcher of ours, so that what reaches the card can
be compared between Triton's own launch and the fast one. Prints one JSON line: pairs of the fast way and Triton's.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

RECORDED: list[list[object]] = []


class Recorder:
    """Stands for a driver's launcher: keeps grid, stream, kernel and arguments."""

    def __init__(self, source: object, metadata: object) -> None:
        self.compiled_for = sorted((str(place), str(kind)) for place, kind in source.attrs.items())
        self.constants = sorted((str(place), str(value)) for place, value in source.constants.items())

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: object) -> None:
        enter, leave = rest[2:4]
        arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in rest[4:]]
        for hook in (enter, leave):
            if hook is not None:
                hook(None)
        RECORDED.append([[x, y, z], stream, self.compiled_for, self.constants, arguments])


class Driver:
    """A card that need not be there."""

    launcher_cls = Recorder
    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 16, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {'max_shared_mem': 232448},
    )
    device, stream = 0, 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream + 100 * device


def copy_kernel(x, y, rows, columns, pitch, scale, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """Enough to tell specialisations apart."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < rows * columns
    value = tl.load(x + place * pitch, mask=inside, other=0.0)
    if ADD:
        value += scale
    tl.store(y + place, value, mask=inside)


def main() -> None:
    """Launch every case twice in both ways."""
    if len(sys.argv) > 1:
        triton.__version__ = sys.argv[1]
    from mmvil.ops.fast_launch import fast_kernel

    driver = Driver()
    triton.runtime.driver.set_active(driver)
    plain = JITFunction(copy_kernel, do_not_specialize=['columns'])
    fast = fast_kernel(JITFunction(copy_kernel, do_not_specialize=['columns']))
    x, y = torch.zeros(4096), torch.zeros(4096)
    base = {'BLOCK': 128, 'ADD': True}
    cases = [
        ((4,), (x, y, 5, 7, 3, 0.5), base),
        ((5, 2), (y, x, 6, 16, 9, 1.5), base),  # the same compiled kernel, all else another
        ((4,), (x[1:], y, 5, 7, 3, 0.5), base),  # not aligned
        ((4,), (x, y[1:], 5, 7, 3, 0.5), base),
        ((4,), (x, y, 16, 7, 3, 0.5), base),  # divisible by 16
        ((4,), (x, y, 1, 7, 3, 0.5), base),  # one
        ((4,), (x, y, 5, 1, 3, 0.5), base),  # one, but not looked at
        ((4,), (x, y, 5, 7, 2**40, 0.5), base),  # 64 bits
        ((4,), (x, y, 5, 2**40, 3, 0.5), base),
        ((4,), (x.half(), y, 5, 7, 3, 0.5), base),  # another dtype
        ((4,), (x, y, 5, 7, 3, 1), base),  # a whole number
        ((4,), (x, y, 5, 7, 3, 0.5), {**base, 'ADD': False}),
        ((4,), (x, y, 5, 7, 3, 0.5), {**base, 'num_warps': 2}),
        ((4,), (x, y, 5, 7), {**base, 'pitch': 3, 'scale': 0.5}),  # run-time values as keywords
        ((4,), (x, y, 5, 7, 3, 0.5, 128, True), {}),  # constants by position
        ((4,), (torch.nn.Parameter(x), y, 5, 7, 3, 0.5), base),
        ((4,), (x, y, 5, 7, 3, None), {**base, 'ADD': False}),
    ]
    pairs, sizes = [], []
    for device, stream in ((0, 7), (0, 8), (1, 7)):
        driver.device, driver.stream = device, stream
        for grid, arguments, constants in cases * 2:
            for kernel in (fast, plain):
                kernel[grid](*arguments, **constants)
            pairs.append(RECORDED[-2:])
        sizes.append(len(getattr(fast, '_found', ())))
    seen = []
    triton.knobs.runtime.launch_enter_hook.add(seen.append)
    fast[(4,)](x, y, 5, 7, 3, 0.5, **base)
    triton.knobs.runtime.launch_enter_hook = seen.append
    fast[(4,)](x, y, 5, 7, 3, 0.5, **base)
    print(json.dumps({'pairs': pairs, 'sizes': sizes, 'fast': type(fast).__name__, 'hooked': len(seen)}))


if __name__ == '__main__':
    main()
