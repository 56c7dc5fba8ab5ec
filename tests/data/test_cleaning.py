"""Cleaning: known cases for each function, the arithmetic of the report, malformed rows, streaming, near-duplicates."""

import random
import unicodedata
from collections import Counter

import ftfy
import pytest

from shared import UserError
from shared.data.cleaning import (
    CleaningReport,
    clean_dataset,
    clean_rows,
    clean_text,
    document_cleaner,
    duplicate_line_share,
    fix_unicode,
    language,
    languages,
    malformed,
    normalize_whitespace,
    repetitive,
    strip_control,
    top_ngram_share,
    words_between,
)
from shared.data.near_duplicates import NearDuplicates, drop_near_duplicates, shingles, signature

VIETNAMESE = "Tôi yêu tiếng Việt, người ở Đà Nẵng nói: “Chào bạn!”"
ENGLISH = "The committee met on Tuesday to discuss how the new library should be paid for and who will run it."
CODE = 'def f(x):\n    if x < 1:\n\treturn {"a":  1}\n\n    return x & 3  # &lt; stays'


@pytest.mark.parametrize(
    ("broken", "fixed"),
    [
        ("vÃ©", "vé"),
        ("schÃ¶n", "schön"),
        ("tiáº¿ng Viá»‡t", "tiếng Việt"),
        (unicodedata.normalize("NFD", VIETNAMESE), VIETNAMESE),
        (VIETNAMESE, VIETNAMESE),
        ("ﬁ Ｌ “x” &amp; 10³", "ﬁ Ｌ “x” &amp; 10³"),
        ("a\ud800b", "a\ufffdb"),
    ],
)
def test_fix_unicode(broken, fixed):
    assert fix_unicode(broken) == fixed


def test_control_characters_go_and_tabs_newlines_joiners_stay():
    assert strip_control("a\x00b\x07c\x7f\ufeff\u200b\td\ne\x0cf") == "abc\td\ne\nf"
    assert clean_text("Donau\u00addampf\u00adschiff nghi\u00c3\u00aam") == "Donaudampfschiff nghiêm"  # soft hyphens
    assert strip_control("👩\u200d🚀 می\u200cخواهم") == "👩\u200d🚀 می\u200cخواهم"


def test_whitespace_keeps_indentation():
    assert normalize_whitespace("\r\n  a  \r\n\tb \n\n\n\nc  d\n\n") == "  a\n\tb\n\nc  d"
    assert clean_text(CODE) == CODE


def test_empty_lines_stay_within_fences_alone():
    fenced = "```python\nx\n\n\ny\n```"
    for text, kept in (
        (f"A\n\n\n{fenced}\n\n\nB", f"A\n\n{fenced}\n\nB"),
        (f"1. A\n   ````\n{fenced}\n\n\n   ````", f"1. A\n   ````\n{fenced}\n\n\n   ````"),
        (f"see ```x``` here\n\n\n{fenced[:-4]}\n\n\nz\n", f"see ```x``` here\n\n{fenced[:-4]}\n\n\nz"),  # never closed
    ):
        assert clean_text(text, fences=True) == kept
        assert "\n\n\n" not in clean_text(text)


def test_clean_text_is_stable_and_keeps_vietnamese():
    dirty = "  vÃ© \x00\x1b[31mred\x1b[0m\r\n\r\n\r\n\r\n" + VIETNAMESE + " \n"
    assert clean_text(dirty) == "  vé red\n\n" + VIETNAMESE
    assert clean_text(clean_text(dirty)) == clean_text(dirty)


def test_repetition_measures():
    assert duplicate_line_share("a\n b\na\n\na") == 0.5
    assert duplicate_line_share("a\nb") == duplicate_line_share("") == 0.0
    assert top_ngram_share("a b c d e f", 2) == top_ngram_share("a", 2) == 0.0
    assert top_ngram_share("to be or to be", 2) == pytest.approx(10 / 14)
    assert top_ngram_share("buy buy buy buy", 2) == 1.0


