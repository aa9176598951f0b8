"""What tables say of how training runs: exactness, time, memory, layouts."""

from typing import Any

from tables import load, markdown


def speed() -> str:
    """What freezing and locating cost."""
    found = load("speed.json")
    training, locating, memory = found["training"], found["locating"], found["memory"]
    rows = [
        [
            f"step time, {training['fraction']:.0%} of MLP neurons frozen / nothing frozen",
            f"{training['safeft against plain']['ratio_median']:.3f}",
        ],
        [
            "the same with a dense 0/1 mask in a hook (no freeze under weight decay)",
            f"{training['dense mask against plain']['ratio_median']:.3f}",
        ],
        [
            "peak extra memory / bytes of the frozen slices",
            f"{training['safeft extra over slices']:.2f}",
        ],
        ["the same with a dense mask", f"{training['dense mask extra over slices']:.2f}"],
    ]
    for method in ("contrast", "variance", "wanda", "attribution", "snip"):
        entry = locating[method]
        speed = f"{entry['tokens_per_second_over_bare']:.2f}"
        rows.append(
            [f"locating by `{method}`: tokens/s over a bare {entry['against']} pass", speed]
        )
    rows.append(
        ["peak memory of locating, 10,000 / 100 prompts", f"{memory['streaming_growth']:.2f}"]
    )
    return (
        f"{markdown(['', 'median of pairs'], rows)}\n\n`{found['command']}` ({found['machine']}; "
        f"{training['weights'] / 1e6:.0f}M weights, {training['tokens_per_step']} tokens a step)"
    )


def engines() -> str:
    """Exact under every engine, and what a step costs there."""
    found = load("engines.json")
    heads = ["engine", "full and LoRA, fp32 and bf16, accumulation 1 and 2",
             "frozen bits changed", "without the pin", "without the mask",
             "step time with / without"]  # fmt: skip
    rows = []
    for engine, cells in found["exactness"].items():
        whole = [cell for cell in cells if not cell["taken_out"]]
        exact = sum(cell["verdict"] == "exact" for cell in whole)
        changed = sum(cell["frozen_changed"] for cell in whole)

        def verdicts(part: str, tuning: str, cells: Any = cells) -> str:
            said = {
                cell["verdict"]
                for cell in cells
                if cell["taken_out"] == part and cell["tuning"] == tuning
            }
            return " / ".join(sorted(said))

        without_pin = f"full: {verdicts('pin', 'full')}; LoRA: {verdicts('pin', 'lora')}"
        both = {verdicts("mask", tuning) for tuning in ("full", "lora")}
        ratio = found["overhead"][engine]["ratio_median"]
        wrappers = ", ".join(dict.fromkeys(cell["wrapper"] for cell in whole))
        name = f"{engine} ({wrappers}, {whole[0]['world_size']} process"
        name += "es)" if whole[0]["world_size"] > 1 else ")"
        rows.append(
            [name, f"{exact} of {len(whole)} exact", str(changed), without_pin,
             " / ".join(sorted(both)), f"{ratio:.3f}"]
        )  # fmt: skip
    return (
        f"{markdown(heads, rows)}\n\n`{found['command']}` ({found['machine']}). LoRA needs no pin: "
        "the decay of an adapter's zeros is zero."
    )


def scale() -> str:
    """What freezing costs at sizes that were not run."""
    found = load("scale.json")
    heads = ["computed from shapes", "engine, processes", "pinned per process",
             "mask moves per micro-batch", "sent per step", "sent per certificate"]  # fmt: skip
    rows = []
    for row in found["rows"]:
        if row["processes"] not in (8, 1024) or row["engine"] not in ("fsdp2", "zero3"):
            continue
        rows.append(
            [
                row["model"],
                f"{row['engine']}, {row['processes']}",
                f"{row['pinned_bytes'] / 2**20:,.0f} MiB",
                f"{row['mask_bytes_per_microbatch'] / 2**30:,.2f} GiB",
                f"{row['sent_per_step']}",
                f"{row['sent_per_certificate'] / 2**30:.2f} GiB",
            ]
        )
    agreed = sum(row["measured"] == row["computed"] for row in found["checked"])
    return (
        f"{markdown(heads, rows)}\n\n`{found['command']}`: {found['fraction']:.0%} of the MLP "
        f"neurons; {agreed} of {len(found['checked'])} real two-process runs hold, weight for "
        "weight, what the arithmetic says. Under ZeRO the mask copies each gradient it changes, "
        "which a large mixture of experts feels: prefer FSDP2 there."
    )


