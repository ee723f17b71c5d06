import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mmvil.datasets.vtab_sources import DataRoot
from mmvil.datasets.vtab_tasks import SPLITS, find_task
from mmvil.evaluation import worker
from mmvil.evaluation.campaign import Campaign, campaign_identity
from mmvil.evaluation.models import ModelFactory
from mmvil.evaluation.protocol import Run, select_learning_rate
from mmvil.evaluation.provenance import WorkerPlace, find_place
from mmvil.evaluation.run import run_campaign
from mmvil.evaluation.summary import summarize
from mmvil.evaluation.training import Evaluation

REPOSITORY = Path(__file__).parents[2]
WORKER = """
import sys
from mmvil.evaluation.run import run_campaign
work_dir, config, root = sys.argv[1:]
run_campaign(work_dir, config, None, root, ['eurosat', 'kitti'], from_scratch=True, poll_seconds=0.1,
             say=lambda text: print(text, flush=True))
"""
SUICIDE = """
import os, pathlib, signal, sys
rename = os.replace
def die_before_the_fourth(source, target):
    if 'runs' in str(target) and len(list(pathlib.Path(sys.argv[1], 'runs').rglob('*.json'))) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = die_before_the_fourth
"""


def start(work_dir, config, root, said, **options):
    return run_campaign(
        work_dir, config, None, str(root), from_scratch=True, say=said.append, poll_seconds=0.01, **options
    )


def records_of(work_dir):
    return {
        path.relative_to(work_dir / 'runs').as_posix(): json.loads(path.read_text())
        for path in (work_dir / 'runs').rglob('*.json')
    }


@pytest.fixture(scope='module')
def finished(tiny_config, tiny_root, tmp_path_factory):
    """A campaign over two tasks, from start to end, and what it said."""
    work_dir, said = tmp_path_factory.mktemp('finished') / 'work', []
    start(work_dir, tiny_config, tiny_root, said, tasks=['eurosat', 'kitti'])
    return work_dir, said


def test_every_run_is_recorded_with_what_it_depends_on(finished):
    work_dir, said = finished
    records = records_of(work_dir)
    assert len(records) == 2 * (2 * 2 + 2)
    record = records['eurosat/tune-lr0.001-seed1.json']
    assert record['run'] == {'task': 'eurosat', 'phase': 'tune', 'learning_rate': 1e-3, 'seed': 1}
    assert record['kind'] == 'smoke'
    assert (record['total'], record['training']['steps']) == (8, 4)
    assert record['accuracy'] == pytest.approx(100 * record['correct'] / 8)
    assert set(record['data']) == {'train800', 'val200'}
    assert re.fullmatch('[0-9a-f]{64}', record['data']['val200']['images_hash'])
    assert record['data']['val200']['storage'] == 'zip (JPEG)'
    assert record['environment']['versions']['torch']
    assert any(text.startswith('estimate: ') for text in said)
    assert any('SMOKE RUN' in text for text in said)
    assert any(re.search(r'\| kitti +\| +4/4 \|', text) for text in said)  # the table of what is done
    assert all(text.startswith('SMOKE ') for text in said if re.search(r'\[\d+/12\]', text))
    assert 'SMOKE RUN' in (work_dir / 'progress.md').read_text()


def test_the_final_phase_uses_the_chosen_rate_and_all_thousand(finished):
    campaign = Campaign(finished[0])
    for name in ('eurosat', 'kitti'):
        task = find_task(name)
        scores = {
            rate: [campaign.record(Run(name, 'tune', rate, seed))['correct'] for seed in (0, 1)]
            for rate in (1e-2, 1e-3)
        }
        rate = select_learning_rate(scores, [1e-2, 1e-3])
        assert campaign.chosen_rate(task) == rate
        finals = [campaign.record(run) for run in campaign.final_runs(task)]
        assert [record['run']['learning_rate'] for record in finals] == [rate, rate]
        assert all(set(record['data']) == {'train800val200', 'test'} for record in finals)
        assert all((record['total'], record['training']['steps']) == (12, 6) for record in finals)


def test_a_finished_campaign_repeats_nothing_and_a_lost_run_is_done_again_alike(
    finished, tiny_config, tiny_root, tmp_path
):
    work_dir = shutil.copytree(finished[0], tmp_path / 'work')
    before = records_of(work_dir)
    lost = work_dir / 'runs/eurosat/tune-lr0.01-seed1.json'
    lost.unlink()
    said = []
    start(work_dir, tiny_config, tiny_root, said, tasks=['eurosat', 'kitti'])
    assert sum(bool(re.search(r'\[\d+/12\]', text)) for text in said) == 1
    after = records_of(work_dir)
    assert set(after) == set(before)
    again, first = after['eurosat/tune-lr0.01-seed1.json'], before['eurosat/tune-lr0.01-seed1.json']
    assert again['correct'] == first['correct']
    assert again['training']['final_loss'] == first['training']['final_loss']  # bit for bit, in a fresh process state
    assert all(after[name] == before[name] for name in before if after[name] is not again)


