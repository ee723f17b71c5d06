"""Archives for the ADE20K scene-parsing test server."""

import os
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ['NUM_TEST_IMAGES', 'check_archive', 'list_test_images', 'without_annotations', 'write_archive']

NUM_TEST_IMAGES = 3352  # of the scene-parsing release
NUM_CLASSES = 150
MEMBER_NAME = re.compile(r'ADE_test_\d{8}\.png')
NUM_SHOWN = 5


def list_test_images(folder: str | Path, count: int | None = NUM_TEST_IMAGES) -> list[Path]:
    """List the test images and check that they are those of the server.

    Args:
        folder: Folder with `ADE_test_00000001.jpg` and so on.
        count: Number of images that there must be, or None for any. Default: 3352.

    Returns:
        The paths, sorted.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If names or number are wrong.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'image folder {folder} does not exist')
    images = sorted(folder.glob('*.jpg'))
    strange = [path.name for path in images if not MEMBER_NAME.fullmatch(f'{path.stem}.png')]
    if strange:
        raise ValueError(
            f'{folder} holds images that are no test images such as ADE_test_00000001.jpg: {_some(strange)}'
        )
    if not images or (count is not None and len(images) != count):
        raise ValueError(f'{folder} holds {len(images)} test images (*.jpg), expected {count or "at least one"}')
    return images


def without_annotations(pipeline: list) -> list:
    """Leave the transforms that load masks out of a test pipeline, also inside of `TestTimeAug`."""
    kept = []
    for transform in pipeline:
        if isinstance(transform, Mapping):
            if transform['type'].rpartition('.')[2] in ('LoadAnnotations', 'LoadSegAnnotations'):
                continue
            transform = dict(transform)
            if 'transforms' in transform:
                transform['transforms'] = [part for part in map(without_annotations, transform['transforms']) if part]
        kept.append(transform)
    return kept


def write_archive(
    predictions: Iterable[tuple[str, np.ndarray]],
    path: str | Path,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    count: int | None = NUM_TEST_IMAGES,
) -> int:
    """Write and check an archive; it gets its name when it is complete and right.

    Args:
        predictions: (name of the image without its ending, class numbers (H, W) from 0 to 149) for every image.
        path: The archive, *.zip.
        sizes: Name to (height, width) of every image, to be checked. Default: sizes are not checked.
        count: Number of pictures that there must be, or None for any. Default: 3352.

    Returns:
        The number of pictures.

    Raises:
        ValueError: If the archive would be refused; the message lists what is wrong.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        with zipfile.ZipFile(temporary, 'w', zipfile.ZIP_STORED) as archive:  # PNG is compressed already
            for name, labels in predictions:
                if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 2:
                    raise ValueError(f'{name}: expected integers (H, W), got {labels.dtype} {labels.shape}')
                if labels.min() < 0 or labels.max() >= NUM_CLASSES:
                    raise ValueError(
                        f'{name}: class numbers must be from 0 to 149, got {labels.min()} to {labels.max()}'
                    )
                content = BytesIO()
                Image.fromarray((labels + 1).astype(np.uint8)).save(content, format='PNG')
                archive.writestr(f'{name}.png', content.getvalue())
        number = check_archive(temporary, sizes, count)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return number


def check_archive(
    path: str | Path, sizes: Mapping[str, tuple[int, int]] | None = None, count: int | None = NUM_TEST_IMAGES
) -> int:
    """Check an archive for what the server cannot accept or would score wrongly.

    Args:
        path: The archive.
        sizes: Name to (height, width) of every test image; then names and sizes must be these. Default: not checked.
        count: Number of pictures that there must be, or None for any. Default: 3352.

    Returns:
        The number of pictures.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If anything is wrong: no zip file, another number of pictures, names other than
            ADE_test_00000001.png, folders, a picture that is damaged, not 8-bit grey, of another size, or with values
            outside of 1 to 150. The message lists all problems.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'archive {path} does not exist')
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f'{path} is not a zip file: {error}') from error
    with archive:
        names = archive.namelist()
        problems = [
            f'{name}: no name such as ADE_test_00000001.png' for name in names if not MEMBER_NAME.fullmatch(name)
        ]
        if len(set(names)) != len(names):
            problems.append(f'names that occur twice: {_some(sorted({n for n in names if names.count(n) > 1}))}')
        if not names or (count is not None and len(names) != count):
            problems.append(f'{len(names)} pictures instead of {count or "at least one"}')
        if sizes is not None:
            for title, difference in (('missing', set(sizes) - _stems(names)), ('unknown', _stems(names) - set(sizes))):
                if difference:
                    problems.append(f'{len(difference)} {title} pictures: {_some(sorted(difference))}')
        for name in names:
            if MEMBER_NAME.fullmatch(name):
                problems.extend(f'{name}: {problem}' for problem in _check_picture(archive, name, sizes))
    if problems:
        raise ValueError(f'{path} is no valid archive, {len(problems)} problems:\n' + _some(problems, '\n'))
    return len(names)


def _check_picture(archive: zipfile.ZipFile, name: str, sizes: Mapping[str, tuple[int, int]] | None) -> Iterator[str]:
    """Yield what is wrong with one picture."""
    try:
        with Image.open(BytesIO(archive.read(name))) as picture:
            if picture.format != 'PNG' or picture.mode != 'L':
                yield f'an 8-bit grey PNG is needed, got {picture.format} of mode {picture.mode}'
                return
            values = np.asarray(picture)
    except (OSError, SyntaxError, zipfile.BadZipFile) as error:
        yield f'cannot be read: {error}'
        return
    if values.min() < 1 or values.max() > NUM_CLASSES:
        yield f'values must be from 1 to {NUM_CLASSES}, got {values.min()} to {values.max()}'
    expected = (sizes or {}).get(Path(name).stem)
    if expected is not None and values.shape != tuple(expected):
        yield f'(height, width) is {values.shape}, the image has {tuple(expected)}'


def _stems(names: Iterable[str]) -> set[str]:
    return {Path(name).stem for name in names}


def _some(items: list[str], separator: str = ', ') -> str:
    """Join the first few items."""
    return separator.join(items[:NUM_SHOWN]) + (f'{separator}...' if len(items) > NUM_SHOWN else '')
