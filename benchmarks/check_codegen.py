"""Compile the mLSTM kernels and those of whole blocks for a GPU that need not be there, and look at the machine code.

Prints registers, spills and shared memory of every kernel and tile setting of a head size and dtype, and fails if one
does not compile, needs more shared memory than the card has, or multiplies matrices whose descriptor was never set up:
ptxas 12.8 drops the set-up in some of these kernels, which then read outside of shared memory.

Example:
    python benchmarks/check_codegen.py --capability 90 --dims 96 192 384 --dtypes bfloat16
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime.jit import JITFunction

from mmvil.ops import carried, triton_chunkwise, triton_quadratic
from mmvil.ops.block_op import WEIGHTS
from mmvil.ops.triton_chunkwise_tiles import CHUNK, shared_memory_needed, tile_candidates
from mmvil.ops.triton_launch import DeviceLimits, ceil_div, head_pieces, launch_first_fitting

FORMS = ('chunkwise', 'quadratic', 'block')
SHARED_MEMORY = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}
INSTRUCTION = re.compile(r'^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\S+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?);')
REGISTER = re.compile(r'^(U?R)(\d+)$')
STACK = re.compile(r'^\[R1(?:\+(0x[0-9a-f]+))?\]$')
NEVER, UNKNOWN = 'never written', 'unknown'
Value = int | str
"""What is known of a register before an instruction: a constant, that nothing is, or that nothing has written it."""


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


class Instruction(NamedTuple):
    """One line of machine code."""

    predicate: str
    opcode: str
    operands: list[str]
    followers: list[int]


def parse(assembly: str) -> list[Instruction]:
    """Split machine code into instructions; followers are the numbers of those that may come next."""
    lines: list[tuple[str, str, list[str]]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label, match = re.match(r'^(\.L_x_\d+):', line.strip()), INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(lines)
        elif match:
            operands = [x.strip().replace('.reuse', '') for x in re.sub(r'/\*.*?\*/', '', match[3]).split(',')]
            lines.append((match[1] or '', match[2], operands))
    found = []
    for number, (predicate, opcode, operands) in enumerate(lines):
        target = re.search(r'\.L_x_\d+', operands[-1]) if opcode.startswith('BRA') else None
        followers = [labels[target[0]]] if target and target[0] in labels else []
        falls_through = predicate or not opcode.startswith(('BRA', 'EXIT'))
        if falls_through and number + 1 < len(lines):
            followers.append(number + 1)
        found.append(Instruction(predicate, opcode, operands, followers))
    return with_swaps(found)


def with_swaps(code: list[Instruction]) -> list[Instruction]:
    """Replace the last of the three exclusive ors that exchange two registers by a swap, and drop the other two."""
    code, pending = list(code), {}
    for number, (predicate, opcode, operands, followers) in enumerate(code):
        if not opcode.endswith('LOP3.LUT') or '0x3c' not in operands:
            continue
        pair = frozenset(x for x in operands if REGISTER.match(x))
        if len(pair) != 2 or operands[0] not in operands[1:3]:
            continue
        pending.setdefault(pair, []).append(number)
        if len(pending[pair]) == 3:
            for first in pending.pop(pair)[:2]:
                code[first] = code[first]._replace(opcode='NOP', operands=[''])
            code[number] = Instruction(predicate, 'SWAP', sorted(pair), followers)
    return code


def word(known: dict[str, Value], operand: str, number: int = 0) -> Value:
    """Value of the operand's register `number` places on, or of the constant."""
    if operand in ('RZ', 'URZ'):
        return 0
    constant, register = re.match(r'^(-?)0x([0-9a-f]+)$', operand), REGISTER.match(operand)
    if constant:
        value = int(constant[2], 16) * (-1 if constant[1] else 1)
        return value & 0xFFFFFFFF if number == 0 else 0
    return known.get(f'{register[1]}{int(register[2]) + number}', NEVER) if register else UNKNOWN


