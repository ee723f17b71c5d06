"""Check every mLSTM backend usable on this machine against float64: output and all five gradients, in under a minute.

    python -m mmvil.ops.selfcheck

Each case of the Triton kernels has a process of its own, all at the same time: compiling takes most of the time, and a
compiler that takes its process down is reported and survived. The exit code is 1 if any backend that should work is
wrong, crashes or does not finish, else 0.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .custom_op import FORMS, compile_failures, mlstm_triton
from .mlstm import TORCH_BACKENDS, available_backends, mlstm
from .reference import mlstm_parallel
from .triton_launch import interpreting, why_not_dtype

__all__ = ['Case', 'cases', 'check', 'main', 'verdict']

NAMES = ('h', 'dq', 'dk', 'dv', 'digate', 'dfgate')
# Largest relative L2 error against float64 on the same rounded inputs.
LIMITS = {'float64': 1e-6, 'float32': 1e-4, 'float16': 5e-3, 'bfloat16': 2e-2}
# Gate gradients sum what nearly cancels; in float64 the stabiliser counts as a constant in some backends.
GATE_FACTOR = 2.5
CHILD_SECONDS = 50
"""Time that compiling and running all Triton cases may take."""
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        backend: Backend of `mlstm`, or 'triton'.
        form: Form of the Triton kernels, empty for the others.
        dtype: Name of q's dtype.
        length: S.
        dim: DH.
        reverse: Reading direction.
    """

    backend: str
    form: str
    dtype: str
    length: int
    dim: int
    reverse: bool

    def name(self) -> str:
        """Readable label."""
        direction = 'backwards' if self.reverse else 'forwards'
        return f'{self.backend} {self.form} {self.dtype} S={self.length} DH={self.dim} {direction}'.replace('  ', ' ')


def cases(backend: str, device: torch.device) -> list[Case]:
    """List what is compared for a backend.

    Args:
        backend: Backend of `mlstm`.
        device: Where it runs.

    Returns:
        Cases, cheapest first.
    """
    if backend != 'triton':
        return [
            Case(backend, '', dtype, 49, 24, reverse) for dtype in ('float64', 'float32') for reverse in (False, True)
        ]
    half = next(x for x in ('bfloat16', 'float16') if _runs(x, device))
    # Long enough that the chunkwise form hands on states, whatever its chunks: 128 or 256 tokens.
    lengths = {'quadratic': 49, 'chunkwise': 300} if interpreting() else {'quadratic': 197, 'chunkwise': 600}
    dim = 24 if interpreting() else 96
    return [
        Case(backend, form, dtype, lengths[form], 24 if dtype == 'float32' else dim, dtype == 'float32')
        for dtype in (half, 'float32')
        for form in FORMS
    ]


def _runs(dtype: str, device: torch.device) -> bool:
    """Whether the Triton kernels take a dtype on a device."""
    return why_not_dtype(getattr(torch, dtype), device.type, device.index) is None


def check(case: Case, device: torch.device) -> dict[str, float]:
    """Run one case.

    Args:
        case: What to run.
        device: Where.

    Returns:
        Relative L2 error of h and each gradient; NaN where something is not finite.

    Raises:
        RuntimeError: The Triton kernels of the case do not compile.
    """
    generator = torch.Generator().manual_seed(case.length + case.dim)
    shape, dtype = (2, 2, case.length, case.dim), getattr(torch, case.dtype)
    common = 2 * case.dim**-0.25  # a part that q and k share keeps the normaliser from cancelling
    q, k, v, dh = (torch.randn(shape, generator=generator) for _ in range(4))
    igate, fgate = (torch.randn(shape[:3], generator=generator) for _ in range(2))
    inputs = [x.to(device, dtype) for x in (q + common, k + common, v)] + [x.to(device) for x in (igate, fgate + 3)]
    reference = _gradients(lambda *x: mlstm_parallel(*x, case.reverse, EPS), [x.cpu().double() for x in inputs], dh)
    if case.backend == 'triton':
        actual = _gradients(lambda *x: mlstm_triton(*x, case.reverse, EPS, case.form), inputs, dh)
        if (case.form, dtype, case.dim) in compile_failures:
            raise RuntimeError(compile_failures[case.form, dtype, case.dim])
    else:
        actual = _gradients(lambda *x: mlstm(*x, reverse=case.reverse, eps=EPS, backend=case.backend), inputs, dh)
    norms = [x.norm().item() for x in reference]
    norms[5] = max(norms[4:])
    errors = [(x.cpu().double() - y).norm().item() / norm for x, y, norm in zip(actual, reference, norms, strict=True)]
    return dict(zip(NAMES, errors, strict=True))


