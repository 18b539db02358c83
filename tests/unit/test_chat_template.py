"""Chat templates: which one a choice means, and what is said of one that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.base.chat import chosen_template, user_turn
from model.errors import DataError, UsageError

METADATA: dict[str, Any] = {
    "tokenizer.ggml.tokens": ["<s>", "</s>"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "own {{ messages[0].content }}",
}


def rendered(choice: str, metadata: dict[str, Any] = METADATA) -> str:
    template = chosen_template(metadata, choice)
    assert template is not None
    return template.render([user_turn("hi")], prompt=True)


def test_a_file_is_taken_instead_of_the_models_own(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].role }}: {{ messages[0].content }}")
    assert rendered(str(file)) == "<s>user: hi"
    assert rendered("auto") == "own hi" and rendered("vicuna") == "USER: hi ASSISTANT:"
    assert chosen_template(METADATA, "none") is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "{% for m in messages %}\n\n{{ 1 / 0 }}\n{% endfor %}",
            "conversation in line 3: division",
        ),
        ("a\n{{ raise_exception('no system') }}", "conversation in line 2: no system"),
        ("a\n\n{% if %}", "is damaged in line 3: "),
    ],
)
def test_a_template_that_fails_names_the_line(source: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(source)
    with pytest.raises(DataError) as error:
        rendered(str(file))
    assert str(error.value).startswith(f"chat template {file} ") and said in str(error.value)
    own = {**METADATA, "tokenizer.chat_template": source}
    with pytest.raises(DataError, match=r"^the model's chat template ") as error:
        rendered("auto", own)
    assert said in str(error.value)


def test_a_choice_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chatml: is none of auto, vicuna, none, and no file"):
        chosen_template(METADATA, "chatml")
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="is an empty file"):
        chosen_template(METADATA, str(tmp_path / "empty"))
