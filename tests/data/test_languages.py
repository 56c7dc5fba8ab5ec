"""Scripts without blanks, composed and decomposed letters, ends of sentences: lengths, near-duplicates, BLEU, Lead-k."""

import unicodedata

import articles
import pytest

from shared import metrics
from shared.data.cleaning import count_words, words_between
from shared.data.near_duplicates import shingles
from shared.data.splits import cluster
from shared.metrics.bleu.bleu import tokenizer_for

SENTENCES = {
    "zh": "今天天气很好，我们去公园散步。",
    "ja": "今日は天気がいいので、公園に行きます。",
    "th": "วันนี้อากาศดีมากเราไปเดินเล่นที่สวน",
    "lo": "ມື້ນີ້ອາກາດດີຫຼາຍພວກເຮົາໄປສວນ",
    "km": "ថ្ងៃនេះអាកាសធាតុល្អណាស់យើងទៅសួន",
    "my": "ဒီနေ့ရာသီဥတုကောင်းတယ်ပန်းခြံသွားမယ်",
    "ko": "오늘 날씨가 아주 좋아서 우리는 공원에 갑니다.",
    "vi": "Hôm nay trời đẹp quá, chúng ta đi chơi công viên.",
    "ru": "Сегодня хорошая погода, идём гулять в парк.",
    "hi": "आज मौसम अच्छा है, हम पार्क जाते हैं।",
}
UNSPACED = ("zh", "ja", "th", "lo", "km", "my")
TOKENIZER = dict.fromkeys(SENTENCES, "13a") | dict.fromkeys((*UNSPACED, "ko"), "char") | {"zh": "zh"}


@pytest.mark.parametrize("code", SENTENCES)
def test_words_are_counted_by_letters_where_there_are_no_blanks(code):
    text = SENTENCES[code]
    if code in UNSPACED:
        assert count_words(text) == sum(map(str.isalpha, text)) > 10 > len(text.split())
        assert words_between(50)(text) == "too short" and words_between(50)("\n".join([text] * 6)) is None
    else:
        assert count_words(text) == len(text.split())


def test_words_of_two_scripts_are_added():
    assert count_words("iPhone 15 发布了，很好。 Good!") == 3 + 5
    assert count_words("plain - words") == 3


@pytest.mark.parametrize("code", SENTENCES)
def test_bleu_takes_the_tokenizer_of_the_language_and_says_so(code):
    text = SENTENCES[code]
    spelt = unicodedata.normalize("NFD", text)
    found = metrics.load("bleu").compute(predictions=[spelt, text], references=[text, [spelt]])
    assert found["bleu"] == pytest.approx(100) and f"|tok:{TOKENIZER[code]}|" in found["signature"]
    half = text[: len(text) // 2]
    assert metrics.load("bleu").compute(predictions=[half], references=[text])["bleu"] < 90


def test_the_tokenizer_is_that_of_most_words():
    assert tokenizer_for(["iPhone 15 发布了，很好"]) == "zh" and tokenizer_for(["He said 好 to me and left."]) == "13a"
    assert (
        tokenizer_for(["我们去の公园散步今天天气很好我们去公园散步今天天气很好"]) == "zh"
        and tokenizer_for(["1 2"]) == "13a"
    )


@pytest.mark.parametrize("code", SENTENCES)
def test_spellings_that_look_the_same_are_near_duplicates(code):
    text = "\n".join(SENTENCES[code][i:] + SENTENCES[code][:i] for i in range(4))
    assert len(shingles(text)) > 20
    assert len(set(cluster([text, unicodedata.normalize("NFD", text)]))) == 1


@pytest.mark.parametrize(
    ("document", "sentences"),
    [
        (
            "Ông sống ở TP. Hồ Chí Minh. Ông là TS. Nguyễn Văn An.",
            ["Ông sống ở TP. Hồ Chí Minh.", "Ông là TS. Nguyễn Văn An."],
        ),
        ("PGS. Lê C nói. Q. 1, TP. HCM có mưa. Hết.", ["PGS. Lê C nói.", "Q. 1, TP. HCM có mưa.", "Hết."]),
        ("1. Mở đầu. 2. Kết luận.", ["1. Mở đầu.", "2. Kết luận."]),
        ("Năm 1999. Họ cưới.", ["Năm 1999.", "Họ cưới."]),
        ("First. Then Plan B. Then we go.", ["First.", "Then Plan B.", "Then we go."]),
        ("これは本。彼は「猫。」と言う。終わり", ["これは本。", "彼は「猫。」と言う。", "終わり"]),
        ("今天很好！我们走吧？好。", ["今天很好！", "我们走吧？", "好。"]),
        ("ខ្ញុំទៅ។ អ្នកមក។", ["ខ្ញុំទៅ។", "អ្នកមក។"]),
        ("वह आया। वह गया।", ["वह आया।", "वह गया।"]),
        ("Mme. Curie est venue. Elle parle.", ["Mme. Curie est venue.", "Elle parle."]),
        ("Он жил на ул. Ленина. Конец.", ["Он жил на ул. Ленина.", "Конец."]),
    ],
)
def test_sentences_end_as_the_language_ends_them(document, sentences):
    assert articles.sentences(document) == sentences
    assert articles.lead(document, 1) == sentences[0]


def test_novel_bigrams_know_spellings_and_scripts():
    composed = SENTENCES["vi"]
    assert articles.novel_bigrams(unicodedata.normalize("NFD", composed), composed)[0] == 0
    new, all_of_them = articles.novel_bigrams(SENTENCES["zh"], "我们去公园")
    assert all_of_them > 10 and new == all_of_them - 4
