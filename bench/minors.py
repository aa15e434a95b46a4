"""Run the oracles of the families on other versions of the libraries below, each installed into a folder of its own.

    python bench/minors.py                                  # all that README names: see LIBRARIES
    python bench/minors.py transformers                     # the newest patch release of every minor, oldest to newest
    python bench/minors.py transformers --versions 5.25.0   # one version: before its minor goes to TESTED

A version that is not the installed one is put before the installed packages by PYTHONPATH: nothing is reinstalled. Exit
status 1: tests fail on a version that counts as tested; 2: none fails, but one could not be installed. A transformers
newer than every minor in ``tokenprune.upstream.check.TESTED`` is tried too, and told about in a line of its own, but
does not change the status: nobody has said yet that it works.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tokenprune.upstream.check import TESTED

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, MISSING = "passed", "FAILED", "not installed"

# Files under tests/, and which of their tests; none named: all. None of those for transformers gives features computed
# beforehand: 5.17 takes none, and some families of 5.18 not in the form of later ones.
DECODERS: dict[str, tuple[str, ...]] = {
    "decoder/test_pixels": (),
    "upstream/test_minors": (),
    "decode/test_spatten": ("test_text_leaves_prompt_and_cache_as_the_simulation_says",),
    "encoder/test_vit": ("test_tome_is_the_paper_written_out",),
    "encoder/test_vit_inside": (
        "test_it_composes_with_what_prunes_before_and_inside_the_decoder",
        "test_nothing_merged_is_bit_identical",
    ),
}
ENCODERS: dict[str, tuple[str, ...]] = {
    "encoder/test_vit": (
        "test_tome_is_the_paper_written_out",
        "test_features_and_intermediates_keep_their_shape_and_agree_with_the_forward",
        "test_unpatching_leaves_the_encoder_as_it_was",
    ),
    "encoder/test_vit_spatten": ("test_the_cascade_is_a_dense_run_that_hides_what_left",),
    "encoder/test_vit_heads": ("test_one_row_projects_kept_heads_only_and_is_a_dense_run_with_zeros",),
}
ARITHMETIC: dict[str, tuple[str, ...]] = {
    "decoder/test_oracle": ("test_pruned_generation_equals_a_dense_run_on_the_kept_tokens",),
    "encoder/test_vit": ("test_tome_is_the_paper_written_out",),
    "ops/test_ops_top_k": (),
    "ops/test_ops_max_min": ("test_torch_follows_the_naive_loop", "test_triton_follows_torch"),
    "ops/test_ops_merging": ("test_matching_follows_the_naive_loop", "test_merging_follows_the_naive_loop"),
    "ops/test_ops_decode": ("test_torch_follows_the_naive_loop",),
}


@dataclass(frozen=True)
class Library:
    """A library below and how its versions are tried.

    Attributes:
        tests: what runs on each version.
        installs: further arguments of ``pip install``, in the order in which they are tried until the version can be
            imported.
        options: further arguments of pytest.
    """

    tests: dict[str, tuple[str, ...]]
    installs: tuple[tuple[str, ...], ...]
    options: tuple[str, ...] = ()

    def selection(self) -> list[str]:
        """The tests by their node ids."""
        names = [(file, name) for file, names in self.tests.items() for name in names or ("",)]
        return [f"tests/{file}.py::{name}" if name else f"tests/{file}.py" for file, name in names]


OLD_TIMM = "ignore:`torch.jit.interface` is deprecated:FutureWarning"  # what torch says to timm 1.0.20
LIBRARIES = {
    # With dependencies of its own only where it cannot do with those installed.
    "transformers": Library(DECODERS, (("--no-deps",), ()), ("-m", "matrix or not matrix")),
    "timm": Library(ENCODERS, (("--no-deps",),), ("-k", "timm", "-W", OLD_TIMM)),
    # The interpreter of Triton 3.6, which torch 2.11 brings, cannot do with numpy 2.4.
    "torch": Library(
        ARITHMETIC,
        (("torchvision", "numpy<2.4"),),
        ("-k", "not test_oracle or llava or qwen2_5_vl or qwen3_5 or gemma3"),
    ),
}

# What a minor of transformers cannot do itself: a word in the names of the tests that it is not held to, and why not.
EXCEPT = {
    "5.17": ("dinov2", "blocks of DINOv2 take no mask: `tome` needs `proportional=False` there"),
    "5.20": ("smolvlm", "SmolVLM fails unpatched on images whose tokens are no multiple of its patch size"),
}


@dataclass(frozen=True)
class Row:
    """How a version ended: tests `passed`, the `seconds` they took, the last words of pytest or pip, what it lacks."""

    library: str
    version: str
    status: str
    words: str
    passed: int = 0
    seconds: float = 0.0
    lacks: str = ""

    def __str__(self) -> str:
        took = f" in {self.seconds:.0f} s" if self.seconds else ""
        return f"{self.library:<12} {self.version:<8} {self.status:<8} {self.words}{took}"

    @property
    def is_new(self) -> bool:
        """Whether nobody has said yet that this version works."""
        minor = tuple(map(int, TESTED[-1].split(".")))
        return self.library == "transformers" and Version(self.version.removesuffix(".*")).release[:2] > minor


def floor(library: str) -> Version:
    """The oldest version that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        requirement = Requirement(line)
        if requirement.name == library:
            return Version(next(part.version for part in requirement.specifier if part.operator == ">="))
    raise LookupError(f"pyproject.toml sets no floor for {library}")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip and keep what it says."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


