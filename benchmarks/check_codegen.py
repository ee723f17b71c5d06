"""Compile the chunkwise mLSTM kernels for a GPU that need not be there, and look at the machine code.

Prints registers, spills and shared memory of every kernel that a head size and dtype use, and fails if a kernel does
not compile, needs more shared memory than the card has, or reads a uniform register that nothing has written: ptxas
12.8 has dropped the set-up of a tensor-core descriptor in such kernels, which then read outside of shared memory.

Example:
    python benchmarks/check_codegen.py --capability 90 --dims 96 192 384 --dtypes bfloat16
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}
INSTRUCTION = re.compile(r'^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\S+\s+)?([A-Z0-9_.]+)\s*(.*?);')
WRITES_UNIFORM = re.compile(r'^(U(?!ISETP|FSETP|PLOP)|R2UR|S2UR|REDUX)')


class AbsentDevice:
    """Stands for the driver of a GPU, as far as compiling asks it."""

    def __init__(self, capability: int):
        self.target = GPUTarget('cuda', capability, 32)

    def get_current_target(self) -> GPUTarget:
        """Target to compile for."""
        return self.target

    def get_current_device(self) -> int:
        """Any number."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Any number."""
        return 0


def disassemble(tool: str, options: list[str], cubin: bytes) -> str:
    """Run one of the binary utilities that come with Triton."""
    path = Path(nvidia.__file__).parent / 'bin' / tool
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def operands(opcode: str, text: str) -> tuple[set[int], set[int]]:
    """Uniform registers that an instruction writes and reads."""
    parts = [x.strip() for x in text.split(',')]
    written: set[int] = set()
    if WRITES_UNIFORM.match(opcode):
        place = next((i for i, x in enumerate(parts) if not re.match(r'^U?P\w+$', x)), len(parts))
        target = re.match(r'^UR(\d+)$', parts[place]) if place < len(parts) else None
        if target:
            width = 2 if '.64' in opcode or '.WIDE' in opcode else 4 if '.128' in opcode else 1
            written = set(range(int(target[1]), int(target[1]) + width))
            parts = parts[:place] + parts[place + 1 :]
    read: set[int] = set()
    from_registers = re.search(r',\s*R\d+,\s*gdesc', text) is not None  # then only the second descriptor is used
    for kind, number in re.findall(r'(g?desc\[)?UR(\d+)', ','.join(parts)):
        first, width = int(number), {'gdesc[': 4, 'desc[': 2}.get(kind, 1)
        if kind == 'gdesc[' and from_registers:
            first, width = first + 2, 2
        elif not kind and '.64' in opcode and opcode.startswith('U'):
            width = 2
        read |= set(range(first, first + width))
    return written, read


def never_written(assembly: str) -> Iterator[str]:
    """Instructions that read a uniform register before any instruction above has written it."""
    known: set[int] = set()
    for line in assembly.splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        written, read = operands(match[1], re.sub(r'/\*.*?\*/', '', match[2]))
        if read - known:
            yield f'{match[1]} {match[2].strip()}'
        known |= written


def compile_only(capability: int, problems: list[str]) -> Callable:
    """Replacement for `kernel[grid]` that compiles, reports and launches nothing."""

    def subscript(self: JITFunction, grid: tuple) -> Callable:
        def compile_and_report(*arguments: object, **constants: object) -> None:
            name = ' '.join(
                [self.fn.__name__, *(f'{k}={constants[k]}' for k in ('PRODUCT', 'BACKWARD') if k in constants)]
            )
            kernel = self.warmup(*arguments, grid=grid, **constants)
            kernel = kernel.result() if hasattr(kernel, 'result') else kernel
            usage = disassemble('cuobjdump', ['-res-usage'], kernel.asm['cubin'])
            registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
            shared = kernel.metadata.shared
            print(f'  {name:34} registers {registers:>3}  stack {stack:>5}  shared memory {shared:>6}')
            if shared > SHARED_MEMORY[capability]:
                problems.append(f'{name}: {shared} bytes of shared memory')
            unset = list(never_written(disassemble('nvdisasm', ['-c'], kernel.asm['cubin'])))
            problems.extend(f'{name}: reads an unset register: {x}' for x in unset[:1])

        return compile_and_report

    return subscript


def main() -> int:
    """Compile everything that was asked for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--capability', type=int, default=90, choices=sorted(SHARED_MEMORY))
    parser.add_argument('--dims', type=int, nargs='+', default=[96, 192, 384])
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16'], choices=['bfloat16', 'float16', 'float32'])
    options = parser.parse_args()
    triton.runtime.driver.set_active(AbsentDevice(options.capability))
    problems: list[str] = []
    JITFunction.__getitem__ = compile_only(options.capability, problems)

    from mmvil.ops import triton_chunkwise
    from mmvil.ops.triton_launch import DeviceLimits

    limits = DeviceLimits(divmod(options.capability, 10), SHARED_MEMORY[options.capability], 1)
    for dim in options.dims:
        for dtype in (getattr(torch, x) for x in options.dtypes):
            tiles = triton_chunkwise.choose_tiles(dim, dtype, limits)
            print(f'DH {dim}, {dtype}, capability {options.capability}, Triton {triton.__version__}')
            q, k, v, dh = (torch.empty(1, 1000, 4, dim, dtype=dtype).transpose(1, 2) for _ in range(4))
            igate, fgate = torch.empty(2, 1, 4, 1000)
            h, saved = triton_chunkwise.forward(q, k, v, igate, fgate, True, 1e-6, tiles)
            triton_chunkwise.backward(dh, q, k, v, igate, fgate, h, saved, True, 1e-6, tiles)
    print('\n'.join(problems) or 'nothing found')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
