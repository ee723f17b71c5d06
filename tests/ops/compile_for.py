"""Compile the quadratic kernels for a card that need not be there: python compile_for.py CAPABILITY BYTES DTYPE DH.

Prints one JSON line per kernel: its name and the shared memory of the first tile setting that fits, or of the last.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmvil.ops import triton_quadratic
from mmvil.ops import triton_quadratic_backward_kernels as backward_kernels
from mmvil.ops import triton_quadratic_kernels as kernels
from mmvil.ops.triton_launch import DeviceLimits, Tiles, head_pieces

ROWS = ('q', 'k', 'v', 'h', 'dh', 'dq', 'dk', 'dv')
DEVICE_CODE = {
    'forward': kernels.quadratic_forward_kernel,
    'query': backward_kernels.query_gradient_kernel,
    'key': backward_kernels.key_gradient_kernel,
    'value': backward_kernels.key_gradient_kernel,
}


def shared_memory(name: str, tiles: Tiles, capability: int, dtype: str, dim: int) -> int:
    """Compile one kernel as its launcher would and return the bytes of shared memory it takes."""
    function = DEVICE_CODE[name]
    first, second = head_pieces(dim)
    constants = {'DH': dim, 'DA': first, 'DB': second, 'ALIGN': 8, 'PRECISION': 'ieee'}
    constants |= {'BM': tiles.rows, 'BN': tiles.columns}
    if name in ('forward', 'query'):
        constants['SMALL'] = tiles.small
        constants |= {'WITH_H': True} if name == 'query' else {'WITH_E': True, 'SUMS': True}
    else:
        joint = first + second <= triton_quadratic.JOINT_KEY_COLUMNS
        constants |= {'WITH_K': name == 'key', 'WITH_V': name == 'value' or joint}
    signature = dict.fromkeys(function.arg_names, 'i32')
    signature |= {key: f'*{dtype}' for key in ROWS if key in signature}
    signature |= {key: '*fp32' for key in ('products', 'scores', 'stats', 'rows') if key in signature}
    signature |= {key: 'fp32' for key in ('log_scale', 'eps') if key in signature}
    signature |= dict.fromkeys(constants, 'constexpr')
    aligned = {(i,): [['tt.divisibility', 16]] for i, key in enumerate(signature) if signature[key][0] == '*'}
    source = ASTSource(function, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=tiles.options())
    return compiled.metadata.shared


def main() -> None:
    """Compile all four kernels."""
    capability, limit, dtype, dim = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    limits = DeviceLimits((capability // 10, capability % 10), limit, 1)
    for name in DEVICE_CODE:
        for tiles in triton_quadratic.tile_candidates(name, dim, 4 if dtype == 'fp32' else 2, limits):
            used = shared_memory(name, tiles, capability, dtype, dim)
            if used <= limit:
                break
        print(json.dumps([name, used]), flush=True)


if __name__ == '__main__':
    main()
