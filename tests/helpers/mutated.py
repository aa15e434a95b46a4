"""What the library does when transformers renames something: run in a copy in which one name is another.

    python tests/helpers/mutated.py NAME [NAME ...]

Every ``.py`` file of the transformers that imports now is copied (hard links where nothing changes) with `NAME`
replaced by `NAME_renamed` wherever it stands as a word, and ``mutated_cases.py``, the script of a user who followed the
renaming, runs in it, in a process of its own. A case is right when logits, ids and traces are those of the unmutated
transformers (which the other tests prove against a dense computation), or when the library refuses with an error of its
own. Anything else is a fault: wrong logits, nothing pruned, or an error that is not the library's. A mutation under
which not even the unpatched model gives its answer says nothing and is called invalid.
"""

import argparse
import importlib.util
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
SCRIPT, CONFIGS = "mutated_cases.py", "tiny_configs.json"
LIMIT = 1e-4  # Of logits and hidden states.
SHOWN, MESSAGE = 6, 400  # Cases listed for one outcome, characters of its message.
# Modules of others: what hangs on them keeps its name.
FOREIGN = r"torch|nn|F|dist|np|numpy|functools|math|os|sys|json|re|inspect|importlib|copy|itertools|collections|typing"
FAULTS = ("WRONG", "DENSE", "RAW")
KINDS = ("right", "refused", "invalid", *FAULTS)

Results = dict[str, dict[str, Any]]


def installed() -> Path:
    """The package folder of the transformers that imports now."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def renamed(name: str) -> str:
    """What `name` is called in the copy."""
    return f"{name}_renamed"


def rename(text: str, name: str) -> str:
    """Python code in which `name` is renamed, except where it belongs to other packages."""
    new = renamed(name)
    text = re.sub(rf"\b{name}\b", new, text)
    text = re.sub(rf"\b((?:{FOREIGN})(?:\.\w+)*\.){new}\b", rf"\g<1>{name}", text)

    def restore(found: re.Match[str]) -> str:
        head, module, names = found.groups()
        module = re.sub(rf"\b{new}\b", name, module)
        if not module.startswith((".", "transformers")):
            names = re.sub(rf"\b{new}\b(?! as\b)", f"{name} as {new}", names)
            names = re.sub(rf"\b{new} as\b", f"{name} as", names)
        return f"{head}{module}{names}"

    return re.sub(r"^([ \t]*from +)([\w.]+)( +import +(?:\([^)]*\)|[^\n]*))", restore, text, flags=re.M)


def link(source: str, target: str) -> None:
    """A hard link, or a copy where there cannot be one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def mutate(name: str, folder: Path) -> int:
    """Write the mutated transformers and the script into `folder`; how many files of transformers hold the name."""
    source = installed()
    shutil.copytree(source, folder / source.name, copy_function=link)
    for info in source.parent.glob("transformers-*.dist-info"):
        shutil.copytree(info, folder / info.name, copy_function=link)
    word, changed = re.compile(rf"\b{name}\b"), 0
    for path in (folder / source.name).rglob("*.py"):
        raw = path.read_bytes()
        if name.encode() in raw and word.search(text := raw.decode()):
            path.unlink()  # The other end of the link stays as it is.
            path.write_text(rename(text, name))
            changed += 1
    for file in (SCRIPT, CONFIGS):
        text = (HERE / file).read_text()
        (folder / file).write_text(rename(text, name) if file == SCRIPT else word.sub(renamed(name), text))
    return changed


def enter(folder: str, script: str) -> None:
    """In a process of its own: run the script with `folder` before all else that is imported."""
    sys.stderr.flush()
    os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT), 2)
    if "transformers" in sys.modules:
        raise RuntimeError("transformers is there already, so that no other one could be imported")
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    sys.path.insert(0, folder)
    sys.argv = [script, f"{folder}/result.pt"]
    runpy.run_path(script, run_name="__main__")


def execute(folder: Path, script: Path) -> Results | str:
    """Results of all cases of `script` with the packages in `folder`, or how the process ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "torchvision"])  # Half of the time of a fresh process.
    process = context.Process(target=enter, args=(str(folder), str(script)))
    process.start()
    process.join()
    if process.exitcode == 0:
        return torch.load(folder / "result.pt")
    text = (folder / "stderr").read_text()
    last = ([line for line in text.splitlines() if line.strip()] or ["no message"])[-1].strip()
    raw = f"{os.sep}tokenprune{os.sep}" in text and f"{os.sep}transformers{os.sep}" not in text
    return f"RAW {last}" if raw else f"invalid: dense fails: {last}"


def golden() -> Results:
    """Results of all cases on the unmutated transformers.

    Raises:
        RuntimeError: a case does not run there, or prunes nothing, so that it could show nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = execute(Path(folder), HERE / SCRIPT)
    if isinstance(found, str):
        raise RuntimeError(f"unmutated transformers: {found}")
    return found