def test_the_shortcuts_change_no_result():
    """fix_unicode passes plain lines by, repetitive counts n-grams only where they can matter."""
    rng = random.Random(0)
    pieces = [
        "a",
        "b ",
        "\r\n",
        "\n",
        "\r",
        "\x1b[31m",
        "vÃ©",
        "é",
        "tiáº¿ng",
        "\x0c",
        "\x85",
        "\u2028",
        "\ud800",
        "e\u0301",
    ]
    off = ("unescape_html", "uncurl_quotes", "fix_latin_ligatures", "fix_character_width")
    reasons = Counter()
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randrange(20)))
        assert fix_unicode(text) == ftfy.fix_text(text, **dict.fromkeys(off, False))
        words = rng.choices([f"w{i}" for i in range(30)], k=rng.randrange(1, 60))
        text = " ".join(words + words[: rng.randrange(6)] * rng.randrange(5))
        limits = ((2, 0.20), (3, 0.18), (4, 0.16))
        expected = "repeated words" if any(top_ngram_share(text, n) > most for n, most in limits) else None
        assert repetitive(text) == expected
        reasons[expected] += 1
    assert min(reasons.values()) > 300 and len(reasons) == 2


def test_filters_name_their_reason():
    assert repetitive(ENGLISH) is None
    assert repetitive("menu\n" * 4 + ENGLISH) == "repeated lines"
    assert repetitive("click here now " * 5 + ENGLISH) == "repeated words"
    keep = words_between(3, 5)
    assert [keep(" ".join("a" * n)) for n in (2, 3, 5, 6)] == ["too short", None, None, "too long"]
    assert language(ENGLISH) == "en" and language(VIETNAMESE) == "vi"
    assert languages("en", "vi")(VIETNAMESE) is None and languages("en")(VIETNAMESE) == "other language"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing"),
        (7, "wrong type"),
        (b"bytes", "wrong type"),
        (["text"], "wrong type"),
        ("", "empty"),
        (" \n\t", "empty"),
        ("x" * 2_000_000, "over 1 MB"),
        ("\x00" * 100, "control characters"),
        ("ab\x00", "control characters"),
        ("abcd\x00", None),
        (VIETNAMESE, None),
    ],
)
def test_malformed(value, reason):
    assert malformed(value) == reason


def test_report_adds_up_and_every_bad_row_is_counted_by_reason():
    rows = [{"text": text} for text in (None, 7, "", "x" * 2_000_000, "\x00" * 100, "short", "  good  text here ")]
    rows += [None, "a bare text counts too", {}, {"text": "\x1b[31m"}]
    report = CleaningReport()
    kept = list(clean_rows(rows, document_cleaner(filters=[words_between(2, 99)]), report))
    assert kept == [{"text": "  good  text here"}, {"text": "a bare text counts too"}]
    assert (report.read, report.kept, report.bad) == (11, 2, 8)
    assert report.read == report.kept + report.dropped.total()
    expected = {"missing": 3, "wrong type": 1, "empty": 2, "over 1 MB": 1, "control characters": 1, "too short": 1}
    assert report.dropped == expected
    assert str(report).startswith("read 11 = kept 2 + dropped 9 (missing 3, empty 2, ")
    assert str(CleaningReport(read=1000, kept=1000)) == "read 1,000 = kept 1,000 + dropped 0"


def test_over_five_percent_malformed_is_an_error_and_filters_do_not_count():
    def run(bad, unwanted):
        report = CleaningReport()
        rows = [{"body": ""}] * bad + [{"body": "one"}] * unwanted + [{"body": "one two"}] * (100 - bad - unwanted)
        list(clean_rows(rows, document_cleaner("body", [words_between(2, 9)]), report))
        report.check("data.jsonl")

    run(bad=5, unwanted=90)
    with pytest.raises(UserError, match=r"data\.jsonl: 6 of 100 rows are unusable \(read 100 = .*empty 6"):
        run(bad=6, unwanted=0)


def test_chat_rows_pass_through_a_converter_of_their_own():
    def convert(row):
        reasons = [reason for turn in row["messages"] if (reason := malformed(turn["content"]))]
        turns = [] if reasons else [turn | {"content": clean_text(turn["content"])} for turn in row["messages"]]
        return f"bad: {reasons[0]}" if reasons else {"messages": turns}

    rows = [{"messages": [{"role": "user", "content": content}]} for content in (CODE + "  \n", None)]
    report = CleaningReport()
    assert list(clean_rows(rows, convert, report)) == [{"messages": [{"role": "user", "content": CODE}]}]
    assert (report.kept, report.bad) == (1, 1)


def test_cleaning_is_a_stream():
    def endless():
        while True:
            yield {"text": ENGLISH}

    report = CleaningReport()
    stream = clean_rows(endless(), document_cleaner(), report)
    assert [next(stream) for _ in range(3)] == [{"text": ENGLISH}] * 3
    assert report.read == 3


