"""Scripts without blanks, spellings of a letter or a tone, ends of sentences: lengths, near-duplicates, metrics, Lead-k."""

import json
import unicodedata

import articles
import labelled_texts
import pytest
import seq2seq_models as seq2seq
import squad_features

from shared import metrics, one_spelling
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


SPELLINGS = [
    ("Hoà Bình", "Hòa Bình"),
    ("TOÀ ÁN", "TÒA ÁN"),
    ("sức khoẻ", "sức khỏe"),
    ("thuỷ thủ, huỷ bỏ", "thủy thủ, hủy bỏ"),
    ("hoạ sĩ xoè ô", "họa sĩ xòe ô"),
]


@pytest.mark.parametrize(("new", "old"), SPELLINGS)
def test_the_place_of_a_tone_makes_no_other_word(new, old):
    for text in (new, unicodedata.normalize("NFD", new)):
        assert one_spelling(text) == one_spelling(old) == old
        assert len(set(cluster([f"{SENTENCES['vi']} {text}", f"{SENTENCES['vi']} {old}"]))) == 1
        long = f"{SENTENCES['vi']} {text} là đây."
        other = f"{SENTENCES['vi']} {old} là đây."
        bleu = metrics.load("bleu").compute(predictions=[long], references=[other])
        assert bleu["bleu"] == pytest.approx(100) and bleu["signature"].endswith("|spelling:one")
        rouge = metrics.load("rouge").compute(predictions=[long], references=[other])
        assert rouge["rouge1"] == rouge["rougeLsum"] == pytest.approx(100)
        found = metrics.load("squad").compute(predictions=[text], references=[[old]])
        assert found["exact_match"] == found["f1"] == 100
    assert labelled_texts.likely_one({new, old}) and not labelled_texts.likely_one({"mà", "má"})


@pytest.mark.parametrize(
    "word", ["quý", "quỳ", "hoàn", "toán", "loét", "suýt", "huỳnh", "khuỷu", "giúp", "của", "mía", "cafe", "x²"]
)
def test_other_words_keep_their_spelling(word):
    assert one_spelling(word) == word


def test_a_tone_makes_another_word():
    """`ma má mà mả mã mạ` are six words: a metric that loses the marks calls all of them the same."""
    said, meant = "mà má mạ mả mã ma đi đâu", "ma mà mã má mạ mả đi đâu"
    assert metrics.load("bleu").compute(predictions=[said], references=[meant])["bleu"] < 40
    found = metrics.load("rouge").compute(predictions=["mà má mạ"], references=["ma mả mã"])
    assert found["rouge1"] == 0
    assert metrics.load("squad").compute(predictions=["má"], references=[["mà"]])["exact_match"] == 0
    assert "spelling" not in metrics.load("bleu").compute(predictions=[said], references=[meant])["signature"]
    assert len(set(cluster([" ".join([said] * 3), " ".join([meant] * 3)]))) == 2


def test_labels_in_two_spellings_are_one_class():
    places = {"text": "text", "label": "label"}
    rows = [{"text": SENTENCES["vi"], "label": unicodedata.normalize(form, "Cà phê")} for form in ("NFC", "NFD")]
    assert {labelled_texts.to_row(row, places)["label"] for row in rows} == {"Cà phê"}


def test_a_tokenizer_learnt_from_vietnamese_gives_back_what_it_reads():
    texts = [f"{SENTENCES['vi']} {' '.join(pair)}." for pair in SPELLINGS] * 5
    tokenizer = seq2seq.load_tokenizer(None, iter(texts), 400)
    for text in (*texts, *(unicodedata.normalize("NFD", text) for text in texts)):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == unicodedata.normalize("NFC", text)
        assert tokenizer.unk_token_id not in ids and len(ids) < len(text) / 1.5


def test_answers_of_a_vietnamese_question_stand_where_they_say(tmp_path):
    """XQuAD's form: SQuAD's JSON, contexts and answers in whatever spelling and encoding."""
    context = "Thành phố Hoà Bình nằm bên sông Đà. Năm 1979, nhà máy thuỷ điện Hoà Bình được khởi công trên sông này."
    asked = [
        ("Nhà máy nằm trên sông nào?", "sông Đà"),
        ("Nhà máy tên gì?", "thủy điện Hòa Bình"),
        ("Khởi công năm nào?", "1979"),
    ]
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, context)
        questions = [
            {"id": str(i), "question": question, "answers": [{"text": answer, "answer_start": 40}]}
            for i, (question, answer) in enumerate(asked)
        ]
        squad = {"version": "1.1", "data": [{"title": "", "paragraphs": [{"context": text, "qas": questions}]}]}
        (tmp_path / "xquad.vi.json").write_text(json.dumps(squad, ensure_ascii=False), encoding="utf8")
        rows = squad_features.read(str(tmp_path / "xquad.vi.json"), None)["train"]
        for row, (_, answer) in zip(rows, asked, strict=True):
            found = squad_features.to_question(
                row, {name: name for name in ("context", "question", "answers", "id", "title")}
            )
            start, said = found["answers"]["answer_start"][0], found["answers"]["text"][0]
            assert text[start : start + len(said)] == said and one_spelling(said) == one_spelling(answer)


@pytest.mark.parametrize("strips", [True, False])
def test_a_tokenizer_that_drops_marks_is_named(strips, tmp_path, caplog):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, PreTrainedTokenizerFast

    from shared.inference.positions import check_length

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "ma": 1, "má": 2, "mà": 3}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=strips)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    BertConfig().save_pretrained(tmp_path)
    caplog.set_level("INFO", "taskbook")
    check_length(128, tmp_path, PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"))
    assert ("má as ma" in caplog.text) == strips
