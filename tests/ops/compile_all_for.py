"""Run the real launchers with Triton's compiler for a card that need not be there: python compile_all_for.py ...

Arguments: CAPABILITY BYTES DTYPE DIMS EDGE. A block of DIMS channels on a grid of EDGE x EDGE goes forward, without
and with gradients, and backward; nothing is run. The driver tells BYTES of shared memory, so that launchers
see what that card would refuse. Prints one JSON line: the shared memory of each compiled kernel.
"""

import json
import sys

import torch
import triton
from launch_recorder import Driver
from triton.backends.compiler import GPUTarget

from mmvil.ops import block, triton_chunkwise, triton_launch, triton_quadratic

USED: dict[str, int] = {}


class SilentLauncher:
    """Stands for a driver's launcher: takes everything and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, *_: object) -> None:
        pass


def main() -> None:
    """Compile everything that one block needs."""
    capability, limit, dtype, dims, edge = (*map(int, sys.argv[1:3]), sys.argv[3], *map(int, sys.argv[4:6]))
    limits = triton_launch.DeviceLimits((capability // 10, capability % 10), limit, 20)
    for module in (triton_launch, triton_quadratic, triton_chunkwise, block):
        module.device_limits = lambda _: limits
    driver = Driver()
    driver.launcher_cls = SilentLauncher
    driver.get_current_target = lambda: GPUTarget('cuda', capability, 32)
    driver.utils.get_device_properties = lambda _: {'max_shared_mem': limit, 'multiprocessor_count': 20}
    triton.runtime.driver.set_active(driver)

    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple:
        USED[name] = max(shared, USED.get(name, 0))
        return 1, 2, 16, 0, 1024

    driver.utils.load_binary = load_binary
    from mmvil.models import ViLBlock
    from mmvil.models.fused import run_fused

    made = ViLBlock(dims)
    x = torch.zeros(1, edge * edge, dims, requires_grad=True)
    with torch.autocast('cpu', getattr(torch, dtype), enabled=dtype != 'float32'):
        with torch.no_grad():
            run_fused(made, x, (edge, edge))
        run_fused(made, x, (edge, edge)).sum().backward()
    print(json.dumps(USED))


if __name__ == '__main__':
    main()