def test_shingles():
    assert shingles("One, two THREE four five six") == ["one two three four five", "two three four five six"]
    assert shingles("Two words!") == ["two words"]
    assert shingles("") == shingles("  ") and len(shingles("")) == 1
    assert shingles("!!!") != shingles("???") and shingles("😀") != shingles("\ud83d")
    assert shingles(unicodedata.normalize("NFD", VIETNAMESE)) == shingles(VIETNAMESE)
    assert len(shingles("我们今天去图书馆")) == 4


def test_near_duplicates_against_brute_force():
    """Half of the pairs are near ones; the others share their beginning only."""
    rng = random.Random(0)
    index, near, apart, seen, wrong = NearDuplicates(), 0, 0, 0, 0
    for pair in range(400):
        words = [f"w{rng.randrange(5000)}" for _ in range(rng.randrange(100, 200))]
        other = list(words)
        if pair % 2:
            other[len(words) // 2 :] = [f"w{rng.randrange(5000)}" for _ in words[len(words) // 2 :]]
        else:
            for place in rng.sample(range(len(words)), rng.randrange(1, 4)):
                other[place] = "new"
        first, second = ({tuple(text[i : i + 5]) for i in range(len(text) - 4)} for text in (words, other))
        similarity = len(first & second) / len(first | second)
        assert index.add(" ".join(words)) == []
        found = index.add(" ".join(other))
        if similarity >= 0.8:
            near, seen = near + 1, seen + (found == [2 * pair])
        elif similarity < 0.5:
            apart, wrong = apart + 1, wrong + bool(found)
    assert near > 150 and apart == 200
    assert seen >= 0.95 * near and wrong == 0


def test_dropped_near_duplicates_leave_the_first_and_only_what_is_kept_is_indexed():
    rng = random.Random(1)
    words = [f"w{rng.randrange(5000)}" for _ in range(400)]
    chain = [" ".join(words[n : n + 200]) for n in range(0, 201, 8)]  # each like its neighbour, soon unlike the first
    rows = [{"text": text} for text in (chain[0], ENGLISH, ENGLISH.upper() + "!!", "ok", "Ok.", "no", *chain[1:])]
    report = CleaningReport()
    kept = [row["text"] for row in drop_near_duplicates(rows, lambda row: row["text"], report)]
    assert kept[:4] == [chain[0], ENGLISH, "ok", "no"]
    assert chain[1] not in kept and 5 <= sum(text in chain for text in kept) <= 9
    assert report.read == len(rows) == report.kept + report.dropped["near-duplicate"]


def test_a_template_on_every_row_keeps_the_work_linear():
    rng = random.Random(2)
    template = [f"t{i}" for i in range(60)]
    texts = [" ".join(template + [f"w{rng.randrange(5000)}" for _ in range(40)]) for _ in range(3000)]
    index = NearDuplicates()
    assert not any(index.add(text) for text in texts)  # they share under half
    looked_at = index.candidates(index._slots(signature(texts[0])).tolist())
    assert index.BUCKET < len(looked_at) <= index.BANDS * index.BUCKET  # about 400 share a band with it


def test_each_split_is_cleaned_and_an_empty_one_keeps_the_columns():
    data = {"train": [{"t": "a"}, {"t": "b"}], "test": [{"t": None}], "validation": [{"t": "c"}]}

    def convert(row):
        return {"text": row["t"], "labels": [row["t"]]} if row["t"] else "no text"

    cleaned, report = clean_dataset(data, convert, "mine")
    assert {name: rows.to_list() for name, rows in cleaned.items()} == {
        "train": [{"text": "a", "labels": ["a"]}, {"text": "b", "labels": ["b"]}],
        "test": [],
        "validation": [{"text": "c", "labels": ["c"]}],
    }
    assert cleaned["test"].features == cleaned["train"].features
    assert str(report) == "read 4 = kept 3 + dropped 1 (no text 1)" and report.examples == {"no text": "test row 1"}
    with pytest.raises(UserError, match=r"mine: no row is left after cleaning \(read 1 = kept 0"):
        clean_dataset({"test": data["test"]}, convert, "mine")
    with pytest.raises(UserError, match="mine"):
        clean_dataset({"train": [{}] * 9}, lambda row: "bad: wrong type", "mine")
