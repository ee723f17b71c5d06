"""Options, device and checkpoints become a config that a runner can be built from."""

import argparse

import pytest
import torch
from mmengine.config import Config

from mmvil.engine import runner_config
from mmvil.engine.data_check import check_data_folders


@pytest.fixture
def config():
    return Config(
        dict(
            default_scope='mmpretrain',
            my_variable=3,
            model=dict(type='ImageClassifier', backbone=dict(type='ResNet', norm_cfg=dict(type='SyncBN'))),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
            train_dataloader=dict(batch_size=2, num_workers=0, dataset=dict(type='CustomDataset')),
        )
    )


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(runner_config, 'get_device', lambda: 'cpu')


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(runner_config, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: True)


def parse_options(*words):
    parser = argparse.ArgumentParser(exit_on_error=False)
    runner_config.add_common_arguments(parser)
    return parser.parse_args(['--cfg-options', *words]).cfg_options


def test_cfg_options_are_parsed():
    assert parse_options('a.b=1', 'c=[1,2]', 'd=x=y') == {'a.b': 1, 'c': [1, 2], 'd': 'x=y'}


@pytest.mark.parametrize('word', ['novalue', '=3', 'a=[1,(2]'])
def test_bad_cfg_options_are_a_usage_error(word):
    with pytest.raises(argparse.ArgumentError, match='--cfg-options'):
        parse_options(word)


def test_config_file_must_exist_and_be_readable(tmp_path):
    with pytest.raises(ValueError, match=r"'no/such\.py' does not exist"):
        runner_config.load_config('no/such.py')
    for name, text, message in [
        ('broken.py', 'model = dict(', 'cannot be read'),
        ('child.py', "_base_ = 'nobody.py'", '_base_ file'),
        ('weights.pth', '', r'ends in \.py'),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            runner_config.load_config(tmp_path / name)


def test_options_are_merged_and_unknown_ones_refused(config):
    messages = runner_config.merge_options(
        config, {'optim_wrapper.optimizer.lr': 0.5, 'model.backbone.depth': 18, 'randomness.seed': 1, 'my_variable': 4}
    )
    assert (config.optim_wrapper.optimizer.lr, config.model.backbone.depth, config.randomness.seed) == (0.5, 18, 1)
    assert len(messages) == 1
    assert 'my_variable' in messages[0]
    with pytest.raises(ValueError, match="no 'optim_wraper'; did you mean 'optim_wrapper'"):
        runner_config.merge_options(config, {'optim_wraper.optimizer.lr': 0.5})
    with pytest.raises(ValueError, match='do not fit the config'):
        runner_config.merge_options(config, {'my_variable.key': 1})


def test_work_dir_option_then_config_then_name(config, tmp_path):
    runner_config.set_work_dir(config, 'some/vil-x.py', None)
    assert config.work_dir == 'work_dirs/vil-x'
    runner_config.set_work_dir(config, 'some/other.py', None)
    assert config.work_dir == 'work_dirs/vil-x'
    runner_config.set_work_dir(config, 'some/other.py', 'deep/new/folder')
    assert config.work_dir == 'deep/new/folder'
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='must be a folder'):
        runner_config.set_work_dir(config, 'x.py', str(tmp_path / 'file'))


@pytest.mark.usefixtures('on_cpu')
def test_cpu_gets_a_plain_optimizer_wrapper_and_one_process_plain_norms(config):
    config.optim_wrapper.update(type='mmengine.AmpOptimWrapper', dtype='bfloat16', loss_scale='dynamic')
    messages = runner_config.adapt_to_device(config)
    assert config.optim_wrapper == dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.1))
    assert config.model.backbone.norm_cfg.type == 'BN'
    assert len(messages) == 2
    assert runner_config.adapt_to_device(config) == []


@pytest.mark.usefixtures('on_gpu')
def test_several_gpus_keep_amp_and_sync_bn(config):
    config.launcher = 'pytorch'
    runner_config.apply_amp(config)
    assert runner_config.adapt_to_device(config) == []
    assert config.optim_wrapper.type == 'AmpOptimWrapper'
    assert config.model.backbone.norm_cfg.type == 'SyncBN'


@pytest.mark.usefixtures('on_cpu')
def test_cpu_threads_of_the_config_yield_to_the_environment(config, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'set_num_threads', calls.append)
    config.cpu_threads = 3
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    runner_config.adapt_to_device(config)
    assert calls == []
    monkeypatch.delenv('OMP_NUM_THREADS')
    assert 'torch uses 3 CPU threads' in runner_config.adapt_to_device(config)[0]
    assert calls == [3]


@pytest.mark.usefixtures('on_cpu')
def test_processes_of_a_launcher_need_gpus(config):
    config.launcher = 'pytorch'
    with pytest.raises(ValueError, match='--launcher pytorch needs'):
        runner_config.adapt_to_device(config)


@pytest.mark.usefixtures('on_cpu')
def test_amp_is_said_to_do_nothing_on_a_cpu(config):
    assert 'no effect on cpu' in runner_config.apply_amp(config)[0]
    assert 'type' not in config.optim_wrapper


