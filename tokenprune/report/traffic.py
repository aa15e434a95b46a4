"""Bytes of keys and values read while tokens were generated, as the report shows them."""

from tokenprune.report.tables import number
from tokenprune.signals import Traffic

TRAFFIC_HEADER = ["read of the KV cache", "MiB", "factor"]


def traffic_rows(traffic: Traffic) -> list[list[str]]:
    """A row for each thing that is not read, with what is left after it and the factor that it makes."""
    steps = [
        ("tokens that left", traffic.tokens),
        ("heads that left", traffic.heads),
        ("values not looked at", traffic.values),
        ("bits not looked at", traffic.read),
    ]
    rows, before = [["dense", number(traffic.dense / 2**20), ""]], traffic.dense
    for name, after in steps:
        rows.append([f"without {name}", number(after / 2**20), _factor(before, after)])
        before = after
    return [*rows, ["in all", number(traffic.read / 2**20), _factor(traffic.dense, traffic.read)]]


def _factor(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else "-"


def traffic_sentence(traffic: Traffic) -> str:
    """How often the low bits were needed."""
    return (
        f"Counted over {traffic.steps:,} attentions of a row in decoding steps; {100 * traffic.recomputed:.1f} % of "
        "their heads read the low bits too."
    )
