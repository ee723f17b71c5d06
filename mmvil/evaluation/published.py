"""Published VTAB-1K scores to compare with, in percent top-1. Every row names its source."""

from dataclasses import dataclass

__all__ = ['PUBLISHED', 'PUBLISHED_TASKS', 'SOURCES', 'PublishedScore']

SOURCES = {
    'ViL': 'table of VTAB-1K results in the official Vision-LSTM repository (arXiv 2406.04303, second version)',
    'VIOLIN': 'Candogan et al., ICML 2026: DeiT and DeiT-III run again with the code behind the ViL numbers',
}


@dataclass(frozen=True)
class PublishedScore:
    """Group means and average of one model.

    Args:
        natural: Mean over the 7 natural tasks.
        specialized: Mean over the 4 specialized tasks.
        structured: Mean over the 8 structured tasks.
        average: Mean over the 19 tasks, as printed.
        source: Key of `SOURCES`.
    """

    natural: float
    specialized: float
    structured: float
    average: float
    source: str = 'ViL'


PUBLISHED: dict[str, PublishedScore] = {
    'ViL-T': PublishedScore(73.6, 83.4, 56.1, 68.3),
    'DeiT-T': PublishedScore(69.2, 82.0, 53.3, 65.2),
    'DeiT-III-T': PublishedScore(71.9, 82.6, 55.2, 67.1),
    'Vim-T': PublishedScore(68.0, 80.7, 47.1, 61.9),
    'ViL-S': PublishedScore(75.3, 84.3, 58.3, 70.0),
    'DeiT-S': PublishedScore(73.3, 83.8, 53.2, 67.1),
    'DeiT-III-S': PublishedScore(75.0, 83.2, 52.3, 67.2),
    'Vim-S': PublishedScore(69.6, 81.7, 49.4, 63.6),
    'ViL-B': PublishedScore(76.6, 84.7, 59.1, 70.9),
    'DeiT-B': PublishedScore(76.5, 85.2, 55.7, 69.6),
    'DeiT-III-B': PublishedScore(77.6, 84.8, 56.6, 70.3),
}

# Source: VIOLIN. Scores of single tasks are not known for ViL and Vim.
_MODELS = ('DeiT-T', 'DeiT-S', 'DeiT-B', 'DeiT-III-S', 'DeiT-III-B')
_ROWS = {
    'cifar': (48.36, 57.38, 61.38, 59.08, 64.39),
    'caltech101': (86.90, 89.06, 90.33, 88.53, 89.56),
    'dtd': (63.97, 68.83, 69.06, 67.09, 70.80),
    'oxford_flowers102': (86.43, 91.09, 93.73, 91.13, 94.63),
    'oxford_iiit_pet': (87.14, 91.13, 92.43, 91.85, 93.38),
    'svhn': (78.28, 75.82, 85.95, 84.65, 87.28),
    'sun397': (35.87, 42.19, 45.59, 43.57, 47.28),
    'patch_camelyon': (82.79, 84.08, 85.74, 84.57, 86.40),
    'eurosat': (93.53, 94.40, 95.38, 93.33, 94.47),
    'resisc45': (80.98, 84.01, 86.37, 82.68, 85.83),
    'diabetic_retinopathy': (72.05, 74.72, 74.60, 73.94, 74.33),
    'clevr_count': (71.37, 75.08, 79.01, 76.53, 80.54),
    'clevr_dist': (60.37, 58.15, 60.10, 57.29, 61.82),
    'dmlab': (44.26, 45.74, 47.03, 46.23, 50.95),
    'kitti': (78.81, 78.43, 82.61, 81.81, 82.70),
    'dsprites_loc': (69.04, 63.30, 66.70, 58.12, 60.75),
    'dsprites_ori': (41.86, 48.13, 53.38, 50.48, 55.35),
    'smallnorb_azi': (30.28, 26.24, 30.87, 26.33, 30.36),
    'smallnorb_ele': (32.57, 32.48, 36.32, 26.57, 31.18),
}
PUBLISHED_TASKS: dict[str, dict[str, float]] = {
    model: {task: scores[column] for task, scores in _ROWS.items()} for column, model in enumerate(_MODELS)
}
