import csv
import io
import json

import pytest
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image

from mmvil.datasets.vtab_tasks import GROUPS, TASKS
from mmvil.evaluation.campaign import Campaign, campaign_identity
from mmvil.evaluation.command import main
from mmvil.evaluation.figure import draw_summary
from mmvil.evaluation.protocol import STANDARD, load_settings
from mmvil.evaluation.published import PUBLISHED, PUBLISHED_TASKS
from mmvil.evaluation.summary import format_summary, summarize, write_summary

BEST = 2.5e-4


def make_record(name, correct, total, splits, storage):
    identity = {'count': total, 'list_hash': name, 'images_hash': name, 'storage': storage}
    return {
        'accuracy': 100 * correct / total,
        'correct': correct,
        'total': total,
        'training': {'diverged': False},
        'environment': {'device': 'test device'},
        'data': dict.fromkeys(splits, identity),
    }


def make_campaign(work_dir, tasks=tuple(TASKS), smoke=False, overrides=None, storage=None, finals=5):
    """A campaign with records as the worker writes them: test scores 50.0 to 50.4 plus the number of the task."""
    settings = load_settings(Config({'model': {'backbone': {'type': 'X'}}, 'protocol': {}}), overrides)
    campaign = Campaign.start_or_join(
        work_dir, campaign_identity(settings, 'c' * 64, smoke), {'versions': {'mmvil': '1'}, 'commit': 'abc'}
    )
    for name in tasks:
        number = list(TASKS).index(name)

        kind = (storage or {}).get(name, 'zip (JPEG)')
        for run in campaign.tuning_runs(TASKS[name]):
            hits = 120 if run.learning_rate == BEST else 110
            campaign.save(run, make_record(name, hits, 200, ('train800', 'val200'), kind))
        for run in campaign.final_runs(TASKS[name])[:finals]:
            campaign.save(run, make_record(name, 500 + run.seed + 10 * number, 1000, ('train800val200', 'test'), kind))
    return campaign


def test_means_and_deviations(tmp_path):
    make_campaign(tmp_path)
    summary = summarize(tmp_path)
    entry = summary['tasks'][3]
    assert entry['mean'] == pytest.approx(53.2)
    assert entry['std'] == pytest.approx(0.158113883)  # of 53.0 to 53.4, sample standard deviation
    assert (entry['learning_rate'], entry['seeds'], entry['validation']) == (BEST, 5, 60.0)
    means = [summary['groups'][group]['mean'] for group in GROUPS]
    assert means == pytest.approx([53.2, 58.7, 64.7])
    assert summary['average'] == pytest.approx((7 * 53.2 + 4 * 58.7 + 8 * 64.7) / 19)
    assert summary['mean_of_groups'] == pytest.approx((53.2 + 58.7 + 64.7) / 3)
    text = format_summary(summary)
    assert '| mean over 19 tasks ' in text
    assert '| mean of the 3 group means ' in text
    assert f'{summary["average"]:.2f}' in text
    assert 'Data: zip (JPEG)' in text


@pytest.mark.parametrize(
    ('tasks', 'finals', 'complete'), [(list(TASKS)[:18], 5, 18), (['kitti'], 5, 1), (list(TASKS), 4, 0)]
)
def test_no_mean_over_19_without_19(tmp_path, tasks, finals, complete):
    make_campaign(tmp_path, tasks, finals=finals)
    summary = summarize(tmp_path)
    assert (summary['complete'], summary['average'], summary['mean_of_groups']) == (complete, None, None)
    text = format_summary(summary)
    line = next(line for line in text.splitlines() if line.startswith('| mean over 19 tasks'))
    assert f'{complete}/19' in line
    if finals == 4:
        assert summary['tasks'][0]['mean'] == pytest.approx(50.15)
        assert '4/5' in text


def test_tiny_test_sets_come_with_their_spread(tmp_path):
    make_campaign(tmp_path, ['kitti'])
    line = next(line for line in format_summary(summarize(tmp_path)).splitlines() if line.startswith('| kitti'))
    assert '64.20 | 0.16 |' in line


def test_a_smoke_run_is_never_a_vtab_score(tmp_path):
    make_campaign(tmp_path, smoke=True)
    summary = summarize(tmp_path)
    assert summary['average'] is None
    assert summary['smoke_average'] == pytest.approx(59.2, abs=0.1)
    text = format_summary(summary)
    assert text.startswith('# Smoke run (not VTAB-1K)')
    assert all('smoke' in line.lower() for line in text.splitlines() if 'mean' in line or 'test top-1' in line)
    assert not any(name in text for name in PUBLISHED)  # nothing to compare with
    paths = write_summary(summary, tmp_path / 'out')
    assert all(path.name.startswith('smoke_summary.') for path in paths)
    assert all(row[0] in ('kind', 'smoke') for row in csv.reader(io.StringIO(paths[1].read_text())))


def titles(summary, monkeypatch):
    """All headings of the bar plot."""
    said = []
    suptitle = Figure.suptitle
    monkeypatch.setattr(
        Figure, 'suptitle', lambda self, text, **options: said.append(text) or suptitle(self, text, **options)
    )
    draw_summary(summary)
    return ' '.join(said)


