"""Training data: the same everywhere, no text twice, nothing held out in training, batches that can seek."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from undertow.dist.errors import UserError
from undertow.examples.corpus import SEPARATOR, load


def write_files(root: Path, count: int, *, offset: int = 0) -> dict[str, bytes]:
    """`count` distinct texts of about 1 KB."""
    root.mkdir(parents=True, exist_ok=True)
    texts = {}
    for index in range(count):
        text = "".join(f"line {line} of text {index + offset}\n" for line in range(40)).encode()
        (root / f"{index:04d}.txt").write_bytes(text)
        texts[f"{index:04d}.txt"] = text
    return texts


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "texts", write_files(tmp_path / "texts", 200)


def parts(array: np.ndarray) -> list[bytes]:
    return array.tobytes().split(bytes([SEPARATOR]))


def test_every_text_is_there_once_in_one_part(folder):
    root, texts = folder
    shutil.copytree(root, root / "copies")  # the same content again, elsewhere
    (root / "empty.txt").write_bytes(b"")
    corpus = load(root)
    train, held_out = parts(corpus.train), parts(corpus.held_out)
    assert sorted(train + held_out) == sorted(texts.values())
    assert corpus.files == 200
    assert not set(train) & set(held_out)
    assert {text for text in held_out} == {t for t in texts.values() if hashlib.sha256(t).digest()[0] % 20 == 0}
    assert 0 < len(held_out) < 30


def test_names_places_and_dates_do_not_matter(folder, tmp_path):
    root, _ = folder
    one = load(root)
    other = tmp_path / "elsewhere"
    for index, path in enumerate(sorted(root.iterdir(), reverse=True)):
        (other / f"d{index % 3}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / f"d{index % 3}" / f"renamed-{index}")
        os.utime(other / f"d{index % 3}" / f"renamed-{index}", (0, 0))
    two = load(other)
    assert one.manifest == two.manifest
    assert np.array_equal(one.train, two.train)
    assert np.array_equal(one.held_out, two.held_out)


def test_the_manifest_pins_the_content(folder):
    root, _ = folder
    before = load(root).manifest
    (root / "0003.txt").write_bytes((root / "0003.txt").read_bytes() + b"!")
    assert load(root).manifest != before


def test_hidden_and_installed_files_are_left_out(folder):
    root, _ = folder
    before = load(root).manifest
    for name in (".git/x.txt", "site-packages/y.txt", "__pycache__/z.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not wanted " * 100)
    assert load(root).manifest == before


@pytest.mark.parametrize("files", range(2, 12, 3))
def test_few_files_of_which_none_is_held_out_by_its_hash(tmp_path, files):
    """A dozen files leave none held out every other time; then each gives its end, and nothing is in both parts."""
    number = 0
    for index in range(files):
        while True:
            number += 1
            text = f"{number:09d}".encode() * 10_000
            if hashlib.sha256(text).digest()[0] % 20:
                break
        (tmp_path / f"{index}.txt").write_bytes(text)
    corpus = load(tmp_path)
    ends = [part.tobytes() for part in (corpus.train, corpus.held_out)]
    assert len(ends[0]) == files * 85_500 + files - 1 and len(ends[1]) == files * 4_500 + files - 1


def test_one_file_holds_out_its_end(tmp_path):
    text = bytes(range(1, 256)) * 1000
    (tmp_path / "one.txt").write_bytes(text)
    corpus = load(tmp_path / "one.txt")
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == text
    assert len(corpus.held_out) == len(text) - len(text) * 19 // 20


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_batch_is_a_function_of_seed_and_step_and_ranks_share_it(folder, ranks):
    corpus = load(folder[0])
    seen = set()
    for step in (0, 1, 500):
        whole = corpus.batch(seed=3, step=step, rows=slice(0, 8), batch=8, length=16)
        assert whole.shape == (8, 17)
        assert whole.dtype == torch.int64
        again = load(folder[0])
        per_rank = 8 // ranks
        shares = [
            again.batch(seed=3, step=step, rows=slice(r * per_rank, (r + 1) * per_rank), batch=8, length=16)
            for r in range(ranks)
        ]
        assert torch.equal(torch.cat(shares), whole)
        seen.add(whole.numpy().tobytes())
    seen.add(corpus.batch(seed=4, step=0, rows=slice(0, 8), batch=8, length=16).numpy().tobytes())
    assert len(seen) == 4


def test_rows_are_windows_of_the_training_text_alone(folder):
    corpus = load(folder[0])
    text = corpus.train.tobytes()
    for row in corpus.batch(seed=0, step=0, rows=slice(0, 50), batch=50, length=200):
        assert row.numpy().astype(np.uint8).tobytes() in text


def test_evaluation_covers_the_start_of_the_held_out_text_in_order(folder):
    corpus = load(folder[0])
    batches = corpus.evaluation(batch=3, length=100, limit_bytes=1000)
    rows = torch.cat(batches)
    assert len(rows) == 10
    assert torch.equal(rows[:, :-1].reshape(-1), torch.from_numpy(corpus.held_out[:1000].astype(np.int64)))
    assert torch.equal(rows[:-1, -1], rows[1:, 0])  # the target of a row's last byte is the next row's first


def test_the_standard_library_is_enough_and_clean():
    corpus = load()
    assert len(corpus.train) > 5_000_000
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.2
    assert "site-packages" not in corpus.source


@pytest.mark.parametrize("kind", ["missing", "unreadable file", "too little", "empty folder"])
def test_data_that_will_not_do_is_one_clear_error(tmp_path, kind, monkeypatch):
    path = tmp_path / "data"
    if kind == "unreadable file":
        path.write_text("x")

        def refuse(self: Path) -> bytes:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "read_bytes", refuse)
    elif kind == "too little":
        path.write_text("x" * 1000)
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(UserError, match=str(path)) as caught:
        load(path)
    assert "expected" in str(caught.value)
