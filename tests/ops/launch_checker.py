"""Run the real launchers without a card and check each direct launch: python launch_checker.py.

Nothing is compiled. A stand-in for a compiled kernel knows what Triton was about to compile it for (which numbers are
one or divisible by 16, which addresses are aligned, types, constants) and holds every launch against that. Prints one
JSON line: kernels compiled and launches in all, at first and after more image sizes, what was wrong, and by what runs
the names of the kernels that ten other batch and image sizes compile after the first one of its kind.
"""

import json
from collections.abc import Sequence

import torch
import triton
import triton.compiler
from launch_recorder import Driver
from triton.compiler import CompiledKernel

from mmvil.ops import fast_launch

COUNTS = {'compiled': 0, 'all': 0, 'from tapes': 0}
NAMES: list[str] = []
# By what runs: the first size and ten or more others, as (batch, rows, columns). One and multiples of 16 are what
# Triton would compile anew for. Up to 256 tokens one kernel scans the gates and the backward pass stores matrices;
# above 1,024 the chunkwise form runs in training, above 1,152 in inference too.
SIZES = {
    'block': [
        (2, 14, 14),
        (1, 1, 1), (1, 4, 4), (2, 3, 5), (3, 7, 7), (16, 2, 2), (1, 12, 12), (5, 14, 14), (7, 13, 15), (2, 16, 16),
        (1, 1, 16),
    ],
    'long block': [
        (2, 17, 19),
        (1, 17, 19), (1, 16, 17), (1, 32, 32), (3, 20, 30), (1, 18, 18), (2, 19, 29), (16, 17, 17), (1, 1, 257),
        (1, 512, 1), (1, 24, 32),
    ],
    'border block': [
        (2, 33, 33),
        (1, 33, 33), (1, 1, 1025), (16, 33, 32), (1, 32, 36), (3, 29, 38), (2, 1, 1040), (5, 33, 34), (1, 1152, 1),
        (2, 34, 32), (1, 31, 35),
    ],
    'chunkwise block': [
        (2, 36, 36),
        (1, 36, 36), (1, 35, 41), (3, 33, 37), (1, 48, 48), (2, 40, 30), (1, 64, 64), (1, 1, 1153), (16, 37, 32),
        (1, 2048, 1), (1, 39, 39),
    ],
}  # fmt: skip
SIZES['quadratic'], SIZES['long quadratic'] = SIZES['block'], SIZES['long block']
SIZES['chunkwise'] = SIZES['block'] + SIZES['chunkwise block'][1:]
PROBLEMS: list[str] = []
GIVEN: list[object] = []
"""What the launcher gave for the launch in hand: tensors, where a direct launch has addresses. None from a tape."""
TYPES = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.float64: '*fp64'}
BOUNDS = {'i32': (-(2**31), 2**31), 'i64': (-(2**63), 2**63), 'u64': (0, 2**64)}


class Compiled(CompiledKernel):
    """What a kernel would be compiled for."""

    def __init__(self, source: object) -> None:
        self.name, self.src = source.fn.fn.__name__, source
        self.function, self.packed_metadata, self.module = 1, (), None

    def __del__(self) -> None:
        pass

    def launch_metadata(self, *_: object) -> None:
        return None

    @property
    def run(self) -> object:
        return self.check

    def check(self, x: int, y: int, z: int, stream: int, function: int, *rest: object) -> None:
        """Hold the arguments against what the kernel was compiled for."""
        COUNTS['all'] += 1
        COUNTS['from tapes'] += not GIVEN
        arguments = rest[4:]
        divisible = {place[0] for place, what in self.src.attrs.items() if ['tt.divisibility', 16] in what}
        names = list(self.src.signature)
        if len(arguments) != len(names):
            PROBLEMS.append(f'{self.name}: {len(arguments)} arguments for {len(names)} parameters')
        given = [*GIVEN, *arguments[len(GIVEN) :]]
        GIVEN.clear()
        for place, (name, kind, value) in enumerate(zip(names, self.src.signature.values(), arguments, strict=True)):
            number = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if isinstance(given[place], torch.Tensor):
                if TYPES[given[place].dtype] != kind:
                    self.complain(name, f'{given[place].dtype} for {kind}')
                if given[place].data_ptr() != number:
                    self.complain(name, 'another address')
            elif kind != 'constexpr' and given[place] != value:
                self.complain(name, f'{value} in place of {given[place]}')
            if kind == 'constexpr' and self.src.constants[(place,)] != value:
                self.complain(name, f'{value} for the constant {self.src.constants[(place,)]}')
            if kind in BOUNDS and not BOUNDS[kind][0] <= number < BOUNDS[kind][1]:
                self.complain(name, f'{number} for {kind}')
            if kind == 'fp32' and type(value) not in (float, int):
                self.complain(name, f'{type(value)} for {kind}')
            if place in divisible and number % 16:
                self.complain(name, f'{number} is not divisible by 16')

    def complain(self, name: str, what: str) -> None:
        PROBLEMS.append(f'{self.name}, {name}: {what}')


