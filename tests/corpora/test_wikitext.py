"""Wikitext: namespaces of any language, links, variants, and markup that has no end; a dump in Vietnamese leaves none of it."""

import bz2
import random
import re
from xml.sax.saxutils import escape

import pytest

from shared.corpora.build import prepare
from shared.corpora.readers import documents
from shared.corpora.wikitext import wiki_text

VIETNAMESE = ("Tập tin", "Thể loại")  # as a dump of that wiki names them


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        # Namespaces as people write them
        ("x[[ Thể loại : Chợ ]]y", "xy"),
        ("x[[Thể_loại:Chợ]]y", "xy"),
        ("x[[thể  loại:Chợ|khoá]]y", "xy"),
        ("x[[The\u0302\u0309 loa\u0323i:Cho\u031b\u0323]]y", "xy"),
        ("x[[Hình:Khác.png]]y[[hình:a.svg|nhỏ|chú thích]]z", "xyz"),
        ("x[[Category:Y]]y[[Image:a b.JPG]]z[[FILE:a.ogg|thumb]]", "xyz"),
        ("x[[Gambar:Kucing.jpg]]y[[Bild:Haus.png|mini]]z[[分类:城市]]", "xyz"),  # aliases that no dump names
        ("[[:Thể loại:Chợ]], [[:Hình:a.png]]", "Thể loại:Chợ, Hình:a.png"),
        # Links
        ("x[[simple:Market]]y[[zh-min-nan:A]]z[[fr:Titre|nhãn]]", "xyz"),
        (
            "[[:fr:Titre]] [[Re:Zero]] [[2001: A Space Odyssey]] [[wikt:chợ|chợ]]",
            "fr:Titre Re:Zero 2001: A Space Odyssey chợ",
        ),
        ("[[Hà Nội (thành phố)|]] [[Paris, Texas|]] [[Trợ giúp:Bảng (wiki)|]]", "Hà Nội Paris Bảng"),
        ("[[a|''b'' c]] [[Media:x.ogg|nghe]]", "b c nghe"),
        # Choices of a script or spelling: one of them
        ("电脑-{zh-hans:计算机; zh-hant:電腦}-好", "电脑计算机好"),
        ("-{简单}- -{R|原文}- -{A|zh-cn:打印机; zh-tw:印表機}-", "简单 原文 打印机"),
        ("-{zh;zh-hans|字}- -{sr-ec:Београд; sr-el:Beograd}-", "字 Београд"),
        ("a-{H|zh-cn:a; zh-tw:b}--{T|zh:c}--{-|zh-cn:d}-b", "ab"),
        ("-{zh-hans:[[A|-{B}-]];zh-hant:C}-", "B"),
        ("<math>e^{-{x}-1}</math> <nowiki>-{x}-</nowiki>", "e^{-{x}-1} -{x}-"),
        # Quotes and tags without an end
        ("'''bold and ''it lone\nnext '' line ''' end'''''", "bold and it lone\nnext  line  end"),
        ("L'''Avenir''' d''''x'''' it's", "LAvenir d'x' it's"),
        ("a <small>b\nc <div class=x>d <ref name=y>e", "a b\nc\nd e"),
        ("a</div>b</ref>c</SMALL> <span style='x'>d", "a\nbc d"),
        ("if (a < b) and c > d; 5<6>4", "if (a < b) and c > d; 5<6>4"),
        ("a [[File:x.svg|thumb|b: '''c''<br />d]] [[OS&nbsp;X]]", "a  OS\xa0X"),
        ("a\n{| class=x\n|-\n| b\n|align=right| '''{{bar|1}}\n|-\n| c || ''d\n|}\ne", "a\n\ne"),
        ("{| class=wikitable\n|-\n| a || b\ntext after", "text after"),
        ("a ]] b }} c {{x|", "a  b  c"),
        ("a<!-- never closed", "a"),
        # Pages that are templates too
        ("x<includeonly>hidden</includeonly><noinclude>shown</noinclude><onlyinclude>!</onlyinclude>", "xshown!"),
        ("a<includeonly>never closed", "a"),
        # Templates within a sentence
        (
            "It is {{convert|5|km|mi|abbr=on}}, {{Convert|2|to|3.5|m|ft}} or {{cvt|−4|-|7|C}} off.",
            "It is 5 km, 2 to 3.5 m or −4 - 7 C off.",
        ),
        ("{{formatnum: 1200}} người, {{formatnum:7|R}} {{#if:a|b}}", "1200 người, 7"),
        (
            "{{lang|vi|chữ ''Nôm''}} {{Lang|fr|[[Paris|ville]]}} {{nowrap|a b}} {{ill|Ada|de|Ada X}}",
            "chữ Nôm ville a b Ada",
        ),
        ("{{quote|text=said|author=x}} {{quote}} {{quote|q {{cite web|url=a}}|y}} {{lang|vi}} {{convert}}", "said  q"),
        ("a<span style='display: none'>b</span><span class=x style=\"color:red\">c</span>", "ac"),
        # What is no markup
        ("<code>__init__</code> __NOTOC__ __KHÔNGMỤCLỤC__ __init__", "__init__   __init__"),
        (
            "<code>''If''</code> <code><nowiki>''a'' [[b]]</nowiki></code> <code>x &lt; [[y|z]]</code>",
            "If ''a'' [[b]] x < z",
        ),
        ("<pre><nowiki>''a''</nowiki> <b></pre> <source>''a'' <nowiki></source>", "''a'' <b> ''a'' <nowiki>"),
        ("<nowiki>''x'' {{y}}</nowiki> &lt;small&gt;", "''x'' {{y}} <small>"),
    ],
)
def test_a_reader_sees(wikitext, text):
    assert wiki_text(wikitext, VIETNAMESE) == text


