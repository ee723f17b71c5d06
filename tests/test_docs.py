"""The README and the pages of docs/ stay true: their code runs, and what they name exists.

How a page's Python blocks are taken: a block whose first line is a comment that names a file (`# my_config.py`) is a
config, which is parsed, built and run on a small image; all others are run in order in one namespace. Blocks that
show output (`>>>`) are not used in pages; docstrings of the package are, and run as doctests.
"""

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*ROOT.glob('*.md'), *(page for name in ('benchmarks', 'configs', 'docs') for page in ROOT.glob(f'{name}/**/*.md'))]
)
FENCE = re.compile(r'^[ >]*```(\w*)\n(.*?)^[ >]*```$', re.MULTILINE | re.DOTALL)
REPOSITORY_PATH = re.compile(
    r'(?<![\w./-])((?:configs|tools|docs|tests|benchmarks|mmvil|\.ci|\.github)/[\w./*-]*[\w*])'
)
LAUNCHERS = {f'{launcher}_{task}.sh': f'{task}.py' for launcher in ('dist', 'slurm') for task in ('train', 'test')}

each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def fenced(page: Path, *languages: str) -> list[str]:
    """Blocks of a page in one of the languages."""
    return [text for language, text in FENCE.findall(page.read_text(encoding='utf-8')) if language in languages]


def is_config(block: str) -> re.Match | None:
    """Whether a Python block starts with the name of a file."""
    return re.match(r'# ([\w.-]+\.py)\n', block)


def config_roots() -> list[Path]:
    """Folders that hold a `configs` folder: this repository, and what mmpretrain and mmseg ship of theirs."""
    installed = [Path(importlib.util.find_spec(name).origin).parent / '.mim' for name in ('mmpretrain', 'mmseg')]
    return [ROOT, *installed]


def small_published_file(path: Path) -> None:
    """Write a small model in the layout of the published files, as a stand-in for a download."""
    from mmengine.registry import MODELS

    from mmvil.convert import mmvil_to_official

    arch = {'embed_dims': 32, 'num_layers': 24}
    backbone = {'type': 'mmvil.VisionLSTM', 'arch': arch, 'img_size': 224, 'out_type': 'bilateral_concat'}
    head = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 1000, 'in_channels': 64}
    classifier = MODELS.build({'type': 'mmpretrain.ImageClassifier', 'backbone': backbone, 'head': head})
    torch.save({'state_dict': mmvil_to_official(classifier.state_dict(), layout='published')}, path)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """An empty working directory with the files that the pages assume."""
    pytest.importorskip('mmpretrain')
    monkeypatch.chdir(tmp_path)
    small_published_file(tmp_path / 'vil2_tiny16_e800_in1k.th')
    return tmp_path


@each_page
def test_python_blocks_run(page, workshop, capsys):
    names: dict = {'__name__': 'page'}
    for number, block in enumerate(block for block in fenced(page, 'python') if not is_config(block)):
        exec(compile(block, f'{page.name}, Python block {number}', 'exec'), names)


CONFIG_BLOCKS = [(page, block) for page in PAGES for block in fenced(page, 'python') if is_config(block)]


@pytest.mark.parametrize(('page', 'block'), CONFIG_BLOCKS, ids=lambda value: getattr(value, 'name', 'config'))
def test_config_blocks_build_and_run(page, block, tmp_path):
    pytest.importorskip('mmseg')
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    bases = re.findall(r"'(?:\./)?(configs/[^']+\.py)'", block)
    root = next((root for root in config_roots() if all((root / base).is_file() for base in bases)), None)
    assert root is not None, f'no folder holds all of {bases}'
    (tmp_path / 'configs').symlink_to(root / 'configs')
    file = tmp_path / is_config(block)[1]
    file.write_text(block, encoding='utf-8')

    config = Config.fromfile(file)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        model = MODELS.build(config.model).eval()
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 96), mode='tensor')
    output = output[-1] if isinstance(output, tuple) else output
    assert output.shape[1] in {config.model.get(head, {}).get('num_classes') for head in ('head', 'decode_head')}


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'[a-z]+://', target):
            continue
        file, _, anchor = target.partition('#')
        other = (page.parent / file).resolve() if file else page
        assert other.exists(), f'{page.name} links to {target}'
        if anchor:
            assert anchor in heading_anchors(other), f'{page.name} links to {target}'


