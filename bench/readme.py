"""Write the tables of the READMEs from the rows under `bench/results/` and from the table of families.

python bench/readme.py            # rewrite the sections between the markers
python bench/readme.py --check    # exit status 1 where README is stale
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenprune.upstream.encoders import TOWERS
from tokenprune.upstream.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "demos" / "model" / "README.md")
RESULTS = ROOT / "bench" / "results"
MATCHED = "Tokens: visual tokens in a layer, mean over the layers. Decoder: its arithmetic in the prefill, of dense."


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(name: str, command: str) -> tuple[dict[str, Any], str]:
    """Content of a results file and the line that says where its figures come from."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    machine = content["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{key} {machine[key]}" for key in ("torch", "transformers") if machine.get(key))
    line = f"[`{name}.json`](bench/results/{name}.json), `{command}`: {where}; {versions}; {content['date'][:10]}."
    return content, line


def rows_of(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """The rows of a results file whose fields are as wanted."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


# Lines of the summary: the results file, which of its rows, what a line says of a row, its ratio, what that is held to.
ARITHMETIC = "{of_flops_ratio:.2f} of the FLOPs ratio"
AIM = "`aim` ({preset}, page-rank): prefill, {rows} x {visual_tokens} visual tokens"
LINES: tuple[tuple[str, dict[str, Any], str, str, str], ...] = (
    (
        "prefill",
        {"what": "prefill"},
        "`divprune`: prefill, {visual_tokens} -> {kept_tokens} visual tokens",
        "dense_over_pruned",
        "{pruned_over_ideal[1]:.2f} of the time of as many tokens",
    ),
    ("aim", {"preset": "image", "importance": "pagerank"}, AIM, "dense_over_pruned", ARITHMETIC),
    ("aim", {"preset": "video", "importance": "pagerank"}, AIM, "dense_over_pruned", ARITHMETIC),
    ("vit", {"what": "throughput"}, "`tome`: {model}, r = {r}, batch {batch}", "dense_over_tome", ARITHMETIC),
    (
        "spatten",
        {"options": {"tokens": 0.5}},
        "`spatten` (`tokens={options[tokens]}`): a token, {prompt_tokens} in the prompt",
        "pruned_over_dense",
        "KV cache {dense_kv_mib:.0f} -> {pruned_kv_mib:.0f} MiB",
    ),
)


def summary() -> str:
    """What the main methods save of the time, one line each, beside the ideal."""
    cells = []
    for name, wanted, what, ratio, held in LINES:
        for row in rows_of(name, **wanted):
            value = row[ratio] if ratio.startswith("dense") else [1 / value for value in reversed(row[ratio])]
            cells.append([what.format(**row), times(value), held.format(**row)])
    return table(["what", "dense / pruned", "against the ideal"], cells)


def overall() -> str:
    """Accuracy over all questions, a method a line."""
    rows = rows_of("quality")
    keeps = sorted({row["keep"] for row in rows if row["method"] != "dense"}, reverse=True)
    cells: dict[str, dict[float, str]] = {}
    for row in rows:
        cells.setdefault(row["method"], {})[row["keep"]] = share(row["accuracy"]["overall"])
    (dense,) = cells.pop("dense").values()
    head = [f"dense: {dense}", *(f"keep {keep:g}" for keep in keeps)]
    return table(head, [[f"`{name}`", *(found.get(keep, "-") for keep in keeps)] for name, found in cells.items()])


def times(value: list[float]) -> str:
    """Median of a ratio with its 20 % and 80 % quantiles."""
    low, median, high = value
    return f"{median:.2f} ({low:.2f}-{high:.2f})"


def share(found: dict[str, float]) -> str:
    """An accuracy in %, with half of its 95 % interval."""
    return f"{found['mean']:.1f} ±{(found['high'] - found['low']) / 2:.1f}"


def prefill() -> str:
    """Prefill and decode step."""
    content, line = source("prefill", "make bench")
    rows = content["rows"]
    prefills = [
        [
            f"{row['visual_tokens']} -> {row['kept_tokens']}",
            times(row["dense_over_pruned"]),
            times(row["pruned_over_ideal"]),
            times(row["given_over_ideal"]),
            f"{100 * row['selection_share']:.1f} %",
            f"{row['target'].replace('_over_', ' / ')}: {'met' if row['met'] else 'missed'}",
        ]
        for row in rows
        if row["what"] == "prefill"
    ]
    steps = [
        [
            str(row["batch"]),
            times(row["patched_over_plain"]),
            f"{row['target'].split()[-1]}: {'met' if row['met'] else 'missed'}",
        ]
        for row in rows
        if row["what"] != "prefill"
    ]
    head = [
        "visual tokens",
        "dense / pruned",
        "pruned / ideal",
        "the same without the selection",
        "selection",
        "target",
    ]
    return "\n".join(
        [
            "Prefill of a random LLaVA-shaped decoder of about 100 M parameters (fp32, batch 1); median of the ratios",
            "within a round, 20 % and 80 % quantiles in brackets:",
            "",
            table(head, prefills),
            "",
            "One decode step, patched against unpatched on a cache of the same physical length:",
            "",
            table(["rows in the batch", "patched / unpatched", "target, at most"], steps),
            "",
            line,
        ]
    )


def select() -> str:
    """The selection op."""
    content, line = source("max_min_select", "make bench")
    rows = [
        [
            row["device"],
            str(row["n"]),
            f"{row['keep']:g}",
            f"{row['op_ms']:.1f}",
            f"{row['op_over_product']:.2f}",
            f"{row['loop_over_op']:.1f}" if "loop_over_op" in row else "-",
        ]
        for row in content["rows"]
    ]
    head = ["device", "N", "keep", "ms", "op / product", "loop / op"]
    return table(head, rows) + "\n\n" + line


def quality(name: str = "quality") -> str:
    """Accuracy of the embedded model."""
    content = json.loads((RESULTS / f"{name}.json").read_text())
    rows = content["rows"]
    kinds = list(rows[0]["accuracy"])
    matched = any("decoder_share" in row for row in rows)
    cells = [
        [row["method"], f"{row['keep']:g}", str(row["tokens"])]
        + ([f"{100 * row['decoder_share']:.0f} %" if "decoder_share" in row else "-"] if matched else [])
        + [share(found) for found in row["accuracy"].values()]
        for row in rows
    ]
    return "\n".join(
        [
            table(["method", "keep", "tokens", *(["decoder"] if matched else []), *kinds], cells),
            "",
            f"`make quality`, rows in `bench/results/{name}.json`; ± is half of a 95 % interval."
            + (" " + MATCHED if matched else ""),
        ]
    )


def quality_vit() -> str:
    """Accuracy of the small vision transformer."""
    rows = json.loads((RESULTS / "quality_vit.json").read_text())["rows"]
    cells = []
    for row in rows:
        (found,) = row["accuracy"].values()
        cells.append([row["method"], f"{row['keep']:.2g}", str(row["tokens"]), share(found)])
    return (
        table(["method", "keep", "patches left", "accuracy"], cells) + "\n\nRows in `bench/results/quality_vit.json`."
    )


def families() -> str:
    """The table of families."""
    rows = [
        [
            f"`{family.name}`",
            "images, videos" if family.video else "images",
            "no" if family.mrope else "yes",
            family.note,
        ]
        for family in FAMILIES
    ]
    return table(["family", "takes", '`positions="packed"`', "note"], rows)


def encoders() -> str:
    """The table of vision encoders."""
    rows = [[f"`{tower.name}`", tower.library, ", ".join(f"`{host}`" for host in tower.hosts)] for tower in TOWERS]
    return table(["encoder", "library", "classes that hold the blocks"], rows)


def versions() -> str:
    """The versions of the libraries below that the oracles of the families were run on."""
    path = RESULTS / "minors.json"
    if not path.exists():
        return "Not measured yet."
    content = json.loads(path.read_text())
    libraries: dict[str, list[dict[str, Any]]] = {}
    for row in content["rows"]:
        libraries.setdefault(row["library"], []).append(row)
    cells = []
    for library, rows in libraries.items():
        named = [row["version"] + ("" if row["status"] == "passed" else f" ({row['status']})") for row in rows]
        counts = sorted({row["passed"] for row in rows if row["status"] == "passed"})
        cells.append([f"`{library}`", ", ".join(named), "-".join(map(str, counts[:1] + counts[1:][-1:]))])
    notes = [
        f"{library} {row['version']}: {row['lacks']}."
        for library, rows in libraries.items()
        for row in rows
        if row["lacks"]
    ]
    line = f"[`minors.json`](bench/results/minors.json), `make minors`; {content['date'][:10]}."
    return "\n\n".join([table(["library", "versions", "tests on each"], cells), *notes, line])


Column = tuple[str, Callable[[dict[str, Any]], str]]


def measured(name: str, what: str, columns: list[Column], *, folder: str = "") -> str:
    """A table of the rows of one kind of a results file; says so where there is no such file."""
    path = RESULTS / folder / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    content, line = source(f"{folder}/{name}" if folder else name, "make bench")
    rows = [row for row in content["rows"] if what in ("", row.get("what"))]
    return table([head for head, _ in columns], [[cell(row) for _, cell in columns] for row in rows]) + "\n\n" + line


def plain(key: str, unit: str = "") -> Callable[[dict[str, Any]], str]:
    """A column that shows a field: a ratio with its quantiles where it has some."""

    def cell(row: dict[str, Any]) -> str:
        value = row.get(key, "-")
        if isinstance(value, list) and len(value) == 3:
            return times(value)
        return f"{value:.2f}{unit}" if isinstance(value, float) else f"{value}{unit}"

    return cell


def target(row: dict[str, Any]) -> str:
    """What a row should reach, and whether it does."""
    if "target" not in row:
        return "-"
    return f"{row['target'].replace('_over_', ' / ').replace('_', ' ')}: {'met' if row['met'] else 'missed'}"


def importance() -> str:
    """The importance op beside the attention that it is computed for."""
    columns: list[Column] = [("device", plain("device")), ("tokens", plain("n")), ("heads x width", _heads)]
    columns += [("dtype", plain("dtype"))]
    for reduction in ("last_query", "column_sum", "pagerank"):
        columns += [(f"{reduction} / sdpa", plain(f"{reduction}_over_attention"))]
        columns += [("MB", plain(f"{reduction}_peak_mb"))]
    return measured("attention_importance", "", columns)


def _heads(row: dict[str, Any]) -> str:
    return f"{row['heads']} x {row['width']}"


def topk() -> str:
    """The top-k op."""
    columns = [("device", "device"), ("rows", "rows"), ("N", "n"), ("k", "k"), ("topk + sort / op", "pair_over_op")]
    return measured("top_k_select", "", [(head, plain(key)) for head, key in columns])


def vit() -> str:
    """Vision transformers."""
    columns: list[Column] = [(head, plain(head)) for head in ("model", "batch", "r")]
    columns += [("dense / ToMe", plain("dense_over_tome")), ("of the FLOPs ratio", plain("of_flops_ratio"))]
    columns += [("dense / free", plain("dense_over_sliced"))]
    columns += [("straightforward / ToMe", plain("straightforward_over_tome")), ("target", target)]
    share: list[Column] = [(head, plain(head)) for head in ("model", "batch", "tokens", "share")]
    shares = measured("vit", "share of matching and merging in the time of a block", [*share, ("target", target)])
    return measured("vit", "throughput", columns) + "\n\nMatching and merging, of the time of a block:\n\n" + shares


def aim() -> str:
    """Pruning inside the decoder."""
    columns: list[Column] = [(head, plain(head)) for head in ("preset", "importance")]
    columns += [("visual tokens", plain("visual_tokens")), ("rows", plain("rows"))]
    columns += [("dense / pruned", plain("dense_over_pruned")), ("pruned / ideal", plain("pruned_over_ideal"))]
    columns += [("FLOPs ratio", plain("flops_ratio")), ("fraction of it", plain("of_flops_ratio"))]
    columns += [("fraction of the layers' ratio", plain("of_layer_flops_ratio")), ("target", target)]
    return measured("aim", "", columns)


def decoding() -> str:
    """Decoding with SpAtten."""
    columns: list[Column] = [("what", _options), ("prompt", plain("prompt_tokens"))]
    columns += [("a token, pruned / dense", plain("pruned_over_dense"))]
    columns += [("KV, MiB", lambda row: f"{row['dense_kv_mib']:.0f} -> {row['pruned_kv_mib']:.0f}")]
    columns += [("KV bytes read", _bytes_read), ("target", target)]
    return measured("spatten", "", columns)


def _options(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in row["options"].items())


def _bytes_read(row: dict[str, Any]) -> str:
    return "-" if row["bytes_read"] is None else f"{100 * row['bytes_read']:.0f} %"


def checks() -> str:
    """What looking after every call costs of a decoding step."""
    columns: list[Column] = [
        ("layers", plain("layers")),
        ("a decoding step, ms", lambda row: f"{row['step_latency_ms'][1]:.1f}"),
        ("its checks, ms", lambda row: f"{row['checks_latency_ms'][1] / row['calls']:.3f}"),
        ("checks / step", lambda row: " - ".join(f"{100 * value:.2f} %" for value in row["checks_of_step"][::2])),
        ("target", lambda row: f"under 1 %: {'met' if row['checks_of_step'][1] < 0.01 else 'missed'}"),
    ]
    return measured("checks", "", columns)


def step() -> str:
    """What a decoding step costs in Python beside that of the unpruned model."""
    columns: list[Column] = [
        ("method", lambda row: f"`{row['kind']}`"),
        ("options", lambda row: ", ".join(f"`{name}={value}`" for name, value in row["options"].items())),
        ("dense step, ms", lambda row: f"{row['dense_latency_ms']:.1f}"),
        ("added, ms", lambda row: times(row["added_latency_ms"])),
        ("target", lambda row: f"{row['target_ms']:g}: {'met' if row['met'] else 'missed'}" if "met" in row else ""),
    ]
    return measured("step", "", columns)


SECTIONS: dict[str, Callable[[], str]] = {
    "summary": summary,
    "overall": overall,
    "importance": importance,
    "topk": topk,
    "vit": vit,
    "aim": aim,
    "decoding": decoding,
    "prefill": prefill,
    "select": select,
    "quality": quality,
    "quality_spatten": lambda: quality("quality_spatten"),
    "quality_vit": quality_vit,
    "families": families,
    "encoders": encoders,
    "versions": versions,
    "checks": checks,
    "step": step,
}


def rendered(path: Path) -> str:
    """A file with each of its sections filled in; links to rows go out from where it lies."""
    text, rows = path.read_text(), Path(os.path.relpath(RESULTS, path.parent)).as_posix()
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if opening in text:
            start, end = text.index(opening) + len(opening), text.index(closing)
            text = text[:start] + section().replace("](bench/results/", f"]({rows}/") + "\n" + text[end:]
    return text


def main() -> int:
    """Rewrite the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file is stale")
    options = parser.parse_args()
    stale = {path: new for path in FILES if (new := rendered(path)) != path.read_text()}
    for path, new in stale.items():
        if options.check:
            print(f"{path.relative_to(ROOT)} is stale: run python bench/readme.py", file=sys.stderr)
        else:
            path.write_text(new)
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