def wanted(library: str) -> list[str]:
    """The versions that are tried where none are named: of each minor the newest patch release, or first and last.

    Where the registry does not answer, `5.17.*` stands in place of a version: installing it will say why.
    """
    said = re.search(r"^Available versions: (.*)$", pip("index", "versions", library).stdout, flags=re.MULTILINE)
    offered = sorted(map(Version, said[1].split(", "))) if said else []
    oldest, here = floor(library), metadata.version(library).partition("+")[0]
    minors = {version.release[:2]: str(version) for version in offered if version >= oldest}
    if library == "transformers":
        return list(minors.values()) or [f"{minor}.*" for minor in TESTED]
    if library == "timm":
        return [str(oldest), *list(minors.values())[-1:]]
    return [minors.get(oldest.release[:2], f"{oldest}.*"), here]  # a newer torch than the locked one is raised by hand


def environment(folder: Path | None) -> dict[str, str]:
    """The environment of a process that sees the packages in `folder` first."""
    path = {} if folder is None else {"PYTHONPATH": str(folder)}
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **path}


def seen(library: str, folder: Path | None) -> str:
    """The version that a process with `folder` imports, or the last line of why it cannot."""
    command = [sys.executable, "-c", f"import {library}; print({library}.__version__.partition('+')[0])"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(folder))
    return (done.stdout if done.returncode == 0 else done.stderr).strip().rpartition("\n")[2]


def install(library: str, version: str, folder: Path) -> str:
    """Put a version into `folder`, unless it is there; the reason where that cannot be, empty where it could."""
    if fnmatch(found := seen(library, folder), version):
        return ""
    for options in LIBRARIES[library].installs:
        done = pip("install", "--quiet", "--upgrade", "--target", str(folder), f"{library}=={version}", *options)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return errors[-1] if errors else f"pip ended with status {done.returncode}"
        if fnmatch(found := seen(library, folder), version):
            return ""
    return f"what is imported after installing it: {found}"


def attempt(library: str, version: str, folder: Path) -> Row:
    """Install a version under `folder` and run the tests on it; what they print goes to a log beside it."""
    place = None if seen(library, None) == version else folder / library / version
    if place is not None and (reason := install(library, version, place)):
        return Row(library, version, MISSING, reason)
    command = [str(Path(sys.executable).with_name("pytest")), "-q", *LIBRARIES[library].selection()]
    command += LIBRARIES[library].options
    word, lacks = EXCEPT.get(version.rpartition(".")[0], ("", "")) if library == "transformers" else ("", "")
    command += ("-k", f"not {word}") if word else ()
    log = folder / library / f"{version}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as file:
        status = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=environment(place), check=False
        ).returncode
    seconds = round(time.monotonic() - start, 1)
    words = next((line.strip("= ") for line in reversed(log.read_text().splitlines()) if line.strip("= ")), "no output")
    words = re.sub(r" in [\d.]+s\b.*", "", words)
    passed = int((re.search(r"(\d+) passed", words) or ("", "0"))[1])
    return Row(library, version, PASSED if status == 0 and passed else FAILED, words, passed, seconds, lacks)


def tell(rows: list[Row], seconds: float) -> int:
    """Print the sum of it, and versions that nobody has tested yet in lines of their own; the exit status."""
    counts = Counter(row.status for row in rows)
    parts = ", ".join(
        f"{counts[status]} {status}" for status in (FAILED, MISSING, PASSED) if counts[status] or status == PASSED
    )
    names = ", ".join(dict.fromkeys(row.library for row in rows))
    print(f"{names} {rows[0].version} to {rows[-1].version}: of {len(rows)} versions {parts} in {seconds:.1f}s")
    for row in rows:
        if row.is_new and row.status == PASSED:
            print(f"NEWEST {row.library} {row.version} passed: its minor may go to tokenprune.upstream.check.TESTED")
        elif row.is_new:
            print(f"NEWEST {row.library} {row.version} {row.status}: {row.words} in {row.seconds:.1f}s")
    bad = {row.status for row in rows if not row.is_new}
    return 1 if FAILED in bad else 2 if MISSING in bad else 0


def write(path: Path, rows: list[Row], *, whole: bool) -> None:
    """Put rows into a results file, in place of those of the same libraries (`whole`) or of the same versions."""
    before = [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []
    done = {(row.library, "" if whole else row.version) for row in rows}
    kept = [row for row in before if (row.library, "" if whole else row.version) not in done] + rows
    order = list(LIBRARIES).index
    kept.sort(key=lambda row: (order(row.library), Version(row.version.removesuffix(".*"))))
    content = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": {name: metadata.version(name) for name in LIBRARIES},
        "rows": [asdict(row) for row in kept],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    """Try the versions of one library or of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(LIBRARIES)}; default: all")
    parser.add_argument("--versions", help="versions of the one library named, with commas between")
    parser.add_argument("--output", type=Path, help="results file to put the rows into")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "minors", help="where versions are installed")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="versions tried at a time")
    options = parser.parse_args()
    libraries = options.libraries or list(LIBRARIES)
    if unknown := set(libraries) - set(LIBRARIES):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(LIBRARIES)}")
    if options.versions and len(libraries) != 1:
        parser.error("--versions goes with one library")
    named = options.versions.split(",") if options.versions else None
    pairs = [(library, version) for library in libraries for version in named or wanted(library)]
    start, rows = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=options.jobs) as pool:
        for row in pool.map(lambda pair: attempt(*pair, options.folder.resolve()), pairs):
            print(row, flush=True)
            rows.append(row)
    if options.output:
        write(options.output, rows, whole=named is None)
    return tell(rows, time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
