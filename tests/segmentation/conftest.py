import pytest
from mmengine.registry import DefaultScope


@pytest.fixture(scope='module', autouse=True)
def mmseg_scope():
    """Resolve names without a scope as mmsegmentation's, in this module's tests only."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield
