"""CSV files: what is read, and one message for each thing that is wrong."""

import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnazen.files import InputError
from dnazen.finetuning.data import Table, count_overlaps, find_splits, read_table
from dnazen.finetuning.tasks import TASKS, Classification, PerBase


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "t.csv"):
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return write


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected columns sequence (or sequence1, sequence2) and label, found none"),
        ("sequence,label\n", "expected a sequence in each row, found no rows"),
        ("seq,label\nACGT,0\n", "and label, found seq, label"),
        ("sequence\nACGT\n", "and label, found sequence"),
        ("sequence1,label\nACGT,0\n", "found sequence1, label"),
        ("sequence,label\nACGT,0\n,1\n", "line 3: expected a sequence, found nothing"),
        ("sequence1,sequence2,label\nACGT, ,0\n", "line 2: expected a sequence2, found nothing"),
        ("sequence,label\nACGT,0\nAC GT,0\n", "line 3: sequence: expected letters alone, found white space between"),
        ('sequence,label\n"AC\nGT",0\n', "line 3: sequence: expected letters alone"),
        ("sequence,label\nACGT,\n", "line 2: expected a label, found nothing"),
        ("sequence,label\nACGT\n", "line 2: expected 2 fields, found 1"),
        ("sequence,label\nACGT,0,7\n", "line 2: expected 2 fields, found 3"),
        ('sequence,label\n"ACGT,0\n', "cannot be read as CSV"),
    ],
)
def test_what_is_no_table_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_absent_and_truncated_files_are_refused(write, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "none.csv")
    whole = gzip.compress(b"sequence,label\n" + b"ACGTTTGCA,0\n" * 500)
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.csv\.gz: cannot be read as CSV"):
        read_table(tmp_path / "cut.csv.gz")


@pytest.mark.parametrize(
    "kind, labels, message",
    [
        ("classification", ["0", "2"], "expected classes 0 to 2, each at least once, found 0, 2"),
        ("classification", ["1", "2"], "expected classes 0 to 2, each at least once, found 1, 2"),
        ("classification", ["0", "0"], "expected classes 0 to 1, each at least once, found 0"),
        ("classification", ["0", "-1"], "line 3: label: expected a class, 0, 1, 2, ..., found '-1'"),
        ("classification", ["0", "1.5"], "line 3: label: expected a class, 0, 1, 2, ..., found '1.5'"),
        ("regression", ["0.5", "much"], "expected a number, or several separated by spaces, found 'much'"),
        ("regression", ["0.5", "nan"], "expected a number, or several separated by spaces, found 'nan'"),
        ("multi-label", ["0 1", "0 2"], "expected 0 or 1 for each label, separated by spaces, found '0 2'"),
        ("multi-label", ["0 1", "1"], "line 3: label: expected 2 values, found 1"),
        ("per-base", ["0011", "001"], "line 3: label: expected 4 digits, one for each base, found 3"),
        ("per-base", ["0011", "00x1"], "line 3: label: expected a digit for each base, its class, found '00x1'"),
        ("per-base", ["0000", "0000"], "expected classes 0 to 1, each at least once, found 0"),
    ],
)
def test_labels_that_do_not_fit_the_task_are_refused(write, kind, labels, message):
    table = read_table(write("sequence,label\n" + "".join(f"ACGT,{label}\n" for label in labels)))
    with pytest.raises(InputError) as error:
        TASKS[kind].from_table(table).labels_of(table)
    assert str(table.path) in str(error.value) and message in str(error.value)


def test_class_that_training_does_not_have_is_refused(write):
    train = read_table(write("sequence,label\nACGT,0\nACGT,1\n"))
    dev = read_table(write("sequence,label\nACGT,0\nACGT,2\n", "dev.csv"))
    with pytest.raises(InputError, match=r"dev.csv: line 3: label: expected a class from 0 to 1, .* found 2"):
        Classification.from_table(train).labels_of(dev)


def test_pairs_have_no_labels_per_base(write):
    table = read_table(write("sequence1,sequence2,label\nACGT,ACGT,0011\n"))
    with pytest.raises(InputError, match="found pairs"):
        PerBase.parse(table)


def test_one_file_for_each_split(write):
    write("sequence,label\n", "train.csv")
    path = write("", "train.csv.gz")
    with pytest.raises(InputError, match=r"expected one file for train, found train.csv and train.csv.gz"):
        find_splits(path.parent)


def test_what_spreadsheets_write_is_read(write, caplog):
    """A byte-order mark, CRLF, quotes, further columns, lower case, U; other letters are counted."""
    table = read_table(write('\ufeffname,"sequence",label\r\nfirst,acgu,0\r\n"second, or so","ACNNT", 1 \r\n'))
    assert table.sequences == [("ACGT",), ("ACNNT",)] and table.labels == ["0", "1"] and table.num_unclear == 2
    assert "2 letters other than A, C, G, T, in 1 of 2 rows" in caplog.text


def test_sequences_longer_than_the_csv_module_expects(write):
    assert read_table(write(f"sequence,label\n{'ACGT' * 50_000},0\n")).sequences == [("ACGT" * 50_000,)]


def test_gzip_and_pairs(tmp_path):
    (tmp_path / "pairs.csv.gz").write_bytes(gzip.compress(b"sequence1,sequence2,label\nAC,GT,0\nAA,CC,1\n"))
    table = read_table(tmp_path / "pairs.csv.gz")
    assert table.is_pair and table.sequences == [("AC", "GT"), ("AA", "CC")]


def test_labels_may_be_absent_for_prediction(write):
    assert read_table(write("sequence\nACGT\n"), needs_labels=False).labels is None


SPLIT = st.lists(st.text("AC", min_size=1, max_size=3), min_size=1, max_size=12)


@given(train=SPLIT, dev=SPLIT, test=SPLIT)
def test_overlaps_are_those_of_plain_loops(train, dev, test):
    splits = {"train": train, "dev": dev, "test": test}
    tables = {split: Table(None, [(text,) for text in texts], None, [], 0) for split, texts in splits.items()}
    found = count_overlaps(tables)
    for split, texts in splits.items():
        assert found[split].repeats == sum(text in texts[:row] for row, text in enumerate(texts))
    assert found["dev"].in_train == len([text for text in set(dev) if text in train])
    assert found["test"].in_train == len([text for text in set(test) if text in train])
    assert found["test"].in_dev == len([text for text in set(test) if text in dev])
    assert found["train"][2:] == (0, 0) and found["dev"].in_dev == 0


@pytest.mark.slow
def test_leaks_of_gue_are_the_known_ones(shared_data):
    """The counts that stand in the data's `SOURCES.md`."""

    def overlaps(name):
        return count_overlaps({s: read_table(p) for s, p in find_splits(shared_data / "gue" / name).items()})

    tf4, core = overlaps("tf/4"), overlaps("prom/prom_core_all")
    assert (tf4["train"].repeats, tf4["dev"].in_train) == (3789, 346)
    assert (core["dev"].in_train, core["test"].in_train) == (54, 42)
    assert overlaps("splice/reconstructed")["test"].in_dev == 30