def _gradients(run: Callable[..., Tensor], inputs: list[Tensor], dh: Tensor) -> list[Tensor]:
    """H and the gradients of all inputs; dh is rounded to h's dtype as the kernels see it."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h = run(*leaves)
    rounded = dh.to(torch.bfloat16).to(h)  # exact in every dtype that is compared
    return [h.detach(), *torch.autograd.grad(h, leaves, rounded)]


def verdict(case: Case, errors: dict[str, float]) -> tuple[bool, str]:
    """Compare the errors of a case with its limits.

    Args:
        case: The case.
        errors: From `check`.

    Returns:
        Whether all are within, and a line about the worst.
    """
    limit = LIMITS[case.dtype]
    shares = {name: error / (limit * (GATE_FACTOR if 'gate' in name else 1)) for name, error in errors.items()}
    bad = [name for name, share in shares.items() if not share <= 1]
    worst = bad[0] if bad else max(shares, key=shares.get)
    line = f'worst {worst} {errors[worst]:.1e}, limit {limit * (GATE_FACTOR if "gate" in worst else 1):.0e}'
    return not bad, line + (f'; wrong: {", ".join(bad)}' if bad else '')


def child_command(number: int) -> list[str]:
    """Command that runs one Triton case and prints its result as the last line."""
    return [sys.executable, '-m', 'mmvil.ops.selfcheck', '--child', str(number)]


def run_child(number: int, device: torch.device) -> None:
    """Run one Triton case and print the result as JSON, for the parent to read.

    Args:
        number: Number of the case.
        device: Where.
    """
    try:
        result = {'errors': check(cases('triton', device)[number], device)}
    except Exception as error:
        result = {'failure': f'{type(error).__name__}: {error}'[:300]}
    print(json.dumps(result), flush=True)


def check_in_children(count: int) -> list[dict]:
    """Run all Triton cases, each in a process of its own; a crash ends one case, not the check.

    Args:
        count: Number of cases.

    Returns:
        Per case {'errors': ...} or {'failure': why}.
    """
    children = [
        subprocess.Popen(child_command(number), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for number in range(count)
    ]
    deadline, results = time.monotonic() + CHILD_SECONDS, []
    for child in children:
        try:
            output, _ = child.communicate(timeout=max(deadline - time.monotonic(), 0.1))
            results.append(json.loads(output.splitlines()[-1]))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            results.append({'failure': f'not finished within {CHILD_SECONDS} s; what was compiled is kept, try again'})
        except (IndexError, json.JSONDecodeError):
            results.append({'failure': f'its process crashed with code {child.returncode}'})
    return results


def main(arguments: list[str] | None = None) -> int:
    """Check everything and print one line per case.

    Args:
        arguments: Command line, default that of the process.

    Returns:
        Exit code: 1 if a usable backend missed a limit or crashed.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--child', type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    if options.child is not None:
        run_child(options.child, device)
        return 0
    name = torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'
    print(f'mLSTM backends on {name}, torch {torch.__version__}')
    good = True
    for backend, reason in available_backends().items():
        if reason is not None:
            print(f'  --    {backend}: {reason}')
            continue
        todo = cases(backend, device)
        found = check_in_children(len(todo)) if backend not in TORCH_BACKENDS else [None] * len(todo)
        for case, result in zip(todo, found, strict=True):
            result = result or {'errors': check(case, device)}
            passed, line = verdict(case, result['errors']) if 'errors' in result else (False, result['failure'])
            good = good and passed
            print(f'  {"ok   " if passed else "WRONG"} {case.name()}: {line}', flush=True)
    print('all usable backends agree with float64' if good else 'something is WRONG, see above')
    return 0 if good else 1


if __name__ == '__main__':
    sys.exit(main())
