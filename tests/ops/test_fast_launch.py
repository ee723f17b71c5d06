"""Fast launches against Triton's own: what reaches the card, what is compiled, and when Triton is asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmvil.ops import triton_quadratic, triton_quadratic_kernels
from mmvil.ops.fast_launch import FastKernel, FastKernels, _triton_is_known

SPANS = triton_quadratic.SCAN_SPANS
needs_known_triton = pytest.mark.skipif(not _triton_is_known(), reason='this Triton launches all kernels itself')
RECORDER = Path(__file__).with_name('launch_recorder.py')


def record(*arguments: str, script: Path = RECORDER) -> dict:
    """Run a script outside of the interpreter."""
    environment = {
        **os.environ,
        'TRITON_INTERPRET': '0',
        'PYTHONPATH': os.pathsep.join([str(RECORDER.parents[2]), *sys.path]),
    }
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_known_triton
def test_what_reaches_the_card_is_what_triton_sends() -> None:
    found = record()
    assert found['fast'] == 'FastKernel'
    assert len(found['pairs']) == 3 * 2 * 17
    for fast, plain in found['pairs']:
        assert fast == plain
    # One entry for each compiled kernel that a direct launch is known for, per device; streams share them.
    assert found['sizes'] == [11, 11, 22]
    assert found['hooked'] == 2


@pytest.fixture(scope='module')
def checked() -> dict:
    """What `launch_checker.py` found."""
    return record(script=RECORDER.with_name('launch_checker.py'))


@needs_known_triton
def test_every_launch_of_the_launchers_fits_its_kernel(checked: dict) -> None:
    assert checked['problems'] == []
    assert checked['first']['compiled'] < checked['first']['all'] / 4
    assert checked['then']['all'] > checked['first']['all']
    assert checked['then']['from tapes'] > 4 * 3 * 15  # of four blocks, the last three training steps of one size
    assert checked['joined'] >= 3 * 2 * 3 * (6 + 5 + 11)  # of three blocks as one, the last two calls of three sizes
    assert checked['then']['compiled'] == checked['first']['compiled']  # other image sizes compile nothing


@needs_known_triton
@pytest.mark.parametrize(
    'kind', ['block', 'long block', 'border block', 'chunkwise block', 'quadratic', 'long quadratic', 'chunkwise']
)
def test_ten_batch_and_image_sizes_compile_nothing(kind: str, checked: dict) -> None:
    """Both forms of the operator; blocks of both versions and directions, in training and inference."""
    assert checked['sizes'][kind] == []


@needs_known_triton
@pytest.mark.parametrize('version', ['3.4.1', '3.9.1', '4.0.0+git'])
def test_unknown_triton_versions_launch_as_ever(version: str) -> None:
    found = record(version)
    assert found['fast'] == 'JITFunction'
    assert all(fast == plain for fast, plain in found['pairs'])


def test_other_attributes_of_a_module_are_given_as_they_are() -> None:
    kernels = FastKernels(triton_quadratic_kernels)
    assert kernels.tl is triton_quadratic_kernels.tl
    with pytest.raises(AttributeError, match='no_such_kernel'):
        _ = kernels.no_such_kernel


@pytest.mark.gpu
def test_results_and_caches_on_a_gpu() -> None:
    kernels, scan = FastKernels(triton_quadratic_kernels), triton_quadratic_kernels.gate_scan_kernel
    assert isinstance(kernels.gate_scan_kernel, FastKernel)
    memory = torch.randn(2 * 4 * 320 + 1, device='cuda')
    for offset, length in ((0, 64), (1, 64), (0, 50), (0, 1), (1, 300), (0, 300), (0, 64)):
        igate, fgate = (memory[offset : offset + 8 * length] for _ in range(2))
        pitch = -(-length // 64)
        results = []
        for kernel in (kernels.gate_scan_kernel, scan):
            stats = torch.zeros(7, 8, 64 * pitch, device='cuda')
            kernel[(8,)](igate, fgate, stats, length, pitch, 8 * pitch, 0, **SPANS)
            results.append(stats)
        assert torch.equal(*results)
    assert len(kernels.gate_scan_kernel._found) == 2  # aligned and not: no length compiles anything


@pytest.mark.gpu
def test_streams_graphs_and_wrong_devices() -> None:
    kernel = FastKernels(triton_quadratic_kernels).gate_scan_kernel
    igate, fgate = torch.randn(2, 4 * 64, device='cuda')

    def launch(stats: torch.Tensor, gate: torch.Tensor = fgate) -> torch.Tensor:
        kernel[(4,)](igate, gate, stats, 64, 1, 4, 0, **SPANS)
        return stats

    expected = launch(torch.zeros(7, 4, 64, device='cuda'))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a launch on another stream would overtake this
        stats = torch.zeros(7, 4, 64, device='cuda')
        launch(stats)
    stream.synchronize()
    assert torch.equal(stats, expected)
    graph, stats = torch.cuda.CUDAGraph(), torch.zeros(7, 4, 64, device='cuda')
    with torch.cuda.graph(graph):
        launch(stats)
    assert not stats.any()
    graph.replay()
    assert torch.equal(stats, expected)
    with pytest.raises(ValueError, match='cpu'):
        launch(stats, fgate.cpu())
