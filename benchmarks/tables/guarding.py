"""What tables say of the guard: how good, how soon, at what cost, and under load."""

from typing import Any

from tables import load, markdown

KINDS = {
    "held_out_parts": "held-out parts",
    "sets_left_out": "a set left out",
    "new_sets": "two new sets",
}
SHORT = ("guard", "last-layer probe", "TF-IDF")


def guard() -> str:
    """The comparison in short."""
    found = load("guard.json")
    return f"{_methods(found, SHORT)}\n\n{_said(found)}"


def guard_whole() -> str:
    """Every method; and set by set."""
    found = load("guard.json")
    summary, cells = found["sets"]["summary"], found["sets"]["cells"]
    methods = sorted(summary, key=lambda m: -_order(summary[m]))
    sets = dict.fromkeys(
        (key.split("/")[0], name)
        for key, cell in cells.items()
        for name in cell["sets"]
        if key.split("/")[2] == "guard"
    )
    rows = []
    for setting, name in sets:
        row = [f"{name} ({'held out' if setting.startswith('held') else 'left out'})"]
        for method in methods:
            here = [
                cell["sets"][name]
                for key, cell in cells.items()
                if key.split("/")[0] == setting and key.split("/")[2] == method
            ]
            row.append(_mean(here, "macro_f1") + " / " + _mean(here, "auroc") if here else "")
        rows.append(row)
    heads = ["macro-F1 / AUROC", *methods]
    return f"{_methods(found, methods)}\n\n{_said(found)}\n\n{markdown(heads, rows)}"


def _methods(found: dict[str, Any], methods: Any) -> str:
    summary, cells = found["sets"]["summary"], found["sets"]["cells"]
    heads = ["macro-F1, AUROC", *KINDS.values(), "units", "seconds to fit"]
    rows = []
    for method in methods:
        row = [f"**{method}**" if method == "guard" else method]
        for kind in KINDS:
            each = summary[method][kind]
            row.append(
                f"{each['macro_f1']:.3f} ± {each['half_interval']:.3f}, {each['auroc']:.3f}"
                if each
                else ""
            )
        mine = [cell for key, cell in cells.items() if key.split("/")[2] == method]
        units = [cell["units"] for cell in mine if "units" in cell]
        row.append(f"{sum(units) / len(units):,.0f}" if units else "")
        seconds = [cell["processor_seconds"] for cell in mine]
        row.append(f"{sum(seconds) / len(seconds):.0f}")
        rows.append(row)
    return markdown(heads, rows)


def _said(found: dict[str, Any]) -> str:
    seeds = 1 + max(int(key.split("/")[1]) for key in found["sets"]["cells"])
    return (
        "Mean over sets ± half the 95% interval over their texts; all-MiniLM-L6-v2 on OpenAI's "
        "moderation samples, HateCheck, XSTest, and AdvBench against self_instruct; "
        f"{seeds} split{'s' if seeds > 1 else ''}. Seconds of one core, activations at hand; of "
        "guards with a part changed without the probes. `python benchmarks/guard.py --data "
        "../shared/data --model runs/testbed`"
    )


def _order(row: dict[str, Any]) -> float:
    return row["mean"] or 0.0


def _mean(cells: list[dict[str, Any]], name: str) -> str:
    return f"{sum(cell[name] for cell in cells) / len(cells):.3f}"


def guard_stream() -> str:
    """How soon answers that turn harmful are found out."""
    found = load("guard.json")["stream"]
    heads = ["model", "flagged from", "at the boundary", "32 tokens later", "64", "128",
             "false alarms per 1,000 safe answers", "stream against batch"]  # fmt: skip
    rows = []
    for bed in ("demo", "public"):
        part = found[bed]
        for name, each in part["thresholds"].items():
            rates = [each["recall"][more] for more in ("0", "32", "64", "128")]
            recall = [f"{rate['count'] / rate['total']:.2f}" for rate in rates]
            rows.append(
                [
                    f"{part['model']}, {part['weights'] / 1e6:.1f}M weights",
                    f"{each['threshold']:.3f} ({name})",
                    *recall,
                    f"{each['false_alarms_per_1000']:.0f} "
                    f"({each['false_alarms']['count']} of {part['safe_answers']})",
                    f"{part['largest_difference']['value']:.0e}",
                ]
            )
    demo, public = found["demo"], found["public"]
    return (
        f"{markdown(heads, rows)}\n\nRecall over {demo['unsafe_answers']} and "
        f"{public['unsafe_answers']} answers that begin with {demo['tokens_before_boundary']:.0f} "
        f"and {public['tokens_before_boundary']:.0f} harmless tokens on average and go on with "
        f"{demo['tokens_after_boundary']['mean']:.0f} and "
        f"{public['tokens_after_boundary']['mean']:.0f} of others; the last column over "
        f"{demo['largest_difference']['prefixes']} prefixes each."
    )


def guard_cost() -> str:
    """What it costs beside the model."""
    found = load("guard.json")["cost"]
    rows = []
    for name, each in found["token_time"].items():
        for one in each:
            rows.append(
                [
                    f"token time with / without, {name}, batches of {one['rows']}",
                    _ratio(one),
                    f"{one['ms_a_token']:.1f} ms a token",
                ]
            )
    for name, one in found["scoring"].items():
        rows.append(
            [f"texts scored a second over bare passes, {name}", _ratio(one),
             f"{one['texts_a_second']:.0f} a second"]
        )  # fmt: skip
    rows.append(
        ["file for Qwen3-4B, by the calculator", f"{found['file_of_4B']['bytes'] / 1e6:.0f} MB", ""]
    )
    rows.append(
        [
            "calculated / written, the larger model",
            f"{found['file']['calculated'] / found['file']['bytes']:.3f}",
            "",
        ]
    )
    return (
        f"{markdown(['', 'median of pairs [95% interval]', ''], rows)}\n\nGuards of full size: 20% "
        "of the units of what they read, and the widest networks; one thread."
    )


def _ratio(one: dict[str, Any]) -> str:
    return f"{one['ratio']:.3f} [{one['interval']['low']:.3f}, {one['interval']['high']:.3f}]"


def guard_serve() -> str:
    """The service under load."""
    found = load("guard.json")["serve"]
    rows = []
    for key, name in (("load", "alone"), ("load_beside_bad_clients", "beside bad clients")):
        each = found[key]
        said = ", ".join(f"{count:,} with {status}" for status, count in each["statuses"].items())
        rows += [
            [f"{each['requests']:,} requests by {each['clients']} clients, {name}", said],
            ["largest difference from each text alone",
             f"{each['largest_difference_from_alone']:.0e}"],
            ["requests a second; median and 99% of seconds",
             f"{each['requests_a_second']:.0f}; {each['seconds']['median']:.2f}, "
             f"{each['seconds']['99%']:.2f}"],
        ]  # fmt: skip
    for name, statuses in found["bad_clients"].items():
        said = ", ".join(f"{count} with {status}" for status, count in statuses.items())
        rows.append([f"bad clients: {name}", said])
    memory = [
        f"{found['memory_mib'][at]:.0f}" for at in ("warm", "after_load", "after_bad_clients")
    ]
    rows.append(
        ["its own memory, warm / after load / after bad clients", f"{' / '.join(memory)} MiB"]
    )
    end = found["end"]
    flight = ", ".join(f"{count} with {status}" for status, count in end["in_flight"].items())
    rows.append(
        ["told to end under load", f"exit code {end['exit_code']} after {end['seconds']:.1f} s; "
         f"in flight: {flight}"]
    )  # fmt: skip
    return markdown(["the service on loopback", ""], rows)
