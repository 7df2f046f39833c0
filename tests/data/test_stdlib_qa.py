"""The demo's data: real docstrings, cleaned, each once, held out by module."""
import json
import textwrap

from xtf.data import stdlib_qa


def test_records_of_a_small_library(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(textwrap.dedent('''
        def public(x):
            """Return x
            as it came in.

            Not this."""
        def _private(): "Never to be shown to anyone."
        class Thing:
            "A thing that holds other things."
            async def method(self): "Wait for the thing to happen."
            def twin(self): "A thing that holds other things."
            def short(self): "Too short."
            def unfinished(self): "Does one of the following:"
    '''))
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "_hidden.py").write_text('def f(): "Nobody sees this documentation."')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text('def f(): "Nobody sees this documentation."')
    train, held = stdlib_qa.records(tmp_path)
    rows = train or held
    assert stdlib_qa.records(tmp_path) == (train, held)
    assert not (train and held)  # one module, one side
    expected = {"`pkg.public`": "Return x as it came in.", "`pkg.Thing`": "A thing that holds other things.",
                "`pkg.Thing.method`": "Wait for the thing to happen."}
    for row, (name, answer) in zip(rows, expected.items(), strict=True):
        assert name in row["messages"][0]["content"] and row["messages"][1] == {"role": "assistant", "content": answer}


def test_the_installed_library(tmp_path, docstrings, capsys, monkeypatch):
    monkeypatch.setattr(stdlib_qa, "records", lambda: docstrings)  # parsing takes seconds: once is enough
    stdlib_qa.main(str(tmp_path))
    printed = capsys.readouterr().out
    for part, file in zip(docstrings, ("train.jsonl", "heldout.jsonl"), strict=True):
        lines = (tmp_path / file).read_text("utf-8").split("\n")[:-1]
        assert [json.loads(line) for line in lines] == part and f"{len(part):,} conversations" in printed
    train, held = ([r["messages"] for r in part] for part in docstrings)
    assert len(train) > 2000 and len(held) > 150
    answers = [m[1]["content"] for m in train + held]
    assert len(set(answers)) == len(answers) and all(20 <= len(a) <= 400 for a in answers)
    module = lambda m: m[0]["content"].split("`")[1].split(".")[0]
    assert not {module(m) for m in train} & {module(m) for m in held}
    assert any("`textwrap.dedent`" in m[0]["content"] for m in train + held)
