"""Problems: ids, columns, lengths, the proof that held-out problems are held out, and refusals by row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rl.config import DataSection, DataSource, GeneratedTokenizer, SFTSection, TemplateSection, load_recipe
from rl.data import load_problems, load_sft_rows, load_tokenizer, load_train_and_eval
from rl.data.problems import normalise
from rl.data.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(GeneratedTokenizer(type="characters", alphabet="0123456789+=? abc"))


def data_section(tmp_path: Path, train: list[Any], held_out: list[Any] | None = None, **settings: Any) -> DataSection:
    def source(name: str, rows: list[Any]) -> DataSource:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataSource(source=str(path))

    settings.setdefault("template", TemplateSection(kind="raw"))
    return DataSection(
        train=source("train", train), eval=None if held_out is None else source("eval", held_out), **settings
    )


def test_a_row_becomes_a_problem(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "1+1=", "answer": 2, "level": "a"}, {"prompt": "2+2=", "answer": "4", "id": "mine"}]
    problems = load_problems(data_section(tmp_path, rows), tokenizer, "train")
    first, second = problems
    assert (first.id, second.id) == ("train/0", "mine")
    assert first.prompt == "1+1=" and tokenizer.decode(list(first.prompt_ids)) == "1+1="
    # every problem has every column, so that reward functions get whole lists
    assert first.columns == {"prompt": "1+1=", "answer": "2", "level": "a", "id": None}
    assert second.columns == {"prompt": "2+2=", "answer": "4", "level": None, "id": "mine"}
    assert problems[1] is second and len(problems) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"answer": "2"},
            "line 2: column 'prompt' is missing; this row has: 'answer' (columns: {prompt: OTHER} in the recipe takes",
        ),
        ({"prompt": None, "answer": "2"}, "line 2: column 'prompt' is missing"),
        ({"prompt": 5, "answer": "2"}, "line 2: column 'prompt' has the wrong type int; expected text"),
        ({"prompt": "  \n", "answer": "2"}, "line 2: column 'prompt' is empty"),
        ({"prompt": "1", "answer": ""}, "line 2: column 'answer' is empty"),
        ({"prompt": "1\ud83d", "answer": "2"}, "line 2: column 'prompt' is no text: half a character"),
        ({"prompt": "1", "answer": 0.5}, "line 2: column 'answer' has the wrong type float"),
        ({"prompt": "1", "answer": True}, "line 2: column 'answer' has the wrong type bool"),
        ({"prompt": "1"}, "line 2: column 'answer' is missing or null (data.missing_answers: allow"),
        ({"prompt": "1zx", "answer": "2"}, "line 2: column 'prompt': the tokenizer does not know 'xz'"),
        ({"prompt": "1", "answer": "2", "id": 0.5}, "line 2: column 'id': expected text or a whole number"),
        ({"prompt": "1", "answer": "2", "id": "train/0"}, "line 2: column 'id': 'train/0' occurs already in"),
        (
            {"prompt": [{"role": "user", "content": "1"}], "answer": "2"},
            "line 2: column 'prompt' has the wrong type list",
        ),
    ],
)
def test_bad_rows_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        load_problems(data_section(tmp_path, [{"prompt": "0+1=", "answer": "1"}, row]), tokenizer, "train")
    assert message in str(caught.value) and "train.jsonl" in str(caught.value)


def test_rows_without_an_answer_pass_where_the_recipe_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "1", "answer": "2"}, {"prompt": "2"}, {"prompt": "3", "answer": None}]
    problems = load_problems(data_section(tmp_path, rows, missing_answers="allow"), tokenizer, "train")
    assert [problem.columns["answer"] for problem in problems] == ["2", None, None]
    with pytest.raises(ValueError, match="line 2: column 'answer' is empty"):
        load_problems(
            data_section(tmp_path, [rows[0], {"prompt": "2", "answer": ""}], missing_answers="allow"),
            tokenizer,
            "train",
        )


def test_messages_are_prompts_under_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    template = TemplateSection(kind="chat")
    rows: list[Any] = [{"prompt": [{"role": "user", "content": "1+1"}]}, {"prompt": "2"}]
    problems = load_problems(data_section(tmp_path, rows, template=template), tokenizer, "train")
    assert [problem.prompt for problem in problems] == ["1+1=", "2="]
    rows.append({"prompt": [{"role": "user"}]})
    with pytest.raises(ValueError, match="line 3: column 'prompt': expected messages with role and content"):
        load_problems(data_section(tmp_path, rows, template=template), tokenizer, "train")


def test_overlong_prompts_are_dropped_and_counted_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "1+1+1="}, {"prompt": "1+1="}, {"prompt": "1+1+1+1="}]
    problems = load_problems(data_section(tmp_path, rows, max_prompt_length=4), tokenizer, "train")
    assert [problem.id for problem in problems] == ["train/1"]
    assert problems.overlong == 2 and "dropped 2 of 3 prompts over 4 tokens" in caplog.text
    refusing = data_section(tmp_path, rows, max_prompt_length=4, overlong_prompts="refuse")
    with pytest.raises(ValueError, match=r"line 1: the prompt has 6 tokens, data\.max_prompt_length allows 4"):
        load_problems(refusing, tokenizer, "train")
    with pytest.raises(ValueError, match=r"data\.train: all 3 prompts are longer"):
        load_problems(data_section(tmp_path, rows, max_prompt_length=3), tokenizer, "train")


def test_held_out_prompts_must_not_be_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    train = [{"prompt": "1+1=?"}, {"prompt": "a b"}]
    apart = data_section(tmp_path, train, [{"prompt": "1+2=?"}, {"prompt": "ab"}])
    assert [len(part or ()) for part in load_train_and_eval(apart, tokenizer)] == [2, 2]
    same = [{"prompt": "1+3"}, {"prompt": " a   b "}]
    with pytest.raises(ValueError, match=r"1 of 2 held-out problems .* are also trained on .* eval/1: ' a   b '"):
        load_train_and_eval(data_section(tmp_path, train, same), tokenizer)
    long = [{"prompt": "1" * 300 + "+2=?"}]  # the end is shown: a template's words stand before the question
    with pytest.raises(ValueError, match=r"eval/0: '1{196}\+2=\?'"):
        load_train_and_eval(data_section(tmp_path, long, long, max_prompt_length=400), tokenizer)
    load_train_and_eval(data_section(tmp_path, train, same, eval_overlap="warn"), tokenizer)
    assert "1 of 2 held-out problems" in caplog.text


def test_prompts_are_compared_without_case_space_and_unicode_form() -> None:
    assert normalise(" What  IS\n\u00bd of \uff14? ") == normalise("what is 1\u20442 of 4?") == "what is 1\u20442 of 4?"
    assert normalise("1+1") != normalise("1+ 1")


def test_without_held_out_rows_there_is_no_eval_set(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_section(tmp_path, [{"prompt": "1"}])
    assert load_train_and_eval(data, tokenizer)[1] is None
    with pytest.raises(ValueError, match=r"data\.eval: is missing"):
        load_problems(data, tokenizer, "eval")


def sft_section(tmp_path: Path, rows: list[Any], **settings: Any) -> SFTSection:
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTSection(data=DataSource(source=str(path)), steps=1, **settings)


def test_cold_start_rows_learn_the_completion_and_the_end(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "1+1=", "completion": "<answer>2</answer>"}, {"prompt": "1=", "completion": "1<eos>"}]
    made = load_sft_rows(sft_section(tmp_path, rows), TemplateSection(kind="raw"), tokenizer)
    digit, plus, equals = 7, 17, 18  # after <pad> <eos> <unk> and four tags
    assert made[0].token_ids == (digit + 1, plus, digit + 1, equals, 5, digit + 2, 6, 1)
    assert made[0].loss_mask == (0, 0, 0, 0, 1, 1, 1, 1)
    assert made[1].token_ids == (digit + 1, equals, digit + 1, 1) and made[1].loss_mask == (0, 0, 1, 1)
    assert made[0].prompt == "1+1=" and len(made) == 2


def test_cold_start_rows_that_do_not_fit(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    template = TemplateSection(kind="raw")
    rows = [{"prompt": "1", "completion": "2"}, {"prompt": "1+1+1+1", "completion": "2"}]
    assert load_sft_rows(sft_section(tmp_path, rows, max_length=5), template, tokenizer).overlong == 1
    with pytest.raises(ValueError, match=r"sft\.jsonl, line 2: prompt and completion have 9 tokens, sft.max_length"):
        load_sft_rows(sft_section(tmp_path, rows, max_length=5, overlong_rows="refuse"), template, tokenizer)
    for row, message in (
        ({"prompt": "1"}, "line 1: column 'completion' is missing"),
        ({"prompt": "1", "completion": ""}, "line 1: column 'completion' is empty"),
        ({"prompt": "1", "completion": "é"}, "line 1: column 'completion': the tokenizer does not know 'é'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sft_rows(sft_section(tmp_path, [row]), template, tokenizer)


def test_gsm8k_through_the_tiny_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe("recipes/gsm8k/tiny_cpu.yaml")
    train, held_out = load_train_and_eval(recipe.data, load_tokenizer(recipe.model), seed=recipe.seed)
    assert held_out is not None
    assert (len(train), train.overlong, len(held_out), held_out.overlong) == (64, 0, 32, 0)
    assert train[0].id == "gsm8k-train-0000" and train[0].columns["answer"] == "72"
    assert train[0].prompt.count("Natalia") == 2 and train[0].prompt.endswith("\nAssistant:")