PROVEN = ("units", "full", "lora")


def families() -> str:
    """Models whose layouts are proven, those of like layout together."""
    found = load("families.json")
    proven = [
        f
        for f in found["families"]
        if all(f[column]["passed"] and not f[column]["failed"] for column in PROVEN)
    ]
    alike: dict[str, list[str]] = {}
    for family in proven:
        for tower, layouts in family["layouts"].items():
            parts = [f"{'' if tower == 'text' else tower + ': '}{one}" for one in layouts]
            alike.setdefault("<br>".join(parts), []).append(family["family"])
    rows = [
        [", ".join(dict.fromkeys(names)), layout.replace(" > ", " → ")]
        for layout, names in sorted(alike.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    failed = sorted({f["family"] for f in found["families"]} - {f["family"] for f in proven})
    note = (
        f"{len(proven)} of {len(found['families'])} families proven, units, full tuning and LoRA "
        f"each (transformers {found['transformers']}"
        + (f"; not: {', '.join(failed)}" if failed else "")
        + f"). `{found['command']}`"
    )
    return f"{markdown(['families', 'a unit reads → writes'], rows)}\n\n{note}"


def directions() -> str:
    """What holding directions costs, and how exact it is."""
    found = load("directions.json")
    heads = [
        "AdamW, weight decay",
        "full",
        "LoRA",
        "full, without the pin",
        "LoRA, without the pin",
    ]
    rows = []
    for engine in dict.fromkeys(row["engine"] for row in found["long"]):
        cells = []
        for pinned in (True, False):
            for tuning in ("full", "lora"):
                (row,) = [
                    row
                    for row in found["long"]
                    if (row["engine"], row["tuning"], row["pinned"]) == (engine, tuning, pinned)
                ]
                cells.append("stopped: W U moved" if row["error"] else f"{row['largest']:.1e}")
        steps = found["long"][0]["steps"]
        rows.append([f"{engine}, {steps:,} steps: largest relative change of W U", *cells])
    parts = [markdown(heads, rows)]
    heads = ["step time with / without, tokens a step over the width", "10% of the rank", "25%"]
    cost = found["cost"]
    rows = [
        [
            f"{'LoRA' if tuning == 'lora' else 'full'}, {over:.0f}",
            *(
                f"{row['ratio_median']:.2f}"
                for share in (0.1, 0.25)
                for row in cost["rows"]
                if (row["tuning"], row["tokens_over_width"], row["share"]) == (tuning, over, share)
            ),
        ]
        for tuning in ("full", "lora")
        for over in sorted({row["tokens_over_width"] for row in cost["rows"]})
    ]
    parts.append(markdown(heads, rows))
    heads = ["GiB, float32", "bases, in every process", "W U, cut like the weights", "on disk",
             "statistics while locating"]  # fmt: skip
    rows = [
        [
            f"{row['model']}, {row['share']:.0%} of the rank",
            f"{row['bases']:.1f}",
            f"{row['targets']:.1f}",
            f"{row['artefact']:.1f}",
            f"{row['statistics']:.0f}, or {row['statistics_at_least']:.1f} in many passes",
        ]
        for row in found["memory"]["rows"]
    ]
    parts.append(markdown(heads, rows))
    locating = found["locating"]
    speed, seconds = locating["pass_over_bare"]["ratio_median"], locating["eigenvectors_seconds"]
    parts.append(
        f"Locating takes {1 / speed:.2f} of the tokens a second of a bare forward pass, and its "
        f"eigenvectors {seconds:.1f} s. `{found['command']}` ({found['machine']}; width "
        f"{cost['width']}, {cost['layers']} layers; sizes computed from shapes, checked "
        "against a real pin)"
    )
    return "\n\n".join(parts)