@pytest.mark.usefixtures('on_gpu')
@pytest.mark.parametrize(('supported', 'dtype'), [(True, 'bfloat16'), (False, 'float16')])
def test_amp_takes_the_type_that_the_gpu_has(config, monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: supported)
    assert dtype in runner_config.apply_amp(config)[0]
    assert config.optim_wrapper.dtype == dtype
    assert config.optim_wrapper.loss_scale == (dict(enabled=False) if supported else 'dynamic')


@pytest.mark.usefixtures('on_gpu')
def test_amp_keeps_what_the_config_says(config):
    config.optim_wrapper.update(type='AmpOptimWrapper', dtype='float16')
    runner_config.apply_amp(config)
    assert config.optim_wrapper.dtype == 'float16'
    config.optim_wrapper.type = 'ApexOptimWrapper'
    with pytest.raises(ValueError, match='ApexOptimWrapper'):
        runner_config.apply_amp(config)


def test_auto_scale_lr_needs_a_base_batch_size(config):
    with pytest.raises(ValueError, match='base_batch_size'):
        runner_config.apply_auto_scale_lr(config)
    config.auto_scale_lr = dict(base_batch_size=64)
    runner_config.apply_auto_scale_lr(config)
    assert config.auto_scale_lr.enable


def test_loader_defaults_follow_the_task(config):
    config.val_dataloader = dict(num_workers=2, collate_fn=dict(type='pseudo_collate'))
    runner_config.set_loader_defaults(config)
    train, val = config.train_dataloader, config.val_dataloader
    assert (train.collate_fn.type, train.persistent_workers) == ('default_collate', False)
    assert (val.collate_fn.type, val.persistent_workers) == ('pseudo_collate', True)
    assert train.pin_memory == torch.cuda.is_available()
    segmentation = Config(dict(default_scope='mmseg', train_dataloader=dict(num_workers=2)))
    runner_config.set_loader_defaults(segmentation)
    assert 'collate_fn' not in segmentation.train_dataloader


def test_checkpoints_are_checked_before_anything_is_built(tmp_path):
    good = tmp_path / 'good.pth'
    torch.save(dict(state_dict=torch.randn(100)), good)
    assert runner_config.check_checkpoint(str(good)) == str(good)
    (tmp_path / 'short.pth').write_bytes(good.read_bytes()[:-200])
    (tmp_path / 'page.pth').write_text('<html>')
    (tmp_path / 'empty.pth').write_bytes(b'')
    for name, message in [
        ('short', 'truncated'),
        ('page', 'not a PyTorch checkpoint'),
        ('empty', r'\(0 bytes\)'),
        ('missing', 'does not exist'),
    ]:
        with pytest.raises(ValueError, match=message):
            runner_config.check_checkpoint(str(tmp_path / f'{name}.pth'))


def test_resume_finds_the_latest_checkpoint_even_in_a_moved_work_dir(config, tmp_path):
    config.work_dir = str(tmp_path)
    messages = runner_config.resolve_resume(config, 'auto')
    assert 'starts from the beginning' in messages[0]
    assert not config.resume
    torch.save({}, tmp_path / 'epoch_3.pth')
    (tmp_path / 'last_checkpoint').write_text('/somewhere/else/epoch_3.pth')
    assert runner_config.resolve_resume(config, 'auto') == []
    assert (config.resume, config.load_from) == (True, str(tmp_path / 'epoch_3.pth'))
    (tmp_path / 'last_checkpoint').write_text('epoch_4.pth')
    with pytest.raises(ValueError, match=r'epoch_4\.pth.* does not exist'):
        runner_config.resolve_resume(config, 'auto')
    with pytest.raises(ValueError, match=r'nothing\.pth.* does not exist'):
        runner_config.resolve_resume(config, 'nothing.pth')


def test_missing_data_is_reported_in_one_message(config, tmp_path):
    (tmp_path / 'images').mkdir()
    config.train_dataloader.dataset = dict(
        type='RepeatDataset',
        dataset=dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='train', ann_file='train.txt'),
    )
    config.val_dataloader = dict(dataset=dict(type='ImageNet', data_root='no/such/root', split='val'))
    with pytest.raises(ValueError, match='data not found') as caught:
        check_data_folders(config, ('train_dataloader', 'val_dataloader'))
    for part in ('data_prefix of CustomDataset', 'train.txt', "data_root of ImageNet: 'no/such/root'"):
        assert part in str(caught.value)
    config.train_dataloader.dataset.dataset.update(data_prefix='images', ann_file='')
    check_data_folders(config, ('train_dataloader',))


def test_downloading_and_remote_data_sets_are_left_alone(config):
    for dataset in [
        dict(type='CIFAR10', data_root='no/such/root'),
        dict(type='ImageNet', data_root='https://example.org/data'),
        dict(type='mmvil.Digits', split='train'),
    ]:
        config.train_dataloader.dataset = dataset
        check_data_folders(config, ('train_dataloader',))
    config.train_dataloader.dataset = dict(type='CIFAR10', data_root='no/such/root', download=False)
    with pytest.raises(ValueError, match='CIFAR10'):
        check_data_folders(config, ('train_dataloader',))