def added(known: dict[str, Value], operands: list[str], number: int = 0, borrow: int = 0) -> Value:
    """Sum of one word of the operands, without a carry from below: descriptors' lower words do not overflow."""
    total = 0
    for operand in (x for x in operands if not re.match(r'^!?U?PT?\d*$', x)):
        is_negative = operand.startswith(('-U', '-R'))
        value = word(known, operand[1:] if is_negative else operand, number)
        if isinstance(value, str):
            return value
        total += -value - borrow if is_negative else value
    return total & 0xFFFFFFFF


def results(instruction: Instruction, known: dict[str, Value]) -> dict[str, Value]:
    """Registers and stack words that an instruction writes, as far as constants move through it."""
    _, opcode, operands, _ = instruction
    width = 4 if '.128' in opcode else 2 if '.64' in opcode or '.WIDE' in opcode else 1
    place = STACK.match(operands[0])
    if opcode.startswith('STL') and place:
        start = int(place[1] or '0', 16)
        return {f'stack {start + 4 * i}': word(known, operands[1], i) for i in range(width)}
    if opcode == 'SWAP':
        return {operands[0]: word(known, operands[1]), operands[1]: word(known, operands[0])}
    first = next((i for i, x in enumerate(operands) if not re.match(r'^!?U?PT?\d*$', x)), 0)
    target, sources = REGISTER.match(operands[first]), operands[first + 1 :]
    if target is None or not sources or opcode.startswith(('ST', 'HGMMA', 'BRA', 'LDGSTS', 'WARPGROUP')):
        return {}
    values: list[Value] = [UNKNOWN] * width
    if opcode in ('MOV', 'UMOV') or opcode.startswith('R2UR'):
        values = [word(known, sources[0])]
    elif opcode.startswith('IMAD.') and sources[:2] == ['RZ', 'RZ']:
        values = [word(known, sources[2])]
    elif opcode.startswith('CS2R') and sources[0] == 'SRZ':
        values = [0] if opcode == 'CS2R.32' else [0, 0]
    elif opcode.startswith('LDL') and STACK.match(sources[0]):
        start = int(STACK.match(sources[0])[1] or '0', 16)
        values = [known.get(f'stack {start + 4 * i}', NEVER) for i in range(width)]
    elif opcode == 'UIADD3.64':
        values = [added(known, sources, 0), added(known, sources, 1, borrow=1)]
    elif opcode in ('UIADD3', 'UIADD3.X', 'IADD3', 'IADD3.X', 'VIADD'):
        values = [added(known, sources)]
    return {f'{target[1]}{int(target[2]) + i}': value for i, value in enumerate(values)}


def merged(first: dict[str, Value], second: dict[str, Value]) -> dict[str, Value]:
    """What is known where two paths meet."""
    both = {}
    for key in first.keys() | second.keys():
        pair = {first.get(key, NEVER), second.get(key, NEVER)}
        both[key] = pair.pop() if len(pair) == 1 else NEVER if NEVER in pair else UNKNOWN
    return both


def known_before(code: list[Instruction]) -> list[dict[str, Value] | None]:
    """Propagate constants along all paths; None where no path leads."""
    states: list[dict[str, Value] | None] = [None] * len(code)
    if code:
        states[0] = {}
    waiting = [0] if code else []
    while waiting:
        number = waiting.pop()
        known = states[number] or {}
        written = results(code[number], known)
        if code[number].predicate:
            written = {k: v if v == known.get(k, v) else UNKNOWN for k, v in written.items()}
        after = {**known, **written}
        for follower in code[number].followers:
            before = states[follower]
            state = after if before is None else merged(before, after)
            if state != before:
                states[follower] = state
                waiting.append(follower)
    return states