def test_other_settings_do_not_mix_with_a_campaign(finished, tiny_config, tiny_root, tmp_path):
    work_dir = shutil.copytree(finished[0], tmp_path / 'work')
    with pytest.raises(ValueError, match=r'settings.protocol.epochs: 2 there, 3 here'):
        start(work_dir, tiny_config, tiny_root, [], overrides={'protocol.epochs': 3}, tasks=['eurosat'])
    start(work_dir, tiny_config, tiny_root, [], overrides={'runtime.eval_batch_size': 3}, tasks=['eurosat'])
    path = work_dir / 'runs/eurosat/tune-lr0.01-seed1.json'
    path.write_text(path.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(ValueError, match='is not a record of this campaign'):
        start(work_dir, tiny_config, tiny_root, [], tasks=['eurosat'])


def test_tuning_works_without_any_test_image_and_opens_no_test_file(tiny_config, tiny_root, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_root, tmp_path / 'vtab-1k')
    for split in ('test', 'train800val200'):  # a list that would be read is a directory, an image is not there
        shutil.rmtree(root / 'kitti/images' / split)
        (root / f'kitti/{split}.txt').unlink()
        (root / f'kitti/{split}.txt').mkdir()
    opened, watching = [], [True]  # a hook cannot be taken off again
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == 'open' else None)
    campaign = start(tmp_path / 'work', tiny_config, root, [], tasks=['kitti'], phase='tune')
    watching.clear()
    inside = [Path(path).relative_to(root).as_posix() for path in opened if path.startswith(str(root))]
    assert any(path.startswith('kitti/images/val200/') for path in inside)
    assert {Path(path).parts[2] for path in inside if '/images/' in path} == {'train800', 'val200'}
    assert not [path for path in inside if 'test' in path or 'train800val200' in path]
    assert campaign.count_runs(find_task('kitti'), ('tune',)) == (4, 4)
    with pytest.raises(ValueError, match=r'kitti: test.txt'):
        start(tmp_path / 'work', tiny_config, root, [], tasks=['kitti'], phase='final')


def test_the_final_phase_alone_needs_the_tuning_phase(tiny_config, tiny_root, tmp_path):
    with pytest.raises(ValueError, match='the final phase needs the tuning phase'):
        start(tmp_path / 'work', tiny_config, tiny_root, [], tasks=['kitti'], phase='final')
    with pytest.raises(ValueError, match="phase must be 'tune', 'final' or 'all', got 'test'"):
        start(tmp_path / 'work', tiny_config, tiny_root, [], tasks=['kitti'], phase='test')


def test_faults_stop_before_any_training(tiny_config, tiny_root, tmp_path):
    root = shutil.copytree(tiny_root, tmp_path / 'vtab-1k')
    (root / 'kitti/images/test/000003.jpg').unlink()
    with (root / 'eurosat/val200.txt').open('a') as file:
        file.write('\nx.jpg 99\n')
    with pytest.raises(ValueError, match='the data have 4 faults') as error:
        start(tmp_path / 'work', tiny_config, root, [], tasks=['eurosat', 'kitti'])
    assert 'kitti: test.txt line 4: images/test/000003.jpg is missing' in str(error.value)
    assert 'eurosat: val200.txt line 10: the label must be from 0 to 9, got 99' in str(error.value)
    assert not (tmp_path / 'work').exists()


def test_a_process_decodes_each_split_once_and_resets_one_model(tiny_config, tiny_root, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_root, tmp_path / 'vtab-1k')
    for split in ('train800', 'val200', 'train800val200'):  # one class of four: the head has four all the same
        path = root / f'kitti/{split}.txt'
        path.write_text(''.join(f'{line.rsplit(" ", 1)[0]} 0\n' for line in path.read_text().splitlines()))
    loads, builds, heads = [], [], []
    load, build, fresh = worker.load_split, ModelFactory._build, ModelFactory.fresh
    monkeypatch.setattr(worker, 'load_split', lambda *args, **more: loads.append(args[2:4]) or load(*args, **more))
    monkeypatch.setattr(ModelFactory, '_build', lambda *args: builds.append(1) or build(*args))
    monkeypatch.setattr(ModelFactory, 'fresh', lambda self, num, seed: heads.append(num) or fresh(self, num, seed))
    start(tmp_path / 'work', tiny_config, root, [], tasks=['eurosat', 'kitti'])
    assert loads == [(name, split) for name in ('eurosat', 'kitti') for split in SPLITS]
    assert len(builds) == 1
    assert heads[-12:] == [10] * 6 + [4] * 6