def test_the_bar_plot_says_what_it_is(tmp_path, monkeypatch):
    make_campaign(tmp_path / 'a', ['kitti'])
    assert titles(summarize(tmp_path / 'a'), monkeypatch) == 'VTAB-1K, 1/19 tasks complete'
    make_campaign(tmp_path / 'b', smoke=True)
    assert titles(summarize(tmp_path / 'b'), monkeypatch) == 'SMOKE RUN on a miniature: these are not VTAB scores'
    with pytest.raises(ValueError, match=r"no published scores for \['X'\]"):
        draw_summary(summarize(tmp_path / 'a'), ['X'])


def test_another_protocol_is_named(tmp_path, monkeypatch):
    make_campaign(tmp_path, ['kitti'], overrides={'protocol.epochs': 100})
    summary = summarize(tmp_path)
    assert 'Not the published protocol: protocol.epochs: 100 instead of 50' in format_summary(summary)
    assert 'not by the published protocol' in titles(summary, monkeypatch)


def test_different_storage_is_never_averaged(tmp_path):
    make_campaign(tmp_path, storage={'cifar': 'TFDS'})
    summary = summarize(tmp_path)
    assert (summary['complete'], summary['average'], summary['mean_of_groups']) == (19, None, None)
    assert summary['groups']['natural']['mean'] is None
    assert summary['groups']['structured']['mean'] == pytest.approx(64.7)
    lines = format_summary(summary).splitlines()
    assert [line.split('|')[1].strip() for line in lines if 'mixed data' in line] == [
        'mean of natural',
        'mean over 19 tasks',
        'mean of the 3 group means',
    ]
    assert 'different storage (TFDS, zip (JPEG))' in format_summary(summary)


def test_runs_on_different_data_are_refused(tmp_path):
    campaign = make_campaign(tmp_path, ['kitti'])
    path = campaign.record_path(campaign.final_runs(TASKS['kitti'])[0])
    record = json.loads(path.read_text())
    record['data']['test']['images_hash'] = 'other'
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match='runs of kitti saw different data for test'):
        summarize(tmp_path)
    record['data']['test']['images_hash'] = ''  # of images that were streamed no hash is taken
    path.write_text(json.dumps(record))
    assert summarize(tmp_path)['campaign']['data']['kitti']['test']['images_hash'] == 'kitti'


def test_tuning_and_test_on_different_storage_are_refused(tmp_path):
    campaign = make_campaign(tmp_path, ['kitti'])
    for run in campaign.final_runs(TASKS['kitti']):
        campaign.save(run, make_record('kitti', 600, 1000, ('train800val200', 'test'), 'lossless (PNG)'))
    with pytest.raises(ValueError, match='runs of kitti saw images of different storage'):
        summarize(tmp_path)


def test_files_and_command(tmp_path, capsys):
    make_campaign(tmp_path)
    assert main(['summarize', str(tmp_path), '--out', str(tmp_path / 'out')]) == 0
    assert '# VTAB-1K' in capsys.readouterr().out
    stored = json.loads((tmp_path / 'out/summary.json').read_text())
    assert stored['campaign']['settings']['protocol']['epochs'] == 50
    assert stored['campaign']['environment']['commit'] == 'abc'
    assert stored['campaign']['data']['cifar']['test']['images_hash'] == 'cifar'
    assert stored['campaign']['devices'] == ['test device']
    rows = list(csv.DictReader(io.StringIO((tmp_path / 'out/summary.csv').read_text())))
    assert [row['task'] for row in rows] == list(TASKS)
    assert float(rows[3]['mean']) == pytest.approx(53.2)
    assert Image.open(tmp_path / 'out/summary.png').size[0] > 800
    assert main(['summarize', str(tmp_path / 'nothing')]) == 2


def test_published_averages_are_means_over_19(tmp_path):
    for score in PUBLISHED.values():
        mean = (7 * score.natural + 4 * score.specialized + 8 * score.structured) / 19
        assert mean == pytest.approx(score.average, abs=0.1)
    averages = {'DeiT-T': 65.52, 'DeiT-S': 67.38, 'DeiT-B': 70.35, 'DeiT-III-S': 67.57, 'DeiT-III-B': 70.63}
    for model, scores in PUBLISHED_TASKS.items():
        assert list(scores) != []
        assert set(scores) == set(TASKS)
        assert sum(scores.values()) / 19 == pytest.approx(averages[model], abs=0.02)
    assert STANDARD['protocol']['seeds'] == [0, 1, 2, 3, 4]


def test_low_scores_and_revisions_are_no_faults(tmp_path):
    make_campaign(tmp_path, ['caltech101', 'cifar'])
    summary = summarize(tmp_path)
    assert [PUBLISHED_TASKS[model]['cifar'] < 65 for model in PUBLISHED_TASKS] == [True] * 5
    assert summary['tasks'][1]['mean'] == pytest.approx(51.2)
    assert summary['remarks'] == ['Data: zip (JPEG)', 'caltech101: revision with 1,000 test images']