def unset_descriptors(assembly: str) -> Iterator[str]:
    """Tensor-core instructions whose operands' layout, the descriptors' upper words, is not a constant.

    Layouts are constants of the source, so that one which is not was never set: the register holds something else.
    """
    code = parse(assembly)
    for instruction, known in zip(code, known_before(code), strict=True):
        descriptor = next((x for x in instruction.operands if x.startswith('gdesc[UR')), None)
        if known is None or descriptor is None or not instruction.opcode.startswith('HGMMA'):
            continue
        first = int(re.search(r'\d+', descriptor)[0])
        left_in_registers = instruction.operands.index(descriptor) == 2
        layouts = [known.get(f'UR{first + i}', NEVER) for i in ((3,) if left_in_registers else (1, 3))]
        if any(isinstance(x, str) for x in layouts):
            yield f'{instruction.opcode} {", ".join(instruction.operands)} with a layout that is {layouts}'


def compile_only(capability: int, problems: list[str]) -> Callable:
    """Replacement for `kernel[grid]` that compiles, reports and launches nothing."""
    seen: set[str] = set()

    def subscript(self: JITFunction, grid: tuple) -> Callable:
        def compile_and_report(*arguments: object, **constants: object) -> None:
            name = ' '.join(
                [
                    self.fn.__name__,
                    *(f'{k}={constants[k]}' for k in ('PRODUCT', 'BACKWARD', 'FOLDED', 'KEEP') if k in constants),
                ]
            )
            kernel = self.warmup(*arguments, grid=grid, **constants)
            kernel = kernel.result() if hasattr(kernel, 'result') else kernel
            if kernel.hash in seen:
                return
            seen.add(kernel.hash)
            usage = disassemble('cuobjdump', ['-res-usage'], kernel.asm['cubin'])
            registers, stack = re.search(r'REG:(\d+) STACK:(\d+)', usage).groups()
            shared = kernel.metadata.shared
            print(f'  {name:34} registers {registers:>3}  stack {stack:>5}  shared memory {shared:>6}')
            if shared > SHARED_MEMORY[capability]:
                problems.append(f'{name}: {shared} bytes of shared memory')
            unset = list(unset_descriptors(disassemble('nvdisasm', ['-c'], kernel.asm['cubin'])))
            problems.extend(f'{name}: {x}' for x in unset[:1])

        return compile_and_report

    return subscript


def compile_chunkwise(inputs: tuple[torch.Tensor, ...], dh: torch.Tensor, limits: DeviceLimits) -> None:
    """Compile every tile setting of the chunkwise form that the card has the shared memory for."""
    dim, dtype = dh.shape[-1], dh.dtype
    for tiles in tile_candidates(dim, dtype):
        if shared_memory_needed(tiles, dim, dtype) <= limits.shared_memory:
            print(f' {tiles}')
            h, saved = triton_chunkwise.forward(*inputs, True, 1e-6, tiles)
            triton_chunkwise.backward(dh, *inputs, h, saved, True, 1e-6, tiles)


