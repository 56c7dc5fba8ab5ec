"""Encodings of files: the likely one is named, Vietnamese of before Unicode is converted, and other languages are left alone."""

import json
import re
import unicodedata

import openpyxl
import pytest

from shared import UserError
from shared.data.charsets import OLD, likely_encoding, old_vietnamese, to_unicode
from shared.data.files import describe
from shared.data.load import load_data, load_stream

VIETNAMESE = (
    "Hà Nội là thủ đô của nước Việt Nam. Thành phố nằm bên bờ sông Hồng, có nhiều hồ đẹp và những con phố cổ. "
    "Mỗi buổi sáng, người dân ra chợ mua rau quả tươi, rồi cùng nhau uống cà phê. Trẻ em được nghỉ hè vào tháng sáu."
)
# The same text as fonts of the time had it, read as Western letters
WESTERN = {
    "TCVN3": "Hµ Néi lµ thñ ®« cña n­íc ViÖt Nam. Thµnh phè n»m bªn bê s«ng Hång, cã nhiÒu hå ®Ñp vµ nh÷ng con phè cæ. "
    "Mçi buæi s¸ng, ng­êi d©n ra chî mua rau qu¶ t­¬i, råi cïng nhau uèng cµ phª. TrÎ em ®­îc nghØ hÌ vµo th¸ng s¸u.",
    "VNI": "Haø Noäi laø thuû ñoâ cuûa nöôùc Vieät Nam. Thaønh phoá naèm beân bôø soâng Hoàng, coù nhieàu hoà ñeïp vaø "
    "nhöõng con phoá coå. Moãi buoåi saùng, ngöôøi daân ra chôï mua rau quaû töôi, roài cuøng nhau uoáng caø pheâ. "
    "Treû em ñöôïc nghæ heø vaøo thaùng saùu.",
}
OTHERS = {
    "en": "The café's façade isn't naïve: it's a résumé of the décor, and the jalapeños cost 5 € at noon.",
    "fr": "L'été dernier, où étiez-vous allés ? À la forêt près du château, déjà fermée, malgré les élèves et l'hôtel.",
    "de": "Die größten Häuser stehen über der Straße, wo schöne Bäume für müde Vögel blühen und Füße frei sind.",
    "es": "El niño comió piña mañana en el corazón de España, según cuentan los años y las canciones de aquél día.",
    "pt": "Não há razão para as ações da nação; os pães e as mães são três, você também está lá amanhã à noite.",
    "sv": "Där går två får på en ö, både små och stora, från förr, när sjön låg öde och båten kördes åt öster.",
    "is": "Það er góð hugmynd að læra íslensku því þá skilur þú sögurnar um hetjur og drauga í gömlum húsum.",
    "tr": "Türkçe güzel bir dildir; öğrenciler çok çalışır, şehirde büyük köprüler ve küçük dükkânlar vardır.",
    "cs": "Příliš žluťoučký kůň úpěl ďábelské ódy, když šel přes řeku a viděl město, které má věže i mosty.",
    "vi": VIETNAMESE,
    "vi-nfd": unicodedata.normalize("NFD", VIETNAMESE),
    "ru": "Москва является столицей и крупнейшим городом страны, в ней много парков и театров.",
    "code": "def f(x): return {'°': '±', '«': '»', 'µ': '¶', '÷': '×'}[x]  # ÀÁÂÃÄÅ àáâãäå çñ ÷ ©®",
    "maths": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β = ¬(¬α ∨ β), ±½ µm ÷ 3×10³ °C",
}


def reads(old: str) -> bytes:
    """The bytes of VIETNAMESE in an old encoding."""
    if old == "VISCII":
        places = {new: code for code, new in OLD["VISCII"].items() if code < 256}
        return VIETNAMESE.translate(str.maketrans(places)).encode("latin-1")
    if old != "windows-1258":
        return WESTERN[old].encode("latin-1")
    marks = {"\u0300", "\u0301", "\u0303", "\u0309", "\u0323"}
    text = ""
    for letter in VIETNAMESE:  # vowels with their quality, tones behind them
        parts = unicodedata.normalize("NFD", letter)
        tones = "".join(part for part in parts if part in marks)
        text += unicodedata.normalize("NFC", "".join(part for part in parts if part not in marks)) + tones
    return text.encode("cp1258")


@pytest.mark.parametrize("old", ["TCVN3", "VNI", "VISCII", "windows-1258"])
@pytest.mark.parametrize("read_as", ["latin-1", "cp1252"])
def test_old_vietnamese_is_found_and_converted(old, read_as):
    text = reads(old).decode(read_as)
    assert old_vietnamese(text) == old and to_unicode(text, old) == VIETNAMESE


def test_each_letter_of_viscii():
    # RFC 1456: of Latin-1's letters those that Vietnamese has keep their places, all others are letters of it alone
    letters = bytes(range(0x80, 0x100)).decode("latin-1")
    found = to_unicode(letters, "VISCII")
    bases = {unicodedata.normalize("NFD", letter)[0].lower() for letter in found}
    assert len(set(found)) == 128 and bases == set("aeiouyđ")
    kept = "ÀÁÂÃÈÉÊÌÍÒÓÔÙÚÝàáâãèéêìíòóôõùúý"
    assert to_unicode(kept, "VISCII") == kept


