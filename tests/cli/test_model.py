"""The commands that need a model, with a tiny one and a real server."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from chunkcache.cli import app as cli
from tests.models import tiny, tokens
from tests.words import word_tokenizer, words

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(redis_server, model):
    def run(*arguments: str, code: int = 0, text: str | None = None):
        command = [*arguments, "--model", model, "--store", redis_server.unix_url]
        result = runner.invoke(cli.app, command, input=text)
        assert result.exit_code == code, result.output
        return result

    return run


def text(count: int, seed: int = 0) -> str:
    return words(tokens(count, seed=seed)[0].tolist())


def test_warm_and_explain(run, tmp_path):
    (tmp_path / "a.txt").write_text(text(150, 1))
    lines = [json.dumps({"text": text(140, seed)}) for seed in (2, 3)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    said = json.loads(run("warm", *files, "--tags", "project=x", "--json").stdout)
    assert (said["documents"], said["added"]) == (3, 3)
    assert run("warm", *files).stdout.startswith("0 of 3 documents added, 3 skipped as known")
    assert run("warm", *files, "--filler", text(90, 8)).stdout.startswith("3 of 3 documents added")

    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"{text(150, 1)} {text(30, 9)}")
    told = json.loads(run("explain", str(prompt), "--json").stdout)
    assert (told["reused"], told["prompt_tokens"]) == (151, 181)
    assert "151 of 181 prompt tokens would be reused" in run("explain", str(prompt)).stdout
    moved = f"{text(40, 9)} {text(140, 2)}"
    assert "0 of 181" in run("explain", "-", text=moved, code=1).stdout
    assert "moved" in run("explain", "-", "--reuse", "anywhere", text=moved).stdout
    assert "0 of" in run("explain", str(prompt), "--namespace", "b", code=1).stdout


def test_documents_that_cannot_be_added_end_with_1(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(f'"{text(130)}"\n""\n"{text(600)}"\n')
    result = run("warm", str(tmp_path / "a.jsonl"), code=1)
    assert result.stdout.startswith("1 of 3 documents added")
    assert "document 1: it is empty" in result.stderr
    assert "split it" in result.stderr


def test_explain_puts_the_prompt_into_the_chat_template(run, model, tmp_path):
    said = run("explain", "-", "--chat", text="w4", code=2).stderr
    assert "no chat template; leave it out" in said
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w9 w9 {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    command = ["explain", "-", "--model", str(tmp_path), "--chat", "--json"]
    result = runner.invoke(cli.app, [*command, "--store", "memory://"], input="w4 w5")
    assert json.loads(result.stdout)["prompt_tokens"] >= 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "nowhere.txt"], "nowhere.txt"),
        (["explain", "-"], "is empty"),
        (["explain", "-", "--reuse", "sometimes"], "prefix"),
        (["warm"], "needs files or --dataset"),
        (["warm", "nowhere.txt"], "nowhere.txt"),
        (["warm", "nowhere.txt", "--dataset", "x"], "one of them"),
    ],
)
def test_mistakes_end_with_2_and_one_line(run, arguments, said):
    stderr = run(*arguments, code=2, text="w4" if "--reuse" in arguments else "").stderr
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("arguments", [["explain", "-"], ["warm", "a.txt"]])
def test_a_server_that_is_not_there(model, tmp_path, arguments, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(text(150))
    command = [*arguments, "--model", model, "--store", "redis://localhost:1/0"]
    result = runner.invoke(cli.app, command, input="w4 w5")
    assert result.exit_code == 2
    assert "check that the server runs" in result.output


@pytest.mark.parametrize("template", ["{{ raise_exception('system first') }}", "{% if %}"])
def test_a_chat_template_that_refuses(template, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    command = ["explain", "-", "--chat", "--model", str(tmp_path), "--store", "memory://"]
    result = runner.invoke(cli.app, command, input="w4 w5")
    assert result.exit_code == 2
    assert "chat template refuses" in result.stderr
    assert "a bug" not in result.stderr


def test_a_text_that_utf_8_cannot_express(run, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\ud800 w4 w5"}))
    said = run("warm", str(tmp_path / "a.jsonl"), code=2).stderr
    assert "document 0 is no text that UTF-8 can express" in said


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["explain", "-", "--store", "nope://x"], {}, "nope"),
        (["explain", "-", "--store", "memory://", "--reuse", "banana"], {}, "banana"),
        (["explain", "-"], {"CHUNKCACHE_CHUNK_SIZE": "banana"}, "CHUNKCACHE_CHUNK_SIZE"),
        (["warm", "a.txt", "--store", "nope://x"], {}, "nope"),
        (["doctor", "--store", "nope://x"], {}, "nope"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    arguments, env, said, model, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("w4 w5")
    monkeypatch.setattr("chunkcache.model.loading.load_model", None)
    result = runner.invoke(cli.app, [*arguments, "--model", model], input="w4", env=env)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "a bug" not in result.stderr
