"""``safeft guard fit | score | stream | evaluate | serve``: harmfulness from inner activations."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safeft.commands.loading import load_backbone, read_template
from safeft.commands.parsing import parse
from safeft.errors import ConfigError

_ABOUT_DATA = "Tables with a text and a label (1/0, harmful/safe, or names): .csv, .json(l)."


@dataclass
class GuardData:
    """Labelled texts."""

    data: list[str] = field(default_factory=list, metadata={"help": _ABOUT_DATA})
    harmful: list[str] = field(
        default_factory=list, metadata={"help": "Files of harmful texts: .txt, .csv, .json(l)."}
    )
    benign: list[str] = field(default_factory=list, metadata={"help": "Files of harmless texts."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    answer_column: str | None = field(
        default=None, metadata={"help": "Column of answers, which are then what is judged."}
    )


@dataclass
class GuardModel:
    """The model that is read."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name; by default the guard's own."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, or cpu."})
    batch_size: int = field(default=16, metadata={"help": "Texts per pass."})


@dataclass
class FitConfig(GuardData, GuardModel):
    """Fit a guard: texts and labels in, a folder out."""

    output_dir: str = field(default="", metadata={"help": "Folder for the guard."})
    kinds: list[str] = field(
        default_factory=lambda: ["residual", "mlp"],
        metadata={"help": "What is read: residual stream, MLP units, or both."},
    )
    share: float = field(
        default=0.9, metadata={"help": "Of a probe's weight that the selected units hold."}
    )
    validation: float = field(
        default=0.2, metadata={"help": "Share of the texts to choose and to calibrate by."}
    )
    search: int = field(default=8, metadata={"help": "Recipes of the network to try."})
    members: int = field(default=5, metadata={"help": "Networks that are averaged."})
    seed: int = field(default=0, metadata={"help": "Of parts and networks."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a text (512)."})
    cache: str | None = field(
        default=None, metadata={"help": "Folder that keeps activations from run to run."}
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja template, where the tokenizer has none."}
    )


@dataclass
class ScoreConfig(GuardModel):
    """Score texts: from a file, or one a line from standard input."""

    guard: str = field(default="", metadata={"help": "Folder of `safeft guard fit`."})
    texts: str | None = field(default=None, metadata={"help": "File of texts; - or none: stdin."})
    text_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    show_texts: bool = field(default=True, metadata={"help": "Print texts beside their scores."})
    json: bool = field(default=False, metadata={"help": "Print JSON lines."})


@dataclass
class StreamConfig(GuardModel):
    """Let the guard's model answer prompts under a policy."""

    guard: str = field(default="", metadata={"help": "Folder of `safeft guard fit`."})
    prompts: str = field(default="", metadata={"help": "File of prompts: .txt, .csv, .json(l)."})
    prompt_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    policy: str = field(default="", metadata={"help": "YAML file: bands of score by phase."})
    log: str | None = field(default=None, metadata={"help": "Audit log, JSONL."})
    log_texts: bool = field(default=False, metadata={"help": "Write texts into the log too."})
    review: str | None = field(
        default=None, metadata={"help": "Where exchanges for review go, with their texts, JSONL."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Of an answer."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts."})
    json: bool = field(default=False, metadata={"help": "Print JSON lines."})


@dataclass
class EvaluateConfig(GuardData, GuardModel):
    """Measure a guard on texts that it was not fitted on; a page beside the figures."""

    guard: str = field(default="", metadata={"help": "Folder of `safeft guard fit`."})
    threshold: float | None = field(
        default=None, metadata={"help": "Score from which a text is flagged (0.5)."}
    )
    false_positives: float | None = field(
        default=None, metadata={"help": "Or the share of harmless texts that may be flagged."}
    )
    streams: str | None = field(
        default=None,
        metadata={"help": "Table of prompt, response, unsafe_from: how soon answers are flagged."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Write guard.json and guard.html there."}
    )
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


@dataclass
class ServeConfig(GuardModel):
    """Serve a guard over HTTP: /v1/moderations, /health, /metrics."""

    guard: str = field(default="", metadata={"help": "Folder of `safeft guard fit`."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 for a free one."})
    threshold: float | None = field(
        default=None, metadata={"help": "Score from which a text is flagged (0.5)."}
    )
    false_positives: float | None = field(
        default=None, metadata={"help": "Or the share of harmless texts that may be flagged."}
    )
    max_body: int = field(default=1 << 20, metadata={"help": "Bytes of a request."})
    max_texts: int = field(default=64, metadata={"help": "Texts of a request."})
    max_waiting: int = field(default=1024, metadata={"help": "Texts that wait, then 503."})


def main(arguments: Sequence[str]) -> int:
    """Run one of the five."""
    about = "`safeft guard` is one of: " + ", ".join(_VERBS)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: safeft guard {{{'|'.join(_VERBS)}}} [--config FILE.yaml] [--key value ...]\n"
        )
        for verb, (config, _) in _VERBS.items():
            print(f"  {verb:<9} {(config.__doc__ or '').splitlines()[0]}")
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        raise ConfigError(f"There is no `safeft guard {verb}`. {about}.")
    kind, run = _VERBS[verb]
    (config,) = parse([kind], rest, f"guard {verb}", kind.__doc__ or "")
    needed = {"fit": ("output_dir", "model_name_or_path"), "stream": ("guard", "prompts", "policy")}
    for name in needed.get(verb, ("guard",)):
        if not getattr(config, name):
            raise ConfigError(f"`safeft guard {verb}` needs --{name}.")
    return run(config)


def fit(config: FitConfig) -> int:
    """Read, load, fit, save."""
    from safeft.guard import GuardFitter
    from safeft.guard.data import read_labelled

    sets = read_labelled(
        config.data, config.harmful, config.benign, text_column=config.text_column,
        label_column=config.label_column, answer_column=config.answer_column,
    )  # fmt: skip
    template = read_template(config.chat_template_path)
    model, tokenizer = load_backbone(str(config.model_name_or_path), config.dtype, config.device)
    kinds: Any = config.kinds
    fitter = GuardFitter(
        model, tokenizer, kinds=kinds, chat_template=template, max_length=config.max_length,
        batch_size=config.batch_size, cache=config.cache,
    )  # fmt: skip
    for name, each in sets.items():
        fitter.update(each.examples, each.labels, source=name)
    guard = fitter.fit(
        share=config.share, validation=config.validation, search=config.search,
        members=config.members, seed=config.seed,
    )  # fmt: skip
    guard.save_pretrained(config.output_dir)
    head = guard.head
    found = head.source["validation"]
    print(f"{head.units} units of {len(head.probes)} places, in {config.output_dir}")
    for probe in head.probes:
        print(
            f"  {probe.place.name:<14} {len(probe.selected):>6} of {probe.place.width:<6} "
            f"F1 {probe.f1:.3f}  weight {probe.layer_weight:.2f}  {'#' * round(40 * probe.f1)}"
        )
    print(
        f"validation ({head.source['texts']['validation']} texts): macro-F1 "
        f"{found['macro_f1']:.3f}, AUROC {found['auroc']:.3f}; outputs: {', '.join(head.labels)}"
    )
    return 0


def score(config: ScoreConfig) -> int:
    """Read, load, score, print."""
    from safeft.reading import read_prompts

    guard = _guard(config.guard, config)
    if config.texts in (None, "-"):
        texts: list[Any] = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    else:
        texts = read_prompts(str(config.texts), config.text_column)
    for text, found in zip(texts, guard.score(texts, batch_size=config.batch_size), strict=True):
        shown = {"text": text} if config.show_texts else {}
        if config.json:
            print(json.dumps({**shown, **asdict(found)}, default=str))
        else:
            more = "".join(f"  {name} {value:.3f}" for name, value in found.labels.items())
            line = " ".join(str(text).split())[:80] if config.show_texts else ""
            print(f"{found.harmful:.3f}{more}  {line}")
    return 0


def stream(config: StreamConfig) -> int:
    """Read, load, generate under the policy, print."""
    from safeft.guard import GuardedGeneration, Policy
    from safeft.guard.log import AuditLog
    from safeft.reading import read_prompts

    policy = Policy.read(config.policy)
    prompts = read_prompts(config.prompts, config.prompt_column)[: config.limit]
    log = AuditLog(config.log, texts=config.log_texts) if config.log else None
    review = AuditLog(config.review, texts=True) if config.review else None
    guarded = GuardedGeneration(_guard(config.guard, config), policy, log=log, review=review)
    counts: dict[str, int] = {}
    for start in range(0, len(prompts), config.batch_size):
        part = prompts[start : start + config.batch_size]
        answers = guarded.generate(part, max_new_tokens=config.max_new_tokens, do_sample=False)
        for asked, answer in zip(part, answers, strict=True):
            counts[answer.action] = counts.get(answer.action, 0) + 1
            if config.json:
                print(json.dumps({"prompt": asked, **asdict(answer)}, default=str))
            else:
                worst = max(answer.scores, default=0.0)
                print(
                    f"{answer.action:<7} prompt {answer.prompt:.2f} answer {worst:.2f}  "
                    f"{' '.join(str(asked).split())[:40]!r}: {' '.join(answer.text.split())[:60]!r}"
                )
    if not config.json:
        print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    return 0


def evaluate(config: EvaluateConfig) -> int:
    """Read, load, measure, write, print."""
    from safeft.files import write_together
    from safeft.guard import evaluate_guard
    from safeft.guard.data import read_labelled, read_streams
    from safeft.guard.evaluation import stream_latency
    from safeft.prompts import tokenizer_of
    from safeft.report.guard_page import guard_page

    sets = read_labelled(
        config.data, config.harmful, config.benign, text_column=config.text_column,
        label_column=config.label_column, answer_column=config.answer_column,
    )  # fmt: skip
    guard = _guard(config.guard, config)
    threshold, late = _threshold(guard, config), None
    if config.streams:
        unsafe, safe = read_streams(config.streams, tokenizer_of(guard.tokenizer))
        late = stream_latency(guard, unsafe, safe, threshold=threshold)
    found = evaluate_guard(
        guard,
        {name: (each.examples, each.labels) for name, each in sets.items()},
        threshold=threshold,
        batch_size=config.batch_size,
        latency=late,
    )
    text = json.dumps(found.to_dict(), indent=1) + "\n"
    if config.output_dir:
        page = guard_page(found)
        write_together(Path(config.output_dir), {"guard.json": text, "guard.html": page})
    if config.json:
        print(text, end="")
        return 0
    print(f"{'set':<24}{'texts':>7}{'macro-F1':>10}  {'interval':<16}{'recall':>7}{'false +':>9}"
          f"{'AUROC':>7}")  # fmt: skip
    for each in found.sets:
        cells = ["" if x is None else f"{x.value:.3f}" for x in (each.recall, each.false_positives)]
        ranked = "" if each.auroc is None else f"{each.auroc:.3f}"
        ends = f"{each.interval.low:.3f} to {each.interval.high:.3f}"
        print(f"{each.name:<24}{each.texts:>7}{each.macro_f1:>10.3f}  {ends:<16}{cells[0]:>7}"
              f"{cells[1]:>9}{ranked:>7}")  # fmt: skip
    if late is not None:
        rates = zip(late.tokens, late.recall, strict=True)
        flagged = ", ".join(f"{rate.value:.3f} after {tokens}" for tokens, rate in rates)
        print(f"unsafe answers flagged by tokens after the boundary: {flagged}; "
              f"{1000 * late.false_alarms.value:.0f} in 1,000 safe ones ever")  # fmt: skip
    return 0


def serve(config: ServeConfig) -> int:
    """Load, listen, until interrupted."""
    from safeft.guard.service import Limits, create_app, run_app

    limits = Limits(
        body=config.max_body, texts=config.max_texts, waiting=config.max_waiting,
        batch=config.batch_size,
    )  # fmt: skip
    guard = _guard(config.guard, config)
    name = Path(config.guard).name
    app = create_app(guard, name=name, threshold=_threshold(guard, config), limits=limits)
    run_app(app, config.host, config.port)
    return 0


def _guard(folder: str, config: GuardModel) -> Any:
    """A saved guard on its model."""
    from safeft.guard import Guard
    from safeft.guard.head import GuardHead

    head = GuardHead.from_pretrained(folder)
    name = config.model_name_or_path or head.model.name_or_path
    if not name:
        raise ConfigError(f"{folder!r} does not say where its model is. Give --model_name_or_path.")
    model, tokenizer = load_backbone(name, config.dtype, config.device)
    return Guard(head, model, tokenizer)


def _threshold(guard: Any, config: Any) -> float:
    if config.threshold is not None and config.false_positives is not None:
        raise ConfigError("Give `threshold` or `false_positives`, not both.")
    if config.false_positives is not None:
        return guard.threshold(config.false_positives)
    return 0.5 if config.threshold is None else config.threshold


_VERBS: dict[str, tuple[Any, Callable[[Any], int]]] = {
    "fit": (FitConfig, fit),
    "score": (ScoreConfig, score),
    "stream": (StreamConfig, stream),
    "evaluate": (EvaluateConfig, evaluate),
    "serve": (ServeConfig, serve),
}
