import pytest

from tritium.train.run.samples import add_sample, last_sample

pytestmark = pytest.mark.plain


def test_samples_are_added_in_order(tmp_path):
    assert last_sample(tmp_path) == ""
    add_sample(tmp_path, 0, "a")
    add_sample(tmp_path, 10, "b\nc é")
    assert (tmp_path / "samples.txt").read_text() == "--- step 0\na\n--- step 10\nb\nc é\n"
    assert last_sample(tmp_path) == "b\nc é\n"


def test_a_repeated_step_replaces_its_sample_and_later_ones(tmp_path):
    for step in (10, 20, 30):
        add_sample(tmp_path, step, f"text {step}")
    add_sample(tmp_path, 20, "again")
    assert (tmp_path / "samples.txt").read_text() == "--- step 10\ntext 10\n--- step 20\nagain\n"


def test_a_text_that_looks_like_a_header_deletes_no_sample(tmp_path):
    add_sample(tmp_path, 10, "x\n--- step 99\ny")
    add_sample(tmp_path, 20, "z")
    assert (tmp_path / "samples.txt").read_text() == (
        "--- step 10\nx\n --- step 99\ny\n--- step 20\nz\n"
    )


def test_bytes_that_are_not_text_stay(tmp_path):
    (tmp_path / "samples.txt").write_bytes(b"\xff\n--- step 5\n\xfe\n")
    assert last_sample(tmp_path) == "\ufffd\n"
    add_sample(tmp_path, 6, "\ud800")
    assert (tmp_path / "samples.txt").read_bytes() == b"\xff\n--- step 5\n\xfe\n--- step 6\n?\n"


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "samples.txt").symlink_to(target)
    add_sample(tmp_path, 1, "a")
    assert target.read_text() == "mine"
    assert not (tmp_path / "samples.txt").is_symlink()