SYLLABLES = re.findall(
    r"\w+", "chợ làng phố sông núi hồ thành người nước quê nhà đường học sách vườn biển đảo rừng trời mưa"
)
MARKUP = re.compile(
    r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|''|</?[a-zA-Z]+[^<>]*>|-\{|\}-|__[A-ZĐ]+__|^[|!]|(?i:thể loại|tập tin|hình) ?:",
    re.M,
)
PIECES = (
    "'''{}''' ({{{{lang-en|Market}}}}; ) là [[{}|{}]] của [[{} (định hướng)|]].<ref name=\"a\">Nguồn {}</ref><ref name=a />",
    "[[Tập tin:{}.jpg|nhỏ|phải|Ảnh [[{}]] ở '''{}''']] [[Hình:{}.png|trái]] [[ Thể_loại : {} ]]",
    "{{{{Infobox|tên={}|ảnh=[[Hình:{}.svg]]|dân số={{{{formatnum:80}}}}}}}} {} {} {}",
    '{{| class="wikitable"\n|+ {}\n! {} !! {}\n|-\n| {} || {}\n|}}',
    "<small>{} <div style=\"x\">{} ''{} '''{}\n* mục ''{}'' <br/>",
    "== {} ==\n<gallery>\nHình:{}.jpg|{}\n</gallery>\n{} {}",
    "<includeonly>[[Thể loại:{}]]</includeonly><noinclude>{}</noinclude> {} <!-- {} --> {}",
    "{{{{#if:{}|{}|{}}}}} [http://x.example {}] __KHÔNGMỤCLỤC__ [[en:Market]][[simple:Market]] {}",
)


def test_a_vietnamese_dump_leaves_no_markup_in_a_hundred_documents(tmp_path):
    draw = random.Random(7)

    def words(count):
        return " ".join(draw.choices(SYLLABLES, k=count))

    with bz2.open(tmp_path / "viwiki.xml.bz2", "wt", encoding="utf8") as xml:
        xml.write(
            '<mediawiki xml:lang="vi"><siteinfo><base>https://vi.wikipedia.org/wiki/Trang_Ch%C3%ADnh</base><namespaces>'
            '<namespace key="0" /><namespace key="6">Tập tin</namespace><namespace key="14">Thể loại</namespace>'
            "</namespaces></siteinfo>"
        )
        for number in range(100):
            pieces = [
                draw.choice(PIECES).format(*(words(3) for _ in range(5))) + "\n" + words(40).capitalize() + "."
                for _ in range(9)
            ]
            text = "\n\n".join(pieces)
            xml.write(
                f"<page><title>Trang {number}</title><ns>0</ns><revision><text>{escape(text)}</text></revision></page>\n"
            )
        xml.write("</mediawiki>")
    rows = [prepare(row, 50, ()) for row in documents(str(tmp_path / "viwiki.xml.bz2"))]
    assert len(rows) == 100 and all(isinstance(row, tuple) for row in rows)
    left = {row["title"]: found[0] for row, _ in rows if (found := MARKUP.search(row["text"]))}
    assert not left
    assert all(
        row["text"].count(".") >= 9 and len(row["text"].split()) > 300 for row, _ in rows
    )  # and the prose is there
