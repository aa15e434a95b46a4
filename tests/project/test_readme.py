"""README's tables are those of the committed rows, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_of_the_readme_come_from_the_committed_rows():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "readme.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_method_of_the_readme_runs_in_a_fresh_process():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "class Loudest" in block]
    load = "from transformers import AutoModelForImageTextToText as A; model = A.from_pretrained('demos/model')\n"
    done = subprocess.run([sys.executable, "-c", load + block], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