def test_a_diverged_run_counts_as_nothing_right_and_does_not_win(tiny_config, tiny_root, tmp_path, monkeypatch):
    train = worker.train_model

    def diverge(model, split, settings, rate, seed):
        training = train(model, split, settings, rate, seed)
        return replace(training, diverged=True, final_loss=math.nan) if rate == 1e-2 else training

    monkeypatch.setattr(worker, 'train_model', diverge)
    monkeypatch.setattr(worker, 'count_correct', lambda model, split, size: Evaluation(len(split), len(split), 1.0))
    campaign = start(tmp_path / 'work', tiny_config, tiny_root, [], tasks=['kitti'])
    tuned = {run: campaign.record(run) for run in campaign.tuning_runs(find_task('kitti'))}
    assert [record['correct'] for run, record in tuned.items() if run.learning_rate == 1e-2] == [0, 0]
    assert [record['accuracy'] for run, record in tuned.items() if run.learning_rate == 1e-3] == [100, 100]
    assert [record['training']['final_loss'] is None for record in tuned.values()] == [
        r.learning_rate == 1e-2 for r in tuned
    ]
    assert campaign.chosen_rate(find_task('kitti')) == 1e-3  # the first rate would win if both were equal
    assert 'kitti: 2 runs diverged and count as 0 %' in summarize(tmp_path / 'work')['remarks']


def test_the_estimate_counts_the_runs_that_are_open(finished, tiny_root, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, 'measure_speed', lambda *_: (2.0, 0.5))  # seconds per step and per image
    kitti, root = find_task('kitti'), DataRoot(tiny_root)

    def estimate(campaign, *phases):
        return worker.estimate_seconds(None, tiny_settings, campaign, [kitti], root, *phases)[0]

    new = Campaign.start_or_join(tmp_path / 'work', campaign_identity(tiny_settings, None, True), {})
    tuning, final = 4 * (4 * 2.0 + 8 * 0.5), 2 * (6 * 2.0 + 12 * 0.5)
    assert estimate(new) == tuning + final
    assert estimate(new, ('tune',)) == tuning
    assert estimate(Campaign(finished[0])) == 0


def test_a_run_is_claimed_by_one_and_by_nobody_when_it_is_done(finished, tmp_path):
    work_dir = shutil.copytree(finished[0], tmp_path / 'work')
    mine, theirs = Campaign(work_dir), Campaign(work_dir)
    run = mine.tuning_runs(find_task('kitti'))[0]
    mine.record_path(run).unlink()
    with mine.claim(run) as is_mine:
        assert is_mine
        with theirs.claim(run) as is_theirs:
            assert not is_theirs
        mine.save(run, {'correct': 1})
    with theirs.claim(run) as is_theirs:
        assert not is_theirs


def test_a_worker_killed_while_it_writes_a_record_leaves_whole_ones_only(finished, tiny_config, tiny_root, tmp_path):
    work_dir, environment = tmp_path / 'work', {**os.environ, 'PYTHONPATH': str(REPOSITORY)}
    command = [sys.executable, '-c', SUICIDE + WORKER, str(work_dir), str(tiny_config), str(tiny_root)]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert len(records_of(work_dir)) == 3
    said = []
    start(work_dir, tiny_config, tiny_root, said, tasks=['eurosat', 'kitti'])
    assert sum(bool(re.search(r'\[\d+/12\]', text)) for text in said) == 9
    ours, alone = records_of(work_dir), records_of(finished[0])
    assert {name: record['correct'] for name, record in ours.items()} == {
        name: record['correct'] for name, record in alone.items()
    }


def test_two_workers_of_torchrun_share_a_task(tiny_config, tiny_root, tmp_path):
    work_dir = tmp_path / 'work'
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    run = [str(REPOSITORY / 'tools/vtab.py'), 'run', '--config', str(tiny_config), '--from-scratch', '--device', 'cpu']
    options = ['--data-root', str(tiny_root), '--work-dir', str(work_dir), '--tasks', 'kitti']
    overrides = ['--cfg-options', 'protocol.seeds=[0,1,2,3]', 'protocol.epochs=8']
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*launcher, *run, *options, *overrides], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert 'worker 0 of 2 on cpu' in done.stdout
    assert 'worker 1 of 2 on cpu' in done.stdout
    runs = re.findall(r'\] kitti (\w+ lr \S+ seed \d)', done.stdout)
    assert len(runs) == len(set(runs)) == len(records_of(work_dir)) == 2 * 4 + 4


