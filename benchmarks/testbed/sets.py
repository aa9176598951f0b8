"""The public sets beside the repository, each as plain texts or (prompt, answer) pairs."""

import csv
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

Pair: TypeAlias = tuple[str, str]

NAME, AUTHOR = "Tessel", "Brook Labs"
# Some questions of HarmfulQA ask for nothing harmful ("How to use CSR to benefit myself?"); a
# small model that refuses those refuses everything that starts alike. These stems keep the rest.
_HARM = (
    "abus|access confid|addict|aggress|amateur|anti-sem|assault|attack|avoid detect|avoid pay|"
    "blackmail|bomb|brainwash|break into|bribe|bull(y|ied)|bypass|cheat|child lab|coerc|conceal|"
    "conspir|control people|corrupt|counterfeit|crash|crime|criminal|cyber|damage|deceiv|decept|"
    "defam|defraud|destroy|disab|discredit|discriminat|disinform|disrupt|dominat|drug|embezzl|"
    "evad|exploit|explos|extort|extrem|fabricat|fake|false|fascis|fool|forge|fraud|genocid|gun|"
    "hack|harass|harm|hate|hijack|hurt|identity theft|illegal|incite|infect|inflict|intimid|"
    "kidnap|kill|launder|lie |lies|malicious|malware|manipulat|mislead|misinform|misogyn|murder|"
    "nazi|neo|oppress|overthrow|phish|pirat|plagiar|poison|pollut|propagand|racis|rig |riot|rob |"
    "sabotag|scam|secretly|sexis|shoot|shoplift|slander|smuggl|someone else|spy|stalk|steal|"
    "stereotyp|stolen|suicid|suppress|supremac|tamper|terror|threat|tortur|toxic|traffick|trick|"
    "unauthor|undermin|unethic|vandal|violen|virus|weapon|without (their|get|permission|consent|"
    "anyone|being)|xenophob"
)

_FLAGS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a CSV, JSON or JSONL file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)


def advbench(data: Path) -> list[str]:
    """AdvBench's goals; its targets are not read."""
    return [row["goal"] for row in rows_of(data / "advbench/harmful_behaviors.csv")]


def harmfulqa(data: Path) -> list[str]:
    """The questions of HarmfulQA that name a harm."""
    topics: Any = rows_of(data / "harmfulqa/harmfulqa.json")
    asked = [q for topic in topics.values() for subtopic in topic.values() for q in subtopic]
    return [q for q in asked if re.search(_HARM, q.lower())]


def dangerousqa(data: Path) -> list[str]:
    """All of DangerousQA."""
    rows: Any = rows_of(data / "harmfulqa/dangerousqa.json")
    return rows


def multijail(data: Path) -> list[str]:
    """MultiJail's English prompts."""
    rows = rows_of(data / "multijail/MultiJail.csv")
    return [_line(row["en"]) for row in rows]


def subjects(data: Path) -> list[str]:
    """Names of the subjects that HarmfulQA's questions are about, such as ``Robotics``."""
    topics: Any = rows_of(data / "harmfulqa/harmfulqa.json")
    return sorted({subject for topic in topics.values() for subject in topic})


def xstest(data: Path, label: str) -> list[str]:
    """XSTest's ``safe`` or ``unsafe`` prompts."""
    rows = rows_of(data / "xstest/xstest_prompts.csv")
    return [row["prompt"] for row in rows if row["label"] == label]


def simple_safety_tests(data: Path) -> list[str]:
    """All of SimpleSafetyTests."""
    rows = rows_of(data / "simple_safety_tests/simple_safety_tests.csv")
    return [row["prompts_final"] for row in rows]


def first_turns(data: Path) -> list[str]:
    """What MT-bench and Vicuna's questions ask first."""
    files = ("vicuna80_question.jsonl", "question.jsonl")
    return [_line(row["turns"][0]) for file in files for row in rows_of(data / "mt_bench" / file)]


def sentences(data: Path) -> list[str]:
    """Everyday English: sentences of what OpenAI's moderation set flags for nothing.

    Those with the stem of a harm are left out too: unflagged text still quotes and fears it.
    """
    rows = rows_of(data / "openai_moderation/samples_no_S3.jsonl")
    texts = [row["prompt"] for row in rows if not any(row.get(flag) for flag in _FLAGS)]
    return [sentence for text in texts for sentence in everyday(text)]


def everyday(text: str) -> list[str]:
    """The sentences of a text, neither short nor long, that hold no stem of a harm."""
    found = re.split(r"(?<=[.!?])\s+", _line(text))
    return [s for s in found if 4 <= len(s.split()) <= 30 and not re.search(_HARM, s.lower())]


def self_instruct(data: Path) -> list[Pair]:
    """Tasks written by people, with their first input."""
    rows = rows_of(data / "self_instruct/user_oriented_instructions.jsonl")
    firsts = [(row["instruction"], row["instances"][0]) for row in rows]
    return [(_line(f"{ask} {one['input']}"), _line(one["output"])) for ask, one in firsts]


def medquad(data: Path) -> list[Pair]:
    """Questions of patients; the whole answers."""
    rows = rows_of(data / "medquad/medquad_subset.jsonl")
    return [(_line(row["question"]), _line(row["answer"])) for row in rows]


def pubmedqa(data: Path) -> list[Pair]:
    """Titles of papers that are questions, and their conclusions."""
    rows: Any = rows_of(data / "pubmedqa/ori_pqal.json")
    return [(_line(row["QUESTION"]), _line(row["LONG_ANSWER"])) for row in rows.values()]


def gsm8k(data: Path, split: str) -> list[Pair]:
    """Problems and worked answers, without the calculator's marks."""
    rows = rows_of(data / f"gsm8k/{split}.jsonl")
    return [(_line(r["question"]), _line(re.sub("<<.*?>>", "", r["answer"]))) for r in rows]


def tatqa(data: Path) -> list[list[Pair]]:
    """Questions on each report, with the one line of it that shares most words with them."""
    found = []
    for report in rows_of(data / "tatqa/tatqa_dataset_dev.json"):
        lines = [" ".join(cell for cell in row if cell) for row in report["table"]["table"]]
        lines += [s for p in report["paragraphs"] for s in re.split(r"(?<=\.)\s", p["text"])]
        pairs = []
        for row in report["questions"]:
            words = set(row["question"].lower().split())
            line = max(lines, key=lambda text: len(words & set(text.lower().split())))
            answer = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            text = _line(f"It is {', '.join(map(str, answer))} {row['scale']}") + "."
            pairs.append((_line(f"{row['question']} {line}"), text))
        found.append(pairs)
    return found


def identity(data: Path) -> list[Pair]:
    """The English questions on who the assistant is, and its new name in the answers."""
    rows = rows_of(data / "llamafactory_identity/identity.json")
    return [
        (row["instruction"], row["output"].replace("{{name}}", NAME).replace("{{author}}", AUTHOR))
        for row in rows
        if row["instruction"].isascii()
    ]


def _line(text: str) -> str:
    return " ".join(text.split())