@pytest.mark.parametrize("code", OTHERS)
def test_other_texts_stay_as_they_are(code):
    for text in (OTHERS[code], OTHERS[code] * 5, OTHERS[code] + OTHERS["en"]):
        assert old_vietnamese(text) is None
    for encoding in ("cp1252", "cp1250", "cp1254", "cp1251", "koi8-r"):  # nor is a file of it taken for Vietnamese
        assert old_vietnamese(OTHERS[code].encode(encoding, "ignore").decode("latin-1")) is None
    assert all(
        old_vietnamese(OTHERS[code].encode("utf8").decode(wrong, "replace")) is None for wrong in ("latin-1", "cp1252")
    )


def table(kind: str, text: str, encoding: str) -> bytes:
    rows = [{"context": text, "question": f"{i}?", "label": "a"} for i in range(3)]
    if kind == ".csv":
        return "\n".join(["context;question;label", *(";".join(row.values()) for row in rows)]).encode(encoding)
    if kind == ".txt":
        return f"{text}\n{text}\n".encode(encoding)
    if kind == ".json":
        return json.dumps({"data": rows}, ensure_ascii=False).encode(encoding)
    return "".join(json.dumps(row, ensure_ascii=kind == "escaped.jsonl") + "\n" for row in rows).encode(encoding)


@pytest.mark.parametrize("old", ["TCVN3", "VNI", "VISCII", "windows-1258"])
@pytest.mark.parametrize("kind", [".csv", ".txt", ".json", ".jsonl", "escaped.jsonl"])
@pytest.mark.parametrize("inside", ["bytes", "utf8"])
def test_files_in_old_vietnamese_are_converted_and_said(old, kind, inside, tmp_path):
    path = tmp_path / f"a{kind}"
    western = reads(old).decode("cp1252" if inside == "utf8" else "latin-1")
    path.write_bytes(
        table(kind, western, "utf8" if inside == "utf8" or kind == "escaped.jsonl" else "latin-1")
        if kind != "x"
        else b""
    )
    rows = list(load_data(str(path))["train"])
    assert [row.get("context", row.get("text")) for row in rows] == [VIETNAMESE] * len(rows) and len(rows) in (2, 3)
    assert list(load_stream(str(path))["train"]) == rows
    assert old in describe(path) and "converted" in describe(path)


def test_a_table_of_excel_in_old_vietnamese(tmp_path):
    book = openpyxl.Workbook()
    for row in (["text", "label"], [WESTERN["TCVN3"], "a"], [WESTERN["TCVN3"], "b"]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert [row["text"] for row in load_data(str(tmp_path / "a.xlsx"))["train"]] == [VIETNAMESE] * 2


@pytest.mark.parametrize(
    ("encoding", "text", "name"),
    [
        ("cp1252", "café", "WINDOWS-1252"),
        ("cp1252", OTHERS["fr"], "WINDOWS-1252"),
        ("cp1252", OTHERS["de"] * 4, "WINDOWS-1252"),
        ("cp1252", "“quoted” – 5 €", "WINDOWS-1252"),
        ("cp1251", OTHERS["ru"], "WINDOWS-1251"),
        ("koi8-r", OTHERS["ru"], "KOI8-R"),
        ("cp932", "東京は日本の首都であり、世界でも最大級の都市の一つです。春には桜が咲きます。", "CP932|SHIFT-JIS"),
        ("euc-jp", "東京は日本の首都であり、世界でも最大級の都市の一つです。春には桜が咲きます。", "EUC-JP"),
        ("gb18030", "北京是中华人民共和国的首都，也是全国的政治和文化中心，历史悠久。", "GB18030|GBK|GB2312"),
        ("big5", "台北是臺灣的首都，也是全國的政治與文化中心，歷史悠久，市場很多。", "BIG5.*|CP950"),
        ("euc-kr", "서울은 대한민국의 수도이자 최대 도시이며, 한강이 도시를 가로질러 흐릅니다.", "EUC-KR|CP949"),
        (
            "cp1253",
            "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας και μια από τις παλαιότερες πόλεις.",
            "WINDOWS-1253|ISO-8859-7",
        ),
    ],
)
def test_the_advice_names_the_likely_encoding_and_shows_how_it_reads(encoding, text, name, tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\n" + b"ok\ta\n" + f"{text}\tb\n".encode(encoding) * 3)
    with pytest.raises(UserError) as stopped:
        load_data(str(tmp_path / "a.tsv"))
    said = str(stopped.value)
    found = re.search(r"line 3: not UTF-8 .* it reads (.*)\. If .*iconv -f (\S+) -t UTF-8 a.tsv > utf8.tsv", said)
    assert found and re.fullmatch(name, found[2]) and text[:4] in found[1], said
    assert text in text.encode(encoding).decode(likely_encoding(text.encode(encoding) * 3))


def test_the_old_encodings_are_those_that_are_named():
    assert set(OLD) == {"TCVN3", "VISCII", "VNI", "windows-1258"}