def unfit(case: str, one: Mapping[str, Any]) -> str | None:
    """Why a case shows nothing on the unmutated transformers, None where it does."""
    for part in ("dense", "pruned"):
        if not isinstance(one.get(part), list):
            return f"{part} fails: {one.get(part)}"
    if distance(one["dense"], one["pruned"]) <= LIMIT:
        return "pruned is dense"
    if "4+4" not in case and not any(sum(n_out) < sum(n_in) for _, _, n_in, n_out, *_ in one["traces"]):
        return "no trace of a pruned token"
    return None


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest difference of two answers."""
    if [one.shape for one in a] != [one.shape for one in b]:
        return float("inf")
    pairs = zip(a, b, strict=True)
    return max(float((one.double() - two.double()).nan_to_num(0.0, 1e9, -1e9).abs().max()) for one, two in pairs)


def judge(case: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What became of one case."""
    why = unfit(case, wanted)
    if why is not None:
        return f"invalid: on the unmutated transformers {why}"
    if not isinstance(found["dense"], list):
        return f"invalid: dense fails: {found['dense']}"
    if (off := distance(wanted["dense"], found["dense"])) > LIMIT:
        return f"invalid: dense is off by {off:.2g}"
    if not isinstance(found["pruned"], list):
        return f"{'refused:' if found['refused'] else 'RAW'} {found['pruned']}"
    traces = [one[:5] for one in found["traces"]]
    if (off := distance(wanted["pruned"], found["pruned"])) > LIMIT:
        reasons = {one[5] for one in found["traces"] if one[5]}
        if distance(wanted["dense"], found["pruned"]) <= LIMIT:
            return f"DENSE (nothing pruned) {'; '.join(sorted(reasons))}"
        return f"WRONG: off by {off:.2g}"
    if traces != [one[:5] for one in wanted["traces"]]:
        return f"WRONG: traces differ: {traces}"
    return "right"


def outcomes(name: str, wanted: Results) -> dict[str, str]:
    """What becomes of every case when `name` is renamed."""
    with tempfile.TemporaryDirectory() as folder:
        if not mutate(name, Path(folder)):
            return dict.fromkeys(wanted, "invalid: no such name")
        found = execute(Path(folder), Path(folder) / SCRIPT)
    if isinstance(found, str):
        return dict.fromkeys(wanted, found)
    return {case: judge(case, wanted[case], one) for case, one in found.items()}


def cache_argument() -> str:
    """The name of the argument by which models take their cache."""
    text = (installed() / "models" / "llama" / "modeling_llama.py").read_text()
    return next(name for name in ("past_key_values", "cache") if re.search(rf"^        {name}: ", text, re.M))


def described(found: Mapping[str, str]) -> str:
    """Outcomes of a name, grouped by kind and by the line that raised, with one message and a few cases of each."""
    groups: dict[str, list[str]] = {}
    for case, outcome in found.items():
        key = re.sub(r"^(\S+ *\w*).* (\[[^\[\]]+\])$|^(WRONG: off by).*", r"\1\2\3", outcome)
        groups.setdefault(key, []).append(case)
    lines = []
    for cases in sorted(groups.values(), key=len, reverse=True):
        right, more = found[cases[0]] == "right", f" and {len(cases) - SHOWN} more" if len(cases) > SHOWN else ""
        message, where = re.fullmatch(r"(.*?)( \[[^\[\]]+\])?", found[cases[0]], flags=re.S).groups("")
        lines.append(f"  {len(cases):>3} x {message[:MESSAGE]}{where}\n")
        lines += [] if right else [f"        in {', '.join(cases[:SHOWN])}{more}\n"]
    return "".join(lines)


def main() -> None:
    """Print what becomes of each name: cases by outcome, then one line a name."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME")
    names = parser.parse_args().names
    say, wanted = sys.stdout.write, golden()
    say("".join(f"unfit: {case}: {why}\n" for case, one in wanted.items() if (why := unfit(case, one))))
    lines = [f"{'name':<32}" + "".join(f"{kind:>9}" for kind in KINDS) + f"{'seconds':>9}"]
    for name in names:
        start = time.perf_counter()
        found = outcomes(name, wanted)
        kinds = Counter(outcome.split()[0].rstrip(":") for outcome in found.values())
        seconds = time.perf_counter() - start
        lines.append(f"{name:<32}" + "".join(f"{kinds[kind] or '':>9}" for kind in KINDS) + f"{seconds:>9.1f}")
        say(f"\n== {name}\n")
        say(described(found))
        sys.stdout.flush()
    say("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
