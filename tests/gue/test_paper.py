"""What `docs/results.md` counts in the paper's tables, counted again."""

from scipy.stats import spearmanr

from dnazen.gue.paper import AVERAGE_NGRAMS, DATASETS, TABLES


def better(table: str, first: str, second: str) -> tuple[int, list[str], list[str]]:
    """On how many data sets the first model has the higher MCC; where the lower; where the same."""
    rows = list(zip(DATASETS, TABLES[table][first], TABLES[table][second], strict=True))
    lower, same = [name for name, a, b in rows if a < b], [name for name, a, b in rows if a == b]
    return len(rows) - len(lower) - len(same), lower, same


def gains(first: str, second: str) -> list[float]:
    """Differences in MCC, rounded as printed, so that equal ones are ties."""
    return [round(a - b, 2) for a, b in zip(TABLES["Table 2"][first], TABLES["Table 2"][second], strict=True)]


def test_how_often_one_model_is_better():
    lower = ["EMP/H3K4me2", "prom/prom_300_all", "prom/prom_300_notata", "tf/0", "prom/prom_core_notata", "mouse/0"]
    assert better("Table 2", "DNAZEN†", "DNABERT-2†") == (20, [*lower, "mouse/1", "virus/covid"], [])
    number, _, same = better("Table 2", "DNAZEN", "DNABERT-2")
    assert (number, same) == (15, ["EMP/H4"])
    assert better("Table 2", "DNAZEN†", "DNAZEN")[0] == 22
    lower = ["EMP/H3", "EMP/H3K14ac", "EMP/H3K4me3", "EMP/H3K9ac", "EMP/H4", "mouse/2"]
    assert better("Table 3", "DNAZEN w/ WGM", "DNAZEN w/o WGM") == (22, lower, [])


def test_the_two_figures_printed_for_one_model_change_no_count():
    place = DATASETS.index("EMP/H3K4me3")
    assert {TABLES[f"Table {number}"][name][place] for number, name in ((2, "DNAZEN†"), (6, "DNAZEN†"))} == {42.84}
    assert {TABLES["Table 3"]["DNAZEN w/ WGM"][place], TABLES["Table 4"]["DNAZEN (P)"][place]} == {42.48}
    assert min(42.48, 42.84) > TABLES["Table 2"]["DNABERT-2†"][place]
    assert max(42.48, 42.84) < TABLES["Table 3"]["DNAZEN w/o WGM"][place]


def test_gains_do_not_grow_with_the_number_of_ngrams():
    found = spearmanr(gains("DNAZEN†", "DNABERT-2†"), AVERAGE_NGRAMS)
    assert round(found.statistic, 2) == -0.01 and round(found.pvalue, 2) == 0.95
    assert round(spearmanr(gains("DNAZEN", "DNABERT-2"), AVERAGE_NGRAMS).statistic, 2) == 0.01
    other = gains("DNAZEN†", "DNABERT-2†")
    other[DATASETS.index("EMP/H3K4me3")] = round(42.48 - 41.20, 2)
    assert round(spearmanr(other, AVERAGE_NGRAMS).statistic, 2) == -0.03
    assert round(sum(gains("DNAZEN†", "DNABERT-2†")) / len(DATASETS), 2) == 1.36


def test_the_chapter_says_the_same(root):
    text = (root / "docs" / "results.md").read_text()
    for words in (
        "**20** | Table 2",
        "15, and a tie on H4",
        "**22** | Table 3",
        "Spearman -0.01 (p = 0.95)",
        "1.36 points",
    ):
        assert words in text
