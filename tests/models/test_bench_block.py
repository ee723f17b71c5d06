"""Settings of the benchmark of blocks, as far as they need no GPU."""

import argparse

import pytest
import torch

from benchmarks import bench_block as bench
from mmvil.ops import block, block_backward, triton_chunkwise_tiles, triton_quadratic
from mmvil.ops.triton_launch import DeviceLimits, Tiles


def test_settings_are_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(triton_quadratic.STORED_TOKENS, 128, triton_quadratic.STORED_TOKENS[128])
    monkeypatch.setattr(triton_chunkwise_tiles, 'CHUNK', triton_chunkwise_tiles.CHUNK)
    monkeypatch.setitem(block.SETTINGS, 'mix_rows', block.SETTINGS['mix_rows'])
    keys = [*triton_quadratic.HALF_TILES['key'][128]]
    monkeypatch.setitem(triton_quadratic.HALF_TILES['key'], 128, keys)
    monkeypatch.setitem(triton_quadratic.STORED_TILES, 'matrix', triton_quadratic.STORED_TILES['matrix'])
    bench.assign('triton_quadratic.STORED_TOKENS[128]=0')
    bench.assign("block.SETTINGS['mix_rows'] = (2, 2, 4)")
    bench.assign("triton_quadratic.HALF_TILES['key'][128][0]=(64, 16, 4, 3)")
    bench.assign("triton_quadratic.STORED_TILES['matrix']=((64, 32, 4, 2, 16),)")
    bench.assign('triton_chunkwise_tiles.CHUNK=128')
    assert triton_quadratic.STORED_TOKENS[128] == 0
    limits = DeviceLimits((9, 0), 227 * 1024, 132)
    assert triton_chunkwise_tiles.choose_tiles(96, torch.bfloat16, limits).chunk == 128
    assert block.SETTINGS['mix_rows'] == (2, 2, 4)
    assert keys[0] == Tiles(64, 16, 4, 3)
    assert triton_quadratic.STORED_TILES['matrix'] == (Tiles(64, 32, 4, 2, 16),)


@pytest.mark.parametrize('text', ['block.NOWHERE=1', 'block.SETTINGS()=1', 'block.block_forward.x=1'])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r'a name or a place in a table of mmvil\.ops\.block'):
        bench.assign(text)


def test_scenes() -> None:
    assert [bench.scene(x) for x in ('T', 'S512 train')] == ['T', 'S512 train']
    for text in ('train', 'X', 'T  train'):
        with pytest.raises(argparse.ArgumentTypeError, match='expected one of'):
            bench.scene(text)


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_without_a_device() -> None:
    with pytest.raises(SystemExit, match='there is none'):
        bench.main([])


@pytest.mark.gpu
def test_a_scene_with_another_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(block_backward.FLAT_TILES, 'query', block_backward.FLAT_TILES['query'])
    assert bench.main(['--scenes', 'T train', '--set', "block_backward.FLAT_TILES['query']=(32, 32, 1, 2, 16)"]) == 0
    assert 'us a block' in capsys.readouterr().out
