"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(blocks) >= 5
    assert len(names["gates"]) == 9
    assert names["run"].epochs == [1, 2]
    assert names["report"].error < 1e-10
    assert (tmp_path / "runs/own/run.json").exists()
    assert not any("bn" in name and "Batch" in type(m).__name__ for name, m in names["fast"].named_modules())
