import json
from pathlib import Path

import pytest

from safeft.detox.groups import Group, WordJudge, check_groups, mentions_of, read_groups, read_words
from safeft.errors import ConfigError, PromptError
from safeft.prompts import as_prompts


def test_words_are_whole_and_in_any_case() -> None:
    judge = WordJudge(("blorg*", "green sky"))
    said = ["Blorgs!", "ablorg", "a Green Sky at night", "greenish sky", ""]
    assert judge(said, said) == [True, False, True, False, False]
    assert judge([], []) == []
    assert WordJudge(("a.b",))(["x"], ["acb"]) == [False]
    with pytest.raises(ConfigError, match="at least one word"):
        WordJudge(())


def test_mentions() -> None:
    assert mentions_of(["Two zogs live here", "Nobody does"], ("zog", "zogs")).value == 0.5


def test_groups_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text(
        json.dumps({"zogs": {"words": ["zog"], "prompts": ["Tell me of zogs"], "texts": ["A zog"]}})
    )
    found = read_groups(path)["zogs"]
    assert found.words == ("zog",)
    assert found.prompts[0].text == "Tell me of zogs"
    for text, words in (("[1]", "cannot be read"), ("{", "cannot be read"),
                        ('{"zogs": {}}', "neither prompts nor texts")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(PromptError, match=words):
            read_groups(path)
    with pytest.raises(ConfigError, match="no words"):
        check_groups({"zogs": Group(prompts=tuple(as_prompts(["Tell me"])))})


def test_words_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("blorg\n\nzig zag\n")
    assert read_words(path).words == ("blorg", "zig zag")
    path.write_text("\n")
    with pytest.raises(ConfigError, match="at least one"):
        read_words(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_words(tmp_path / "none.txt")
