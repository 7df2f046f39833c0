"""Files, folders, globs and hub ids; chunks that hold every record once, whatever their size."""
import json
import pickle
import random

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtf.data import read_samples
from xtf.data.chat import Encoder
from xtf.data.formats import parse
from xtf.data.read import model_path, records, resolve, split_file


def rows(path, chunk_bytes=1 << 20):
    return [row for chunk in split_file(path, chunk_bytes) for _, row in records(chunk)]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jsonl", "a/c.json", "a/deep/d.parquet", "a/e.ndjson", "a/readme.md", ".hidden/f.jsonl",
                 "dataset_info.json", "a/g.jsonl.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def names(found, root):
    return [str(f.relative_to(root)) for f in found]


def test_a_file_a_folder_and_a_glob(tree):
    assert names(resolve(str(tree)), tree) == ["a/c.json", "a/deep/d.parquet", "a/e.ndjson", "b.jsonl"]
    assert names(resolve(str(tree / "b.jsonl")), tree) == ["b.jsonl"]
    assert names(resolve(f"{tree}/*.jsonl"), tree) == ["b.jsonl"]
    assert names(resolve(f"{tree}/**/*.ndjson"), tree) == ["a/e.ndjson"]
    assert names(resolve(f"{tree}/a*"), tree) == ["a/c.json", "a/deep/d.parquet", "a/e.ndjson"]


def test_what_cannot_be_resolved_is_named(tree, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tree / "empty").mkdir()
    (tree / "packed").mkdir()
    (tree / "packed" / "x.jsonl.zst").touch()
    for data, error, reason in [("empty", ValueError, "no .jsonl"), ("packed", ValueError, "unpack .*x.jsonl.zst"),
                                ("a/g.jsonl.gz", ValueError, "unpack it"),
                                ("a/*.gz", ValueError, "is packed"),
                                ("nothing.jsonl", FileNotFoundError, "no such file"),
                                ("*.nothing", FileNotFoundError, "no file matches")]:
        with pytest.raises(error, match=f"--data .*{reason}"):
            resolve(str(tree / data))
    with pytest.raises(OSError, match=r"--data nobody/nothing: no such path here.*neither to be had nor in the cache"):
        resolve("nobody/nothing")


def test_hub_ids_from_a_prepared_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for kind, file in (("models", "config.json"), ("datasets", "data/train.jsonl")):
        repository = tmp_path / f"{kind}--org--name"
        snapshot = repository / "snapshots" / ("0" * 40)
        (snapshot / file).parent.mkdir(parents=True)
        (snapshot / file).write_text('{"text": "from the cache"}\n')
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    (found,) = resolve("org/name")
    assert rows(found) == [b'{"text": "from the cache"}'] and (model_path("org/name") / "config.json").is_file()
    with pytest.raises(OSError, match="--model org/other"):
        model_path("org/other")


def test_modelscope_is_an_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    with pytest.raises(ValueError, match=r"--data modelscope://org/name: .*pip install"):
        resolve("modelscope://org/name")
    with pytest.raises(ValueError, match=r"--model modelscope://org/name: .*pip install"):
        model_path("modelscope://org/name")


