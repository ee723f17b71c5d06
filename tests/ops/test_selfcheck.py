"""The self-check finds what is wrong and survives what crashes."""

import json
import sys

import pytest
import torch

from mmvil.ops import custom_op, selfcheck
from mmvil.ops.custom_op import FORMS
from mmvil.ops.triton_chunkwise_tiles import tile_candidates

CPU = torch.device('cpu')
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')  # asked before the fixture below hides it
HEALTHY = json.dumps({'errors': dict.fromkeys(selfcheck.NAMES, 0.0)})


@pytest.fixture(autouse=True)
def without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)


def test_torch_backends_pass(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    assert selfcheck.main([]) == 0
    output = capsys.readouterr().out
    assert output.count('  ok ') == 12
    assert '--    triton: there is no CUDA device' in output


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    right = selfcheck.mlstm

    def wrong(q: torch.Tensor, k: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        return right(q, k + 1e-3 * (k - k.detach()), *rest, **options)

    monkeypatch.setattr(selfcheck, 'mlstm', wrong)
    assert selfcheck.main([]) == 1
    assert 'wrong: dk' in capsys.readouterr().out


def test_a_result_that_is_not_finite_is_wrong() -> None:
    case = selfcheck.cases('parallel', CPU)[0]
    passed, line = selfcheck.verdict(case, dict.fromkeys(selfcheck.NAMES, float('nan')))
    assert not passed
    assert 'wrong' in line


def test_a_crash_is_reported_and_survived(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '1')

    def command(number: int) -> list[str]:
        action = 'import os; os._exit(11)' if number == 1 else f'print("noise"); print({HEALTHY!r})'
        return [sys.executable, '-c', action]

    monkeypatch.setattr(selfcheck, 'child_command', command)
    assert selfcheck.main([]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if ' triton ' in line]
    assert len(lines) == len(selfcheck.cases('triton', CPU))
    assert [number for number, line in enumerate(lines) if 'WRONG' in line] == [1]
    assert 'code 11' in lines[1]


def test_a_hanging_compiler_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        selfcheck, 'child_command', lambda number: [sys.executable, '-c', 'import time; time.sleep(60)']
    )
    monkeypatch.setattr(selfcheck, 'CHILD_SECONDS', 0.5)
    (result,) = selfcheck.check_in_children(1)
    assert 'not finished' in result['failure']


def test_triton_cases_cover_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    found = selfcheck.cases('triton', CPU)
    assert {case.form for case in found} == set(FORMS)
    assert {case.dtype for case in found} == {'float16', 'float32'}  # the interpreter computes bfloat16 wrongly


@pytest.mark.parametrize('interpreted', ['0', '1'])
def test_chunkwise_cases_hand_on_states(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', interpreted)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: (9, 0))
    found = [case for case in selfcheck.cases('triton', torch.device('cuda', 0)) if case.form == 'chunkwise']
    assert len(found) == 2
    for case in found:
        chunks = {tiles.chunk for tiles in tile_candidates(case.dim, getattr(torch, case.dtype))}
        assert case.length > max(chunks)


@pytest.mark.parametrize('form', FORMS)
def test_triton_cases_run_here(form: str) -> None:
    """In the interpreter or on the device, as in all tests: kernels are made for one of them when they are imported."""
    case = selfcheck.Case('triton', form, 'float32', 20, 24, True)
    passed, line = selfcheck.verdict(case, selfcheck.check(case, DEVICE))
    assert passed, line


def test_kernels_that_do_not_compile_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain torch takes over in `mlstm`, which must not pass for a result of the kernels."""
    module = custom_op._module('quadratic')
    monkeypatch.setattr(custom_op, 'compile_failures', failures := {})
    monkeypatch.setattr(selfcheck, 'compile_failures', failures)
    monkeypatch.setattr(module, 'backward', lambda *_: (_ for _ in ()).throw(RuntimeError('PassManager::run failed')))
    with pytest.warns(UserWarning, match='do not compile'), pytest.raises(RuntimeError, match='PassManager'):
        selfcheck.check(selfcheck.Case('triton', 'quadratic', 'float32', 20, 24, True), DEVICE)
