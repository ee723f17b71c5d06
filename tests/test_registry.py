"""The registered names resolve under every default scope, whatever was imported before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.registry import MODELS as ROOT
from mmengine.registry import DefaultScope

from mmvil import registry
from mmvil.models import VisionLSTM

CONFIG = {'type': 'mmvil.VisionLSTM', 'arch': {'embed_dims': 16, 'num_layers': 2}, 'img_size': 32, 'patch_size': 8}

# One fresh process: nothing of mmvil is imported before the first look-up, and mmpretrain after mmseg.
FRESH = """
import json, sys, warnings
warnings.simplefilter('ignore')
from mmengine.registry import MODELS as ROOT, DefaultScope, init_default_scope
import mmseg.registry, mmpretrain.registry

config = json.loads(sys.argv[1])
assert not any(name.split('.')[0] == 'mmvil' for name in sys.modules)
found = []
scopes = {'mmseg': mmseg.registry.MODELS, 'mmpretrain': mmpretrain.registry.MODELS, 'mmengine': ROOT}
for scope, models in scopes.items():
    init_default_scope(scope)
    for name in ('mmvil.VisionLSTM', 'mmvil.ViL'):
        found.append([scope, type(models.build({**config, 'type': name})).__name__])
        assert DefaultScope.get_current_instance().scope_name == scope
print(json.dumps(found))
"""


def test_names_resolve_from_every_scope_in_a_fresh_process(tmp_path: Path) -> None:
    package = Path(registry.__file__).parents[1]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(package), os.environ.get('PYTHONPATH', '')])}
    command = [sys.executable, '-c', FRESH, json.dumps(CONFIG)]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found == [[scope, 'VisionLSTM'] for scope in ('mmseg', 'mmpretrain', 'mmengine') for _ in range(2)]


@pytest.mark.parametrize('name', ['VisionLSTM', 'ViL'])
def test_names_resolve_in_the_own_registry(name: str) -> None:
    assert registry.MODELS.get(name) is VisionLSTM
    assert registry.MODELS.get(f'mmvil.{name}') is VisionLSTM
    assert ROOT.get(f'mmvil.{name}') is VisionLSTM


def scope_name() -> str | None:
    """Name of the default scope that is set, whoever set it."""
    current = DefaultScope.get_current_instance()
    return current and current.scope_name


@pytest.mark.parametrize('scope', ['mmpretrain', 'mmseg', 'mmengine', 'mmvil'])
def test_names_resolve_after_mmvil_has_been_imported(scope: str) -> None:
    if scope != 'mmengine':
        pytest.importorskip(scope)
    before = scope_name()
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(ROOT.build(dict(CONFIG)), VisionLSTM)
        assert DefaultScope.get_current_instance().scope_name == scope
    assert scope_name() == before


def test_short_name_works_under_the_own_scope_only() -> None:
    config = {**CONFIG, 'type': 'ViL'}
    with DefaultScope.overwrite_default_scope('mmvil'):
        assert isinstance(ROOT.build(dict(config)), VisionLSTM)
    with pytest.raises(KeyError, match='ViL is not in the'):
        ROOT.build(config)


def test_child_registries_hang_below_those_of_mmengine() -> None:
    for name in registry.__all__:
        child = getattr(registry, name)
        assert child.scope == 'mmvil'
        assert child.parent.scope == 'mmengine'


def test_wrong_options_in_a_config_name_the_class() -> None:
    with pytest.raises(TypeError, match='embed_dim'):
        ROOT.build({**CONFIG, 'embed_dim': 3})
