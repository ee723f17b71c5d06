"""The backbone benchmark: its models, its check, its floor and its report, as far as they need no GPU."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import backbone_models as models
from benchmarks import bench_backbone as bench
from benchmarks.backbone_report import BLOCK_NAME, add_ratios, block_floor, draw, earlier_rows, known_bytes, rows_of

RATES = {'copy_bytes_per_second': 1e12, 'matmul_flop_per_second': 1e15}


def test_batches_have_about_the_same_tokens() -> None:
    sizes = {pixels: bench.batch_size(pixels) for pixels in bench.RESOLUTIONS}
    assert sizes == {224: 128, 384: 44, 512: 24, 768: 11, 1024: 6, 2048: 2}
    assert bench.batch_size(10_000) == 1


def test_variants_have_the_same_weights_and_give_features_of_both_ends() -> None:
    image = torch.randn(1, 3, 32, 32)
    plain = models.build_vil('plain', 'tiny', 32)
    models.draw_weights(plain)
    assert not plain.blocks[0].layer.fused
    outputs = []
    for name in ('plain', 'fused', 'parallel'):
        model = models.build_vil(name, 'tiny', 32)
        assert (model.blocks[0].layer.fused, model.blocks[0].layer.mlstm_backend == 'parallel') == (
            name == 'fused',
            name == 'parallel',
        )
        model.load_state_dict(plain.state_dict())
        outputs.append(models.features(model(image)))
    assert outputs[0].shape == (1, 384)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(('size', 'width', 'millions'), [('tiny', 192, 5.5), ('small', 384, 21.7)])
def test_deit_is_of_the_same_size_and_named(size: str, width: int, millions: float) -> None:
    model, made_by = models.build_deit(size, 224)
    model.eval()  # returns nothing in mmpretrain
    assert models.features(model(torch.randn(1, 3, 224, 224))).shape == (1, width)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.2)
    assert made_by.split()[0] in ('timm', 'mmpretrain')


def test_the_check_lets_rounding_pass_and_nothing_else() -> None:
    model = models.build_vil('plain', 'tiny', 32)
    models.draw_weights(model)
    image = torch.randn(1, 3, 32, 32)
    rounded = models.results(model, image, autocast=True)
    exact = models.results(model.double(), image.double(), autocast=False)
    rounding = models.relative_errors(rounded, exact)
    names = ['features', *(name for name, _ in model.named_parameters())]
    assert 1e-4 < rounding[0] < 5e-2
    assert 'error' not in bench.verdict(rounding, rounding, names)
    for place in (0, 5, -1):
        wrong = [x.clone() for x in rounded]
        wrong[place] *= 1.5
        found = bench.verdict(models.relative_errors(wrong, exact), rounding, names)
        assert found['error'].startswith('WRONG'), (place, found)
        assert found['worst_kind'] == BLOCK_NAME.sub('', names[place])
    wrong[3][...] = float('nan')
    assert 'inf' in bench.verdict(models.relative_errors(wrong, exact), rounding, names)['error']


def test_inference_is_compared_once_all_blocks_are_one_call() -> None:
    from mmvil.ops.block_chain import FIRST_CALLS

    calls = []

    def work() -> torch.Tensor:
        calls.append(len(calls))
        return torch.tensor([float(len(calls))])

    out = models.settled(work)
    assert out.dtype == torch.float64
    assert out.item() == len(calls)
    assert len(calls) > FIRST_CALLS + 1  # those before the recording one, that one, and one more


def test_captured_batches_are_compared_with_launched_ones() -> None:
    out = torch.tensor([3.0, 4.0])
    assert models.difference(lambda: out, lambda: out) == 0
    assert models.difference(lambda: out + torch.tensor([0.0, 0.1]), lambda: out) == pytest.approx(0.02, rel=1e-2)
    for error, right in ((0.019, True), (0.021, False), (float('nan'), False)):
        assert ('error' not in bench.graph_verdict({'graph_error': error}, 0.01, 1.0)) == right
        assert ('error' not in bench.graph_verdict({'bf16_graph_error': error}, 1e-9, 0.01)) == right


def test_kinds_of_parameters_are_judged_over_all_blocks() -> None:
    names = ['features', *(f'_orig_mod.blocks.{i}.layer.igate.bias' for i in range(16))]
    rounding = [0.01] * 17
    lucky_and_unlucky = [0.01, 0.05, *[0.01] * 15]
    found = bench.verdict(lucky_and_unlucky, rounding, names)
    assert 'error' not in found
    assert found['worst_kind'] == 'layer.igate.bias'
    assert found['times_rounding'] == round(((15 + 25) / 16) ** 0.5, 2)
    assert 'error' in bench.verdict([0.01, *[0.021] * 16], rounding, names)


def test_floor_is_that_of_bytes_or_of_products() -> None:
    tokens, dims = 196, 192
    plane = tokens * dims
    bytes_bound = block_floor(tokens, dims, {**RATES, 'matmul_flop_per_second': 1e30})
    assert bytes_bound['forward'] == pytest.approx(46 * plane / 1e12)
    assert bytes_bound['train'] == pytest.approx((46 + 88) * plane / 1e12)
    work_bound = block_floor(tokens, dims, {**RATES, 'copy_bytes_per_second': 1e30})
    cell = work_bound['forward'] * 1e15 - 12 * plane * dims
    assert 0 < cell <= 4 * tokens * (tokens + 1) * dims
    assert work_bound['train'] * 1e15 == pytest.approx(3 * 12 * plane * dims + 3.5 * cell)
    longer = block_floor(16 * 4096, dims, RATES)['forward'] / block_floor(4096, dims, RATES)['forward']
    assert longer == pytest.approx(16, rel=0.01)  # linear: the cheaper form is taken


def rows() -> list[dict[str, object]]:
    common = {'size': 'tiny', 'pixels': 224, 'images': 128, 'tokens': 196}
    deit = {'model': 'deit', 'forward': 900.0, 'forward_graph': 1000.0, 'train': 300.0, 'train_GiB': 2.0}
    fused = {'model': 'fused', 'forward': 500.0, 'forward_graph': 800.0, 'train': 150.0, 'train_GiB': 3.0}
    parallel = {'model': 'parallel', 'forward': 90.0}
    return [{**common, **row} for row in (deit, fused, parallel, {'model': 'plain', 'error': 'WRONG'})]


def test_ratios_compare_like_with_like() -> None:
    found = rows()
    add_ratios(found, 24, 192, RATES)
    deit, fused, parallel, wrong = found
    assert (fused['forward/deit'], fused['train/deit'], fused['memory/deit']) == (0.8, 0.5, 1.5)
    assert parallel['forward/deit'] == 0.1
    share = 800 * 24 * block_floor(196, 192, RATES)['forward']
    assert fused['forward_of_floor'] == f'{share:.0%}'
    assert not {'forward/deit', 'forward_of_floor'} & (set(deit) | set(wrong))


def test_known_bytes() -> None:
    unit = 2 * 10 * 192
    assert known_bytes('prepare_kernel', 2, 10, 192, 'train') == 12 * unit
    assert known_bytes('mix2d_kernel', 2, 10, 192, 'train') == 22 * unit
    assert known_bytes('mix2d_kernel', 2, 10, 192, 'forward') == 15 * unit
    assert known_bytes('mix2d_kernel', 2, 4096, 192, 'forward') == 18 * 2 * 4096 * 192  # keys, but no values
    assert known_bytes('ampere_gemm', 2, 10, 192, 'train') is None


def test_plot(tmp_path) -> None:
    for name in ('plot.svg', 'plot.png'):
        draw([*rows(), *({**row, 'pixels': 512} for row in rows())], tmp_path / 'figures' / name, 'test device')
        assert (tmp_path / 'figures' / name).stat().st_size > 5000
    with pytest.raises(ValueError, match=r"got 'plot\.pdf'"):
        draw(rows(), tmp_path / 'plot.pdf', 'test device')
    with pytest.raises(ValueError, match='nothing to draw'):
        draw([row for row in rows() if 'error' in row], tmp_path / 'plot.svg', 'test device')


def test_commands_of_the_processes() -> None:
    options = bench.parse(
        ['--cases', 'tiny:224', 'small:512', 'tiny:2048', 'tiny:512', '--modes', 'eager', '--images', '3']
    )
    assert bench.cases(options) == [('tiny', 224), ('small', 512), ('tiny', 2048), ('tiny', 512)]
    assert bench.warm_cases(bench.cases(options)) == [('tiny', 224), ('tiny', 2048), ('small', 512)]
    inner = bench.parse(bench.command(options, 'tiny', 224, ['deit', 'fused'], '--only-warm')[2:])
    assert (inner.sizes, inner.resolutions, inner.models) == (['tiny'], [224], ['deit', 'fused'])
    assert (inner.modes, inner.images, inner.only_warm, inner.profile) == (['eager'], 3, True, False)
    assert len(bench.cases(bench.parse([]))) == 3 * 6
    for wrong in ('huge:224', 'tiny', 'tiny:8'):
        with pytest.raises(SystemExit):
            bench.parse(['--cases', wrong])


def test_processes_run_in_turn_and_a_failure_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench.parse(['--cases', 'tiny:224', 'small:512', 'tiny:512', '--limit', '60'])

    def script(_: object, size: str, pixels: int, models: object, flag: str, file: str) -> list[str]:
        write = f'open({file!r}, "w").write({json.dumps({"rows": [size, pixels]})!r})'
        work = 'raise SystemExit("broken")' if size == 'small' else write
        return [bench.sys.executable, '-c', f'assert input() == "go"; {work}']

    monkeypatch.setattr(bench, 'command', script)
    found = list(bench.run_cases(options))
    assert [(size, pixels) for size, pixels, _ in found] == bench.cases(options)
    assert found[0][2] == {'rows': ['tiny', 224]}
    assert found[2][2] == {'rows': ['tiny', 512]}
    (row,) = found[1][2]['rows']
    assert (row['size'], row['pixels'], row['error']) == ('small', 512, 'failed: broken')


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    options = bench.parse(['--cases', 'tiny:224', '--limit', '1'])
    monkeypatch.setattr(bench, 'command', lambda *_: [bench.sys.executable, '-c', 'import time; time.sleep(60)'])
    ((_, _, found),) = bench.run_cases(options)
    assert found['rows'][0]['error'] == 'failed: took longer than 1.0 s'


def test_other_cases_of_a_result_file_stay(tmp_path) -> None:
    device = {'device': 'a GPU', 'torch': '1', 'triton': '2', 'commit': 'abc'}
    rows = [{'size': size, 'pixels': 224, 'model': 'fused', 'train': 1.0} for size in ('tiny', 'small')]
    path = tmp_path / 'result.json'
    nothing = {'rows': [], 'rates': {}}
    assert earlier_rows(path, device, [('tiny', 224)]) == nothing
    assert earlier_rows(None, device, [('tiny', 224)]) == nothing
    rates = {'tiny:224': RATES, 'small:224': RATES}
    path.write_text(json.dumps({'environment': device, 'rows': rows, 'rates': rates}))
    kept = earlier_rows(path, device, [('tiny', 224), ('base', 224)])
    assert kept == {'rows': rows[1:], 'rates': {'small:224': RATES}}
    with pytest.raises(ValueError, match="has commit 'abc', this is 'abd'"):
        earlier_rows(path, {**device, 'commit': 'abd'}, [])


def test_no_gpu_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match='measures on a GPU'):
        bench.main(['--sizes', 'tiny'])


def test_rows_of_several_files(tmp_path: Path) -> None:
    row = {'size': 'tiny', 'pixels': 224, 'model': 'fused', 'forward': 1.0}
    contents = {
        'old': ('card', [row, {**row, 'model': 'plain'}]),
        'new': ('card', [{**row, 'forward': 2.0}, {**row, 'pixels': 512}]),
        'other': ('another card', [row]),
    }
    paths = {name: tmp_path / f'{name}.json' for name in contents}
    for name, (device, found) in contents.items():
        paths[name].write_text(json.dumps({'environment': {'device': device}, 'rows': found}), encoding='utf-8')
    merged, device = rows_of([paths['old'], paths['new']])
    assert device == 'card'
    assert [(x['pixels'], x['model'], x['forward']) for x in merged] == [
        (224, 'fused', 2.0), (224, 'plain', 1.0), (512, 'fused', 1.0)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"one device, got those of \['another card', 'card'\]"):
        rows_of(paths.values())


def test_a_profile_without_memory_leaves_the_measured_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def profile(_: object, images: torch.Tensor, tokens: int, dims: int) -> list[tuple]:
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError
        return [(tokens, dims)]

    monkeypatch.setattr(bench, 'build', lambda *_: (torch.nn.Identity(), None))
    monkeypatch.setattr(bench, 'profile', profile)
    row = {'model': 'fused', 'size': 'tiny', 'pixels': 224, 'tokens': 196, 'forward': 1.0}
    few, many = dict(row), dict(row)
    bench.profile_model(few, torch.empty(2), {}, 192)
    bench.profile_model(many, torch.empty(3), {}, 192)
    assert few == {**row, 'profile': [(196, 192)]}
    assert many == {**row, 'error': 'out of memory'}