def test_modelscope_gives_a_folder(monkeypatch, tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    module = type("module", (), {"snapshot_download": lambda name, **_: str(tmp_path),
                                 "dataset_snapshot_download": lambda name, **_: str(tmp_path)})
    monkeypatch.setitem(__import__("sys").modules, "modelscope", module)
    assert resolve("modelscope://org/name") == [tmp_path
                                                / "x.jsonl"] and model_path("modelscope://org/name") == tmp_path


def test_a_model_is_a_directory(tmp_path):
    (tmp_path / "f").touch()
    assert model_path(str(tmp_path)) == tmp_path
    with pytest.raises(OSError, match=r"--model .*: is a file"):
        model_path(str(tmp_path / "f"))
    with pytest.raises(OSError, match=r"--model \./missing: no such directory"):
        model_path("./missing")


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_every_line_is_in_one_chunk(tmp_path, end):
    draw = random.Random(0)
    lines = [b"x" * draw.choice([0, 1, 5, 40, 500]) for _ in range(200)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + end.encode())
    wanted = path.read_bytes().split(b"\n")
    wanted = wanted[:-1] if wanted[-1] == b"" else wanted    # a final line feed ends the last line
    for chunk_bytes in (1, 7, 100, 1000, 1 << 20):
        chunks = split_file(path, chunk_bytes)
        assert [row for c in chunks for _, row in records(c)] == wanted
        assert [(c.start, c.stop)
                for c in chunks] == list(zip([0, *(c.stop for c in chunks)], [c.stop for c in chunks], strict=False))
        assert all([i for i, _ in records(c)] == list(range(len(list(records(c))))) for c in chunks[:5])
        longest = max(map(len, lines)) + 1
        assert all(c.stop - c.start <= chunk_bytes + longest
                   for c in chunks) and pickle.loads(pickle.dumps(chunks)) == chunks


def test_lines_longer_than_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("xtf.data.read.BLOCK", 16)
    lines = [b"a" * n for n in (100, 3, 16, 15, 17, 0, 31, 32)]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for chunk_bytes in (1, 10, 16, 33, 1000):
        assert rows(path, chunk_bytes) == lines


def test_an_empty_file_has_no_chunks_and_one_that_shrinks_is_noticed(tmp_path):
    path = tmp_path / "x.jsonl"
    path.touch()
    assert split_file(path) == []
    path.write_bytes(b"{}\n" * 10)
    (chunk,) = split_file(path)
    path.write_bytes(b"{}\n" * 5)
    with pytest.raises(OSError, match="shorter"):
        list(records(chunk))


def test_a_json_array(tmp_path):
    values = [{"text": "a"}, 3, {"text": "ä\ud800"}]
    path = tmp_path / "x.json"
    path.write_text("\ufeff " + json.dumps(values, indent=2))
    assert [json.loads(r) for r in rows(path)] == values
    path.write_text('[{"text": "a"}, ')
    with pytest.raises(ValueError, match=r"x.json: begins with \["):
        rows(path)
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(rows(path)) == 2


def test_parquet(tmp_path):
    messages = [[{"role": "user", "content": f"q{i}", "tool_calls": None},
                 {"role": "assistant", "content": "a", "tool_calls": None if i % 2 else [
        {"function": {"name": "f", "arguments": '{"x": null}'}}]}] for i in range(700)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"messages": messages, "source": [None if i % 3 else "web" for i in range(700)]}), path,
                   row_group_size=100)
    for chunk_bytes in (1, 20_000, 1 << 30):
        found = rows(path, chunk_bytes)
        assert len(found) == 700 and ("source" in found[0]) and ("source" not in found[1])
        assert found[1]["messages"] == [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a"}]
        assert found[2]["messages"][1]["tool_calls"] == [{"function": {"name": "f", "arguments": '{"x": null}'}}]
    assert len(split_file(path, 1)) == 7 and len(split_file(path, 1 << 30)) == 1


def test_parquet_of_tokens_comes_as_arrays(tmp_path):
    path, ids = tmp_path / "x.parquet", [list(range(1, 1 + n)) for n in (3, 1, 5)]
    pq.write_table(pa.table({"input_ids": pa.array([*ids, None], pa.list_(pa.int32())),
                             "labels": [[-100, *x[1:]] for x in ids] + [[5]]}), path)
    found = rows(path)
    assert all(isinstance(r["input_ids"], np.ndarray) for r in found[:3]) and "input_ids" not in found[3]
    encoded = [Encoder(None)(r)[0] for r in found[:3]]
    assert [e.ids.tolist() for e in encoded] == ids
    assert [e.mask.tolist() for e in encoded] == [[False, True, True], [False], [False] + [True] * 4]


def test_parquet_and_jsonl_give_the_same_samples(tmp_path, write):
    lines = [{"input_ids": list(range(i + 2)), "labels": [-100] * (i + 1) + [i + 1]} for i in range(20)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(lines), path)
    a, b = (read_samples(f, None, 64)[0] for f in (path, write(*lines)))
    assert [(s.ids.tolist(), s.mask.tolist()) for s in a] == [(s.ids.tolist(), s.mask.tolist()) for s in b]


def test_broken_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a" * 1000 + str(i) for i in range(1000)]}), path, compression="none")
    (chunk,) = split_file(path, 1 << 30)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"x.parquet: not a whole Parquet file"):
        split_file(path)
    path.write_bytes(whole[:4] + b"\xff" * 5000 + whole[5004:])
    with pytest.raises(ValueError, match=r"x.parquet: row groups 0 to 0 cannot be read"):
        list(records(chunk))


def test_lines_are_found_again_across_chunks(tmp_path, write):
    path = write(*[{"text": str(i)} for i in range(50)])
    chunks, before = split_file(path, 100), 0
    for chunk in chunks:
        for index, row in records(chunk):
            assert parse(row) == {"text": str(before + index)}
        before += index + 1
    assert len(chunks) > 5
