"""Folders of classes, and tables that point to files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftkit.data.folders import FileTable, given_files, locate_files, read_files, stream_files
from graftkit.errors import UserError


def read(source, name: str = "train", **more) -> FileTable:
    return read_files(source, suffixes=(".jpg", ".png"), column="image", noun="image", name=name, **more)


def write(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.fixture
def pets(tmp_path) -> Path:
    folder = tmp_path / "pets"
    write(
        folder / "dogs/rex.jpg", folder / "cats/tom.JPG", folder / "cats/deep/er/kit.png",
        folder / "cats/.DS_Store", folder / "cats/Thumbs.db", folder / ".git/config",
        folder / "dogs/.ipynb_checkpoints/rex.jpg",
    )  # fmt: skip
    return folder


def test_class_folders_at_any_depth_sorted_and_without_litter(pets):
    table = read(pets)
    shown = [str(Path(path).relative_to(pets)) for path in table.columns["image"]]
    assert shown == ["cats/deep/er/kit.png", "cats/tom.JPG", "dogs/rex.jpg"]
    assert table.columns["label"] == ["cats", "cats", "dogs"]
    assert table.where(2) == str(pets / "dogs/rex.jpg")
    assert table.take([2, 0]).where(0) == str(pets / "dogs/rex.jpg")
    assert not table.skipped


def test_other_suffixes_are_all_told_or_left_out(pets):
    write(*(pets / "cats" / f"note{i:02}.txt" for i in range(12)), pets / "dogs/none")
    with pytest.raises(UserError) as error:
        read(pets)
    told = str(error.value)
    assert "13 problems" in told and "note09.txt has the ending '.txt'" in told and "and 3 more" in told
    assert "note10" not in told
    table = read(pets, skip_bad=True)
    assert len(table) == 3 and len(table.skipped) == 13
    assert "has no ending" in table.skipped[-1]


def test_a_file_beside_the_classes_has_no_class(pets):
    write(pets / "stray.jpg")
    with pytest.raises(UserError, match=r"stray\.jpg lies beside the folders of the classes"):
        read(pets)
    assert len(read(pets, skip_bad=True)) == 3
    assert read(pets, "data").columns["label"] == ["cats", "cats", "dogs", None]


def test_an_empty_class(pets):
    (pets / "hens").mkdir()
    with pytest.raises(UserError, match="hens is the folder of a class and has no images"):
        read(pets)


def test_one_class_cannot_be_learned_but_be_looked_at(pets):
    (pets / "dogs/rex.jpg").unlink()
    with pytest.raises(UserError, match="has one class only"):
        read(pets, skip_bad=True)
    assert set(read(pets, "eval", skip_bad=True).columns["label"]) == {"cats"}


def test_files_alone_can_be_answered_and_not_learned(pets):
    with pytest.raises(UserError, match="no sub-folders, so they have no labels"):
        read(pets / "dogs")
    assert list(read(pets / "dogs", "data").columns) == ["image"]


def test_nothing_there(tmp_path, pets):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="Did you mean 'pets'"):
        read(tmp_path / "pet")
    write(tmp_path / "pets.zip")
    with pytest.raises(UserError, match="neither a folder nor a table"):
        read(tmp_path / "pets.zip")


def test_links(pets, tmp_path):
    write(tmp_path / "secret.jpg", tmp_path / "other/a.jpg")
    cats = pets / "cats"
    (cats / "within.jpg").symlink_to(pets / "dogs/rex.jpg")
    assert len(read(pets)) == 4
    (cats / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (cats / "gone.jpg").symlink_to(pets / "nowhere.jpg")
    (pets / "linked").symlink_to(tmp_path / "other")
    (cats / "loop").symlink_to(pets)
    (pets / "dogs/cats").symlink_to(cats)
    (cats / "dogs").symlink_to(pets / "dogs")
    with pytest.raises(UserError) as error:
        read(pets)
    for told in (
        "out.jpg is a link that leaves",
        "gone.jpg is a link that leads nowhere",
        "loop is a link to",
    ):
        assert told in str(error.value)
    assert not any("secret" in p or "linked" in p for p in read(pets, skip_bad=True).columns["image"])


def test_a_table_points_to_files_relative_to_itself(pets, monkeypatch):
    table = pets / "table.csv"
    table.write_text("image,label\ncats/tom.JPG,cat\n")
    found = read(table)
    values, problems = locate_files(found, "image", noun="image", skip_bad=False)
    assert values == [str(pets / "cats/tom.JPG")] and not problems
    assert found.where(0) == f"{table}, line 2"


def test_missing_files_are_counted_and_the_first_ten_shown(pets):
    rows = [{"image": f"cats/gone{i:02}.jpg", "label": "cat"} for i in range(14)]
    rows.append({"image": "cats/tom.JPG", "label": "cat"})
    table = pets / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        locate_files(read(table), "image", noun="image", skip_bad=False)
    told = str(error.value)
    assert "14 of 15 rows point to no file" in told and "and 4 more" in told
    assert "line 10: cats/gone09.jpg does not exist" in told and "gone10" not in told
    _, problems = locate_files(read(table), "image", noun="image", skip_bad=True)
    assert len(problems) == 14 and problems[0].endswith("line 1: cats/gone00.jpg does not exist.")


def test_what_is_no_path(pets):
    rows = [
        {"image": value}
        for value in ("", None, "https://example.org/a.jpg", str(pets / "cats"), "a\0b", "x" * 5000)
    ]
    _, problems = locate_files(read(rows, "data"), "image", noun="image", skip_bad=True)
    assert len(problems) == 6
    assert (
        "nothing is fetched" in problems[2] and "is a folder" in problems[3] and "is no path" in problems[4]
    )


def test_bytes_and_what_datasets_writes(pets):
    rows = [
        {"image": {"bytes": b"abc", "path": "a.jpg"}},
        {"image": {"bytes": None, "path": str(pets / "cats/tom.JPG")}},
        {"image": b"def"},
    ]
    values, problems = locate_files(read(rows, "data"), "image", noun="image", skip_bad=False)
    assert values == [b"abc", str(pets / "cats/tom.JPG"), b"def"] and not problems


def test_what_is_handed_to_predict(pets):
    tom = str(pets / "cats/tom.JPG")
    assert given_files([tom], "image", "image") == [{"image": tom}]
    assert given_files([{"image": tom}], "image", "image") is None
    with pytest.raises(UserError, match=r"nobody\.jpg does not exist"):
        given_files([tom, "nobody.jpg"], "image", "image")
    table = read([{"image": tom}], "data")
    assert table.where(0) == tom
    assert read(tom, "data").columns == {"image": [tom]}


def test_in_pieces(pets):
    table = pets / "table.csv"
    table.write_text("image,label\n" + "cats/tom.JPG,cat\n" * 5)
    given = {"suffixes": (".jpg", ".png"), "column": "image", "noun": "image", "rows": 2}
    pieces = list(stream_files(table, **given))
    assert [len(piece) for piece in pieces if len(piece)] == [2, 2, 1]
    assert pieces[1].where(0) == f"{table}, line 4"
    values, problems = locate_files(pieces[1], "image", noun="image", skip_bad=False)
    assert values == [str(pets / "cats/tom.JPG")] * 2 and not problems
    table.unlink()
    pieces = list(stream_files(pets, **given))
    assert [piece.columns["label"] for piece in pieces] == [["cats", "cats"], ["dogs"]]
    assert pieces[1].where(0) == str(pets / "dogs/rex.jpg")