def compile_carried(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, limits: DeviceLimits) -> None:
    """Compile the kernels that carry the chunkwise form's state, if they are made for the card and this Triton."""
    with mock.patch.object(carried, 'device_limits', return_value=limits):
        if not carried.can_carry(q.shape[-1], q.dtype, torch.device('cuda')):
            return
    print(' carried')
    saved, h = triton_chunkwise.empty_saved(q), torch.empty_like(q)
    strides = [stride // carried.ALIGNMENT for x in (q, k, v, h) for stride in x.stride()[:-1]]
    half = ceil_div(ceil_div(q.shape[2], carried.TILE), 2)
    replaced = {
        'can_carry': lambda *_: True,  # tensors are on no GPU
        'segments_for': lambda *_: (2, half),  # one segment would leave out the kernels for several
        'is_compile_failure': lambda _: False,  # what does not compile raises, as everywhere else here
    }
    with mock.patch.multiple(carried, **replaced):
        for keep in (True, False):
            carried.carry(q, k, v, h, saved, strides, carried.ALIGNMENT, CHUNK // carried.TILE, 1.0, 1e-6, True, keep)


def launch_all(candidates: Sequence[object], launch: Callable[[object], object]) -> None:
    """In place of `launch_first_fitting`."""
    for tiles in candidates:
        launch(tiles)


def compile_quadratic(inputs: tuple[torch.Tensor, ...], dh: torch.Tensor, limits: DeviceLimits) -> None:
    """Compile every tile setting of the quadratic form that the card may have the shared memory for."""
    dim, size = dh.shape[-1], dh.element_size()
    joint = sum(head_pieces(dim)) <= triton_quadratic.JOINT_KEY_COLUMNS
    h, saved = triton_quadratic.forward(*inputs, True, 1e-6)
    for name in ('forward', 'query', 'key', 'value'):
        for tiles in triton_quadratic.tile_candidates(name, dim, size, limits):
            print(f' {name} {tiles}')
            if name == 'forward':
                triton_quadratic.forward(*inputs, True, 1e-6, tiles)
            elif name == 'query':
                triton_quadratic.backward(dh, *inputs, h, saved, True, 1e-6, query_tiles=tiles, stored=False)
            elif name == 'key' or not joint:
                triton_quadratic.backward(dh, *inputs, h, saved, True, 1e-6, key_tiles=tiles, joint=joint, stored=False)
    print(f' stored {triton_quadratic.STORED_TILES}')
    triton_quadratic.launch_first_fitting = launch_all
    triton_quadratic.backward(dh, *inputs, h, saved, True, 1e-6, stored=True)
    triton_quadratic.launch_first_fitting = launch_first_fitting


def compile_block(dim: int, dtype: torch.dtype) -> None:
    """Compile a ViL block with heads of this size: both convolutions, inference and training, every tile setting."""
    from mmvil.models import ViLBlock
    from mmvil.models.fused import fused_weights
    from mmvil.ops import block, block_backward

    block.launch_first_fitting = launch_all
    x = torch.empty(1, 196, 2 * dim)
    for options in ({}, {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False}):
        print(f' block {options}')
        module = ViLBlock(2 * dim, **options)
        weights = {**dict.fromkeys(WEIGHTS), **fused_weights(module)}
        shape = block.BlockShape(1, (14, 14), 4, 4 * dim, 4, not options, False)
        block.block_forward(shape, triton_quadratic, block.Stream(x), weights, dtype, None, keep=False)
        stream, x, *saved, statistics = block.block_forward(
            shape, triton_quadratic, block.Stream(x), weights, dtype, None
        )
        following, *_ = block.block_forward(shape, triton_quadratic, stream, weights, dtype, None)
        out = following.summed()
        block_backward.block_backward(shape, triton_quadratic, out, x, *saved, statistics, weights, None)


def main() -> int:
    """Compile everything that was asked for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--capability', type=int, default=90, choices=sorted(SHARED_MEMORY))
    parser.add_argument('--dims', type=int, nargs='+', default=[96, 192, 384])
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16'], choices=['bfloat16', 'float16', 'float32'])
    parser.add_argument('--forms', nargs='+', default=list(FORMS), choices=FORMS)
    options = parser.parse_args()
    triton.runtime.driver.set_active(AbsentDevice(options.capability))
    problems: list[str] = []
    JITFunction.__getitem__ = compile_only(options.capability, problems)

    limits = DeviceLimits(divmod(options.capability, 10), SHARED_MEMORY[options.capability], 1)
    for dim in options.dims:
        for dtype in (getattr(torch, x) for x in options.dtypes):
            print(f'DH {dim}, {dtype}, capability {options.capability}, Triton {triton.__version__}')
            q, k, v, dh = (torch.empty(1, 1000, 4, dim, dtype=dtype).transpose(1, 2) for _ in range(4))
            inputs = q, k, v, *torch.empty(2, 1, 4, 1000)
            if 'chunkwise' in options.forms:
                compile_chunkwise(inputs, dh, limits)
                compile_carried(q, k, v, limits)
            if 'quadratic' in options.forms:
                compile_quadratic(inputs, dh, limits)
            if 'block' in options.forms:
                compile_block(dim, dtype)
    print('\n'.join(problems) or 'nothing found')
    return 1 if problems else 0


if __name__ == '__main__':
    sys.exit(main())
