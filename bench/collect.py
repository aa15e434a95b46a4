"""Turn what `pytest bench --benchmark-only --benchmark-json FILE` wrote into the rows under `bench/results/`.

    python bench/collect.py FILE... [--into bench/results]

`bench/test_NAME.py` becomes `NAME.json`: machine, versions, commit and date once, then the rows of each benchmark. A
file is replaced as a whole, so that its rows always come from one run. On a machine of several GPUs a run may be shared
out to as many processes, which write a file each:

    accelerate launch --multi_gpu --num_processes 2 --no_python sh -c \
        'pytest bench --benchmark-only --benchmark-json out/bench-$RANK.json'
    python bench/collect.py out/bench-*.json --into bench/results/gpu
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def collect(*shares: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Content of each results file, by name, from one run's JSON, or from the shares of several processes in it."""
    run = shares[0]
    commit = run["commit_info"]
    head = {
        "date": run["datetime"][:19] + "Z",
        "commit": commit.get("id"),
        "uncommitted_changes": commit.get("dirty"),
        "machine": run["machine_info"],
    }
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for bench in [bench for share in shares for bench in share["benchmarks"]]:
        stem = Path(bench["fullname"].split("::")[0]).stem.removeprefix("test_")
        rows[stem] += [{"bench": bench["name"], **row} for row in bench["extra_info"]["rows"]]
    return {name: {**head, "rows": entries} for name, entries in rows.items()}


def main() -> None:
    """Read one run and write its results files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="JSON written by --benchmark-json")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the results files")
    options = parser.parse_args()
    options.into.mkdir(parents=True, exist_ok=True)
    for name, content in collect(*(json.loads(run.read_text()) for run in options.runs)).items():
        path = options.into / f"{name}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"{path.name}: {len(content['rows'])} rows")


if __name__ == "__main__":
    main()
