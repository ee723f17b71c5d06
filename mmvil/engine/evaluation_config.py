"""Options of the test command: test-time augmentation, pictures and result files."""

import copy
import json
import os
from typing import Any

from mmengine.config import Config
from mmengine.dist import master_only

__all__ = ['PREDICTION_SUFFIXES', 'apply_out', 'apply_show_dir', 'apply_tta', 'write_metrics']

PREDICTION_SUFFIXES = ('.pkl', '.pickle')


def apply_tta(config: Config) -> list[str]:
    """Wrap the model and the test pipeline for test-time augmentation.

    Returns:
        list[str]: A line for the log when the default for classifiers is used.

    Raises:
        ValueError: if the config has only one of `tta_model` and `tta_pipeline`, or neither and is no classifier.
    """
    given = [name for name in ('tta_model', 'tta_pipeline') if config.get(name) is not None]
    messages = []
    if not given and config.get('default_scope') == 'mmpretrain':
        pipeline = copy.deepcopy(config.test_dataloader.dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        config.tta_model = dict(type='mmpretrain.AverageClsScoreTTA')
        config.tta_pipeline = [*pipeline[:-1], dict(type='TestTimeAug', transforms=[flips, [pipeline[-1]]])]
        messages.append('--tta: the config has no tta_model; each image and its mirror image are averaged.')
    elif len(given) < 2:
        raise ValueError(f'--tta needs tta_model and tta_pipeline in the config, it has {given or "neither"}')
    config.model = dict(**config.tta_model, module=config.model)
    config.test_dataloader.dataset.pipeline = config.tta_pipeline
    return messages


def apply_show_dir(config: Config, folder: str) -> None:
    """Draw the predictions of all test images into a folder.

    Raises:
        ValueError: if the config has no visualization hook of mmpretrain or mmsegmentation.
    """
    hook = config.get('default_hooks', {}).get('visualization')
    kind = str((hook or {}).get('type', '')).split('.')[-1]
    if kind == 'VisualizationHook':
        hook.update(enable=True, out_dir=folder, interval=1)
    elif kind == 'SegVisualizationHook':
        hook.update(draw=True, interval=1)
        config.visualizer.save_dir = folder
        if not config.visualizer.get('vis_backends'):
            config.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    else:
        raise ValueError(
            "--show-dir needs default_hooks.visualization of type 'VisualizationHook' (mmpretrain) or "
            f"'SegVisualizationHook' (mmsegmentation) in the config, got {hook}"
        )


def apply_out(config: Config, path: str | None) -> None:
    """Check the path of the results; a folder asks the segmentation metric for label maps.

    Raises:
        ValueError: for another suffix, or a folder where the metric cannot write label maps.
    """
    if path is None or path.endswith(('.json', *PREDICTION_SUFFIXES)):
        return
    metric = config.test_evaluator
    writes_maps = isinstance(metric, dict) and str(metric.get('type', '')).split('.')[-1] == 'IoUMetric'
    if os.path.splitext(path)[1] or not writes_maps:
        raise ValueError(
            f'--out takes a file that ends in .json (metrics) or .pkl (predictions), or a folder when the evaluator is '
            f'one IoUMetric, got {path!r}'
        )
    metric.update(output_dir=path, keep_results=True)


@master_only
def write_metrics(metrics: dict[str, Any], path: str) -> None:
    """Write metrics as JSON; the file appears only when it is complete."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    plain = {key: value.tolist() if hasattr(value, 'tolist') else value for key, value in metrics.items()}
    temporary = f'{path}.tmp'
    with open(temporary, 'w', encoding='utf-8') as file:
        json.dump(plain, file, indent=2)
        file.write('\n')
    os.replace(temporary, path)