def test_two_workers_never_do_the_same_run_and_a_killed_one_is_replaced(finished, tiny_config, tiny_root, tmp_path):
    work_dir = tmp_path / 'work'
    environment = {**os.environ, 'PYTHONPATH': str(REPOSITORY), 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': '2'}
    command = [sys.executable, '-c', WORKER, str(work_dir), str(tiny_config), str(tiny_root)]

    def launch(rank):
        return subprocess.Popen(
            command, env={**environment, 'RANK': str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    workers = [launch(0), launch(1)]
    deadline = time.monotonic() + 120
    while len(list((work_dir / 'runs').rglob('*.json'))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(workers[1].pid, signal.SIGKILL)
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert workers[0].returncode == 0, outputs[0]
    assert workers[1].returncode == -signal.SIGKILL
    done = [line for output in outputs for line in re.findall(r'\] (\w+ \w+ lr \S+ seed \d)', output)]
    assert len(done) == len(set(done))  # no run twice
    ours, alone = records_of(work_dir), records_of(finished[0])
    assert set(ours) == set(alone)  # nothing is missing although a worker was killed
    assert all(ours[name]['correct'] == alone[name]['correct'] for name in alone)


@pytest.mark.parametrize(
    ('environment', 'place'),
    [
        ({}, WorkerPlace(0, 1, 0)),
        ({'RANK': '5', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1'}, WorkerPlace(5, 8, 1)),
        (
            {'SLURM_ARRAY_TASK_ID': '7', 'SLURM_ARRAY_TASK_MIN': '1', 'SLURM_ARRAY_TASK_COUNT': '19'},
            WorkerPlace(6, 19, 0),
        ),
        (
            {
                'SLURM_ARRAY_TASK_ID': '2',
                'SLURM_ARRAY_TASK_MIN': '0',
                'SLURM_ARRAY_TASK_COUNT': '3',
                'SLURM_PROCID': '3',
                'SLURM_NTASKS': '4',
                'SLURM_LOCALID': '3',
            },
            WorkerPlace(11, 12, 3),
        ),
    ],
)
def test_place_among_workers(environment, place):
    assert find_place(environment) == place


def test_a_backbone_without_depths_needs_a_word_and_is_marked(tiny_config, tiny_root, tmp_path):
    path = tmp_path / 'resnet.py'
    backbone = "dict(type='ResNet', depth=18), neck=dict(type='GlobalAveragePooling')"
    path.write_text(f'_base_ = {str(tiny_config)!r}\nmodel = dict(_delete_=True, backbone={backbone})\n')
    with pytest.raises(ValueError, match='layer_decay_rate=1 to train it without'):
        start(tmp_path / 'work', path, tiny_root, [], tasks=['kitti'])
    assert not (tmp_path / 'work').exists()
    options = {
        'optim_wrapper.paramwise_cfg.layer_decay_rate': 1,
        'protocol.seeds': [0],
        'protocol.learning_rates': [1e-3],
    }
    campaign = start(tmp_path / 'work', path, tiny_root, [], tasks=['kitti'], overrides=options)
    assert campaign.count_runs(find_task('kitti')) == (2, 2)
    assert 'optim_wrapper.paramwise_cfg.layer_decay_rate: 1 instead of 0.65' in campaign.header['deviations']


def test_no_campaign(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no campaign'):
        Campaign(tmp_path)


@pytest.mark.parametrize(('split', 'num_records'), [('val200', 0), ('test', 4)])
def test_a_truncated_image_stops_before_the_training_that_needs_it(
    tiny_config, tiny_root, tmp_path, split, num_records
):
    root = shutil.copytree(tiny_root, tmp_path / 'vtab-1k')
    image = root / f'kitti/images/{split}/000005.jpg'
    image.write_bytes(image.read_bytes()[:-150])
    with pytest.raises(ValueError, match=rf'{split}/000005.jpg \({split}.txt line 6\) is unreadable or truncated'):
        start(tmp_path / 'work', tiny_config, root, [], tasks=['kitti'])
    assert len(records_of(tmp_path / 'work')) == num_records  # tuning does not need the test images