def run_blocks(shapes: Sequence[tuple[int, int, int]]) -> None:
    """Forward and backward of whole blocks and of the cell alone; what they compute is of no interest."""
    from mmvil.models import ViLBlock
    from mmvil.models.fused import run_fused
    from mmvil.ops.custom_op import mlstm_triton

    for dims, options in ((32, {}), (64, {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False})):
        for reverse in (False, True):
            block = ViLBlock(dims, reverse, **options)
            for batch, rows, columns in shapes:
                x = torch.zeros(batch, rows * columns, dims, requires_grad=True)
                with torch.autocast('cpu', torch.bfloat16, enabled=batch % 2 == 0):
                    out = run_fused(block, x, (rows, columns))
                out.sum().backward()
    for form in ('quadratic', 'chunkwise'):
        for batch, rows, columns in shapes:
            # Views one element into their memory, so that addresses are not aligned.
            memory = [torch.zeros(batch * 2 * rows * columns * 24 + 1)[rows % 2 :] for _ in range(3)]
            q, k, v = (x[: batch * 2 * rows * columns * 24].view(batch, 2, -1, 24) for x in memory)
            gates = torch.zeros(2, batch, 2, rows * columns)
            mlstm_triton(q.requires_grad_(), k, v, *gates, bool(rows % 2), 1e-6, form).sum().backward()


def run_joined(shapes: Sequence[tuple[int, int, int]]) -> int:
    """Blocks of both directions as one call, inference and training; launches from tapes, after the first ones."""
    from mmvil.models import ViLBlock
    from mmvil.models.fused import run_fused_blocks
    from mmvil.ops import block_chain

    block_chain.FIRST_CALLS = 1
    blocks, found = [ViLBlock(64, reverse) for reverse in (False, True, False)], 0
    for batch, rows, columns in shapes:
        x = torch.zeros(batch, rows * columns, 64)
        for number in range(4):
            before = COUNTS['from tapes']
            with torch.autocast('cpu', torch.bfloat16):
                with torch.no_grad():
                    run_fused_blocks(blocks, x, (rows, columns))
                out = run_fused_blocks(blocks, x, (rows, columns))
            out.sum().backward()
            found += COUNTS['from tapes'] - before if number > 1 else 0
    return found


def run_size(kind: str, block: object, batch: int, rows: int, columns: int) -> None:
    """One size of a block, in training and inference, or of the cell alone."""
    from mmvil.models.fused import run_fused
    from mmvil.ops.custom_op import mlstm_triton

    if 'block' not in kind:
        q, k, v = torch.zeros(3, batch, rows * columns, 4, 32, dtype=torch.bfloat16).transpose(2, 3)
        igate, fgate = (torch.zeros(batch, 4, rows * columns) for _ in range(2))
        h = mlstm_triton(q.requires_grad_(), k, v, igate, fgate, block.layer.reverse, 1e-6, kind.split()[-1])
        h.sum().backward()
        return
    x = torch.zeros(batch, rows * columns, block.layer.embed_dims, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        run_fused(block, x, (rows, columns)).sum().backward()
        with torch.no_grad():
            run_fused(block, x, (rows, columns))


def compiled_by_sizes() -> dict[str, list[str]]:
    """Names of the kernels that other sizes compile, by what runs."""
    from mmvil.models import ViLBlock

    v1 = {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False}
    found = {}
    for kind, (first, *others) in SIZES.items():
        found[kind] = []
        for options in ({}, v1) if 'block' in kind else ({},):
            for reverse in (False, True):
                block = ViLBlock(64, reverse, drop_path_rate=0.5, **options)
                run_size(kind, block, *first)
                before = len(NAMES)
                for size in others:
                    run_size(kind, block, *size)
                found[kind] += NAMES[before:]
    return found


def main() -> None:
    """Patch Triton, run, report."""
    driver = Driver()
    driver.utils.get_device_properties = lambda _: {'max_shared_mem': 232448, 'multiprocessor_count': 132}
    triton.runtime.driver.set_active(driver)

    def compile_nothing(source: object, target: object = None, options: object = None, **_: object) -> Compiled:
        COUNTS['compiled'] += 1
        NAMES.append(source.fn.fn.__name__)
        return Compiled(source)

    key_and_values = fast_launch._key_and_values

    def noting(arguments: Sequence[object], specialised: Sequence[bool]) -> tuple:
        GIVEN[:] = arguments
        return key_and_values(arguments, specialised)

    triton.compiler.compile = compile_nothing  # where each kernel takes it from when it is first launched
    fast_launch._key_and_values = noting
    run_blocks([(1, 1, 1), (2, 4, 4), (3, 3, 5), (2, 8, 8), (1, 1, 16), (4, 5, 7), (16, 2, 2), (2, 9, 16), (2, 4, 4)])
    before = dict(COUNTS)
    run_blocks([(2, 4, 4), (2, 4, 4), (2, 9, 16), (2, 9, 16), (2, 9, 16)])  # from tapes, most of it
    run_blocks([(2, 3, 16), (5, 7, 11), (4, 16, 16), (3, 20, 3)])
    then = dict(COUNTS)
    sizes = compiled_by_sizes()
    joined = run_joined([(1, 4, 4), (3, 5, 7), (2, 35, 35)])
    found = {'first': before, 'then': then, 'sizes': sizes, 'joined': joined}
    print(json.dumps({**found, 'problems': PROBLEMS[:20]}))


if __name__ == '__main__':
    main()
