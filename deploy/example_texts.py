"""Short texts to try the page on, in English and Vietnamese, written for it. Called by text_pages.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A text of a language (`en`, `vi`) by its title, with questions: the text answers all but the last of them."""

    language: str
    title: str
    text: str
    questions: tuple[str, ...]


EXAMPLES = (
    Example(
        "en",
        "The night ferry",
        "For forty years the night ferry between Harwell and the island of Saint Brae carried post, sheep and the odd"
        " tourist. Last Tuesday it made its final crossing. The council decided in March to close the line after "
        "repairs to the hull were estimated at 2.3 million pounds, more than the ferry had earned in the past ten "
        "years. From now on a smaller boat will sail twice a day in daylight, weather permitting. Ellen Marr, who has"
        " been the captain since 2009, said she would miss the quiet hour before dawn most of all. Islanders are "
        "worried about something else: the new boat has no room for lorries, so fresh food will arrive only on "
        "Mondays and Thursdays.",
        (
            "Why was the line closed?",
            "Who is the captain of the ferry?",
            "On which days will fresh food arrive?",
            "What does a ticket for the new boat cost?",
        ),
    ),
    Example(
        "en",
        "Bees on the roof",
        "Three years ago the public library of Norwood put two beehives on its flat roof, mainly to save the roof "
        "garden, where hardly anything bore fruit any more. Today there are nine hives, and about half a million bees"
        " fly out over the town every summer morning. They find more food there than in the countryside: parks, "
        "balconies and lime trees are in flower from April to September and are seldom sprayed. In the last season "
        "the library harvested 140 kilograms of honey. It is sold at the front desk, and the money buys books for "
        "children. The only complaint so far came from a café across the street, whose lemonade turned out to be "
        "popular with the bees as well.",
        (
            "How much honey was harvested in the last season?",
            "What is the money from the honey used for?",
            "How many hives are there today?",
            "Who looks after the bees?",
        ),
    ),
    Example(
        "vi",
        "Phiên chợ nổi",
        "Chợ nổi ở ngã ba sông họp từ khi trời còn tối. Khoảng năm giờ sáng, hàng trăm ghe chở dứa, dưa hấu và bí đỏ "
        "từ các tỉnh lân cận đã neo kín một khúc sông. Mỗi ghe treo thứ mình bán lên một cây sào cao trước mũi, gọi "
        "là cây bẹo, để khách ở xa cũng nhìn thấy. Mười lăm năm trước chợ có hơn năm trăm ghe, nay chỉ còn khoảng hai"
        " trăm, vì đường bộ mở rộng và xe tải chở hàng nhanh hơn. Thành phố đang hỗ trợ mỗi hộ tiểu thương một khoản "
        "tiền để họ ở lại với nghề. Bà Sáu Nga, bán bún riêu trên sông đã ba mươi năm, nói rằng bà chưa muốn lên bờ: "
        "khách quen vẫn chờ bà mỗi sáng.",
        (
            "Cây bẹo dùng để làm gì?",
            "Vì sao số ghe ở chợ giảm?",
            "Bà Sáu Nga bán gì?",
            "Ai là người lập ra chợ?",
        ),
    ),
    Example(
        "vi",
        "Thư viện trên xe buýt",
        "Một chiếc xe buýt cũ vừa được sửa thành thư viện lưu động. Xe chở khoảng hai nghìn cuốn sách, phần lớn do "
        "người dân quyên góp, và mỗi tuần ghé sáu ngôi trường ở vùng núi, nơi học sinh phải đi hơn hai mươi cây số "
        "mới tới được thư viện gần nhất. Ý tưởng là của anh Lê Minh Đức, một tài xế về hưu sớm sau hai mươi năm chạy "
        "tuyến đường dài. Anh tự tay đóng kệ, còn vợ anh phân loại sách. Trong ba tháng đầu, hơn chín trăm em đã mượn"
        " sách; được mượn nhiều nhất là truyện tranh lịch sử. Khó khăn lớn nhất hiện nay là tiền xăng, khoảng bốn "
        "triệu đồng một tháng.",
        (
            "Xe chở khoảng bao nhiêu cuốn sách?",
            "Ai nghĩ ra thư viện lưu động?",
            "Loại sách nào được mượn nhiều nhất?",
            "Chiếc xe buýt màu gì?",
        ),
    ),
)
