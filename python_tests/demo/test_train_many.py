"""The example of many adapters, in small: it trains, saves, reloads and compares."""

from __future__ import annotations

import json

import pytest

from examples.tastes import TASTES, make_users
from examples.train_many import main


def smoke(output) -> None:
    code = main(["--smoke", "--output", str(output)])
    if code == 3:
        pytest.skip("the example's packages cannot be downloaded here")
    assert code == 0


def test_it_runs_and_is_not_run_twice(tmp_path, capsys):
    smoke(tmp_path / "run")
    first = capsys.readouterr().out
    assert all(f"user{i:02}" in first for i in range(7)) and "alone" in first
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    files = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "store").iterdir() if "lock" not in path.name
    }
    smoke(tmp_path / "run")
    assert capsys.readouterr().out.split("trained in")[0] == first.split("trained in")[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert not list((tmp_path / "run").glob("checkpoint-*"))


class Words:
    """A tokenizer that gives every text a number of its own."""

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[hash(text)] for text in texts]}


@pytest.fixture
def sentences(tmp_path):
    files = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets", "movieReviewSnippets")
    for file in files:
        lines = [f"{i}\t2\t{file} Sentence number {i} of many" for i in range(30)]
        lines += [f"30\t2\t{file} is short", f"31\t2\t{file} sentence number 1 of many"]
        (tmp_path / f"{file}_GroundTruth.txt").write_text("\n".join(lines))
    return tmp_path


def test_users_have_tastes_and_sentences_of_their_own(sentences):
    users = make_users(10, (8, 4), sentences, Words())  # type: ignore[arg-type]
    assert [user.likes for user in users] == [*TASTES, *TASTES[:4]] and len(set(TASTES)) == 6
    seen = [row["input_ids"][0] for user in users for row in (*user.train, *user.test)]
    assert len(seen) == len(set(seen)) == 10 * 12
    # Half of what each user reads is liked, in both parts.
    assert all(2 * sum(row["labels"] for row in part) == len(part) for u in users for part in (u.train, u.test))
    assert {row["adapter"] for row in users[3].train + users[3].test} == {"user03"}
    assert make_users(10, (8, 4), sentences, Words()) == users  # type: ignore[arg-type]
    for count, sizes, message in ((0, (4, 4), "got 0"), (1, (4, 3), "multiples of 4"), (11, (8, 4), "at most 10")):
        with pytest.raises(ValueError, match=message):
            make_users(count, sizes, sentences, Words())  # type: ignore[arg-type]
