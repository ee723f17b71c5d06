import os
import signal
import subprocess
import sys

import pytest

from mmvil.evaluation.records import lock_file, read_record, write_atomically, write_once

HOLDER = """
import sys, time
from pathlib import Path
from mmvil.evaluation.records import lock_file
with lock_file(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path):
    path = tmp_path / 'locks' / 'run.lock'
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == 'True\n'
        with lock_file(path) as held:
            assert not held
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with lock_file(path) as held:
        assert held
        with lock_file(path) as again:
            assert not again
    with lock_file(path) as held:
        assert held


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / 'new' / 'record.json'
    write_atomically(path, '{"a": 1}')
    write_atomically(path, b'{"a": 2}')
    assert read_record(path) == {'a': 2}
    assert not write_once(path, '{"a": 3}')
    assert read_record(path) == {'a': 2}
    assert write_once(path.with_name('other'), 'x')
    assert sorted(file.name for file in path.parent.iterdir()) == ['other', 'record.json']


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / 'record.json'
    write_atomically(path, '{"a": 1}')

    def break_off(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, 'fsync', break_off)
    for write in (write_atomically, write_once):
        for target in (path, tmp_path / 'new.json'):
            with pytest.raises(KeyboardInterrupt):
                write(target, '{"a": 2}')
    assert read_record(path) == {'a': 1}
    assert not (tmp_path / 'new.json').exists()


def test_damaged_records(tmp_path):
    (tmp_path / 'a').write_text('{"a": ')
    (tmp_path / 'b').write_text('[]')
    with pytest.raises(ValueError, match='is no JSON file'):
        read_record(tmp_path / 'a')
    with pytest.raises(ValueError, match='must hold a JSON object, got list'):
        read_record(tmp_path / 'b')
    with pytest.raises(FileNotFoundError):
        read_record(tmp_path / 'c')