def heading_anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as the usual hosts make them."""
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    headings = re.findall(r'^#+ +(.+?) *$', text, re.MULTILINE)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


@each_page
def test_named_files_exist(page):
    text = re.sub(r'https?://\S+', '', page.read_text(encoding='utf-8'))
    roots = config_roots()
    for name in sorted(set(REPOSITORY_PATH.findall(text))):
        places = roots if name.startswith('configs/') else roots[:1]
        assert any(list(root.glob(name)) for root in places), f'{page.name} names {name}, which does not exist'


@pytest.fixture(scope='module')
def tool_options():
    """Option names of each tool, read from its own help."""
    pytest.importorskip('mmpretrain')
    known = {}
    for tool in sorted((ROOT / 'tools').glob('*.py')):
        spec = importlib.util.spec_from_file_location(f'documented_{tool.stem}', tool)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        known[tool.name] = read_options(module.main)
    return known


def read_options(main) -> set[str]:
    """Options that a command prints with --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['tool', '--help'])
        with pytest.raises(SystemExit):
            main()
    return set(re.findall(r'--[a-z][\w-]*', printed.getvalue()))


@each_page
def test_documented_options_exist(page, tool_options):
    for line in '\n'.join(fenced(page, 'bash', 'shell', 'sh')).replace('\\\n', ' ').splitlines():
        for command in re.split(r'&&|\||;', line.partition(' #')[0]):
            tool = re.search(r'tools/(\w+\.(?:py|sh))(.*)', command)
            if tool:
                name, rest = LAUNCHERS.get(tool[1], tool[1]), tool[2]
                assert name in tool_options, f'{page.name} uses tools/{name}, which does not exist'
                unknown = set(re.findall(r'(?<=\s)--[a-z][\w-]*', rest)) - tool_options[name]
                assert not unknown, f'{page.name}: {name} has no option {sorted(unknown)}'


@each_page
def test_documented_names_exist(page):
    text = page.read_text(encoding='utf-8')
    code = '\n'.join([*re.findall(r'`([^`\n]+)`', FENCE.sub('', text)), *fenced(page, 'python', 'bash')])
    for name in sorted(set(re.findall(r'(?<![\w./-])mmvil(?:\.\w+)+', code))):
        assert resolves(name), f'{page.name} names {name}, which does not exist'
    for extra in set(re.findall(r'(?:\.|mmvil)\[(\w+)\]', code)):
        assert extra in packaged_extras(), f'{page.name} names the extra {extra!r}'


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, an attribute of one, or a registered type."""
    pytest.importorskip('mmengine')
    try:
        pkgutil.resolve_name(name)
        return True
    except (AttributeError, ImportError):
        pass
    from mmvil import registry

    return any(name in getattr(registry, kind) for kind in registry.__all__ if kind.isupper())


def packaged_extras() -> set[str]:
    """Extras that setup.py declares."""
    tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
    extras = next(
        node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == 'extras_require'
    )
    return {key.value for key in extras.keys}


def test_readme_has_the_two_setup_commands_that_ci_runs():
    marker = '<!-- setup commands -->'
    assert marker in (ROOT / '.ci' / 'run').read_text(encoding='utf-8')
    block = FENCE.search((ROOT / 'README.md').read_text(encoding='utf-8').partition(marker)[2])[2]
    commands = block.strip().splitlines()
    assert [command.partition(' && ')[0] for command in commands] == [
        "pip install -e '.[openmmlab]'",
        "pip install -e '.[test]'",
    ]


def modules_with_examples() -> list[str]:
    """Modules of the package whose docstrings hold examples."""
    files = sorted((ROOT / 'mmvil').rglob('*.py'))
    # An example that is skipped (it needs a download) does not count.
    with_examples = [file for file in files if re.search(r'>>> (?!.*\+SKIP)', file.read_text(encoding='utf-8'))]
    return ['.'.join(file.relative_to(ROOT).with_suffix('').parts) for file in with_examples]


@pytest.mark.parametrize('name', modules_with_examples())
def test_docstring_examples(name):
    pytest.importorskip('mmengine')
    importlib.import_module(name)
    failed, attempted = doctest.testmod(sys.modules[name])
    assert (failed, attempted > 0) == (0, True)
